"""Who runs, waits and is sent away, on a clock of the test's own."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsluice.errors import InvalidRequest, Overloaded
from kvsluice.services.gateway import fair_queue
from kvsluice.services.gateway.admission import Admission, AdmissionPolicy, Ask
from kvsluice.services.gateway.fair_queue import FairQueue, Place
from kvsluice.services.gateway.waits import FIXED_TOKENS, Backlog, Speed
from kvsluice.services.keys import TenantLimits


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


async def hold(admission, ask, entered, release):
    async with admission.slot(ask):
        entered.append(ask.num_choices)
        await release.wait()


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_one_tenant_is_served_first_come_first_served_and_bounded():
    admission, entered, release = Admission(AdmissionPolicy(4, 2)), [], asyncio.Event()
    tasks = [asyncio.create_task(hold(admission, Ask(size), entered, release)) for size in (3, 2, 1)]
    await settle()
    # the last would fit, but not before the one that came first
    assert (entered, admission.num_waiting, admission.num_running) == ([3], 2, 1)
    with pytest.raises(Overloaded, match="2") as caught:
        async with admission.slot(Ask()):
            pass
    assert caught.value.reason == "queue_full"
    release.set()
    await asyncio.gather(*tasks)
    assert entered == [3, 2, 1]
    assert (admission.num_waiting, admission.num_running) == (0, 0)


async def test_a_request_larger_than_all_runs_alone():
    admission = Admission(AdmissionPolicy(4, 0))
    async with admission.slot(Ask(100)):
        with pytest.raises(Overloaded):
            async with admission.slot(Ask(1)):
                pass
    async with admission.slot(Ask(4)):
        pass


@pytest.mark.parametrize("cancel_first", [True, False])
async def test_a_cancelled_waiter_gives_back_what_it_had(cancel_first):
    admission, entered, release = Admission(AdmissionPolicy(1, 5)), [], asyncio.Event()
    first = asyncio.create_task(hold(admission, Ask(), entered, release))
    await settle()
    second = asyncio.create_task(hold(admission, Ask(), entered, asyncio.Event()))
    third = asyncio.create_task(hold(admission, Ask(), entered, release))
    await settle()
    # the waiter is cancelled before, or in the same turn of the loop in which its turn comes
    if cancel_first:
        second.cancel()
        await settle()
    release.set()
    first.add_done_callback(lambda _: second.cancel())
    await asyncio.gather(first, second, third, return_exceptions=True)
    assert third.exception() is None
    assert (admission.num_running, admission.num_waiting) == (0, 0)
    async with admission.slot(Ask()):
        pass


def run_some(policy, clock, count, held_s):
    """Have so many requests run one after the other, each for so long."""
    for _ in range(count):
        place, starts = policy.offer(Ask())
        assert starts
        clock.now_s += held_s
        policy.end(place, 1)


def fill(policy, count, **ask):
    return [policy.offer(Ask(**ask))[0] for _ in range(count)]


def refusal(policy, **ask):
    with pytest.raises(Overloaded) as caught:
        policy.offer(Ask(**ask))
    return caught.value


def test_who_would_wait_past_its_deadline_is_sent_away_at_once():
    clock = Clock()
    policy = AdmissionPolicy(2, 50, clock)
    run_some(policy, clock, 100, 4.0)
    fill(policy, 10)
    # two run, eight wait, and this one: nine of them start in 4 s / 2 each
    assert policy.wait_s(Ask()) == pytest.approx(18)
    error = refusal(policy, remaining_s=10)
    assert (error.reason, error.retry_after_s) == ("deadline", pytest.approx(8))
    assert policy.num_waiting == 8
    policy.offer(Ask(remaining_s=19))


def test_who_would_get_its_first_token_too_late_is_sent_away_at_once():
    clock, running = Clock(), []
    policy = AdmissionPolicy(4, 50, clock, max_ttft_s=6.0, backlog=lambda: Backlog(running, 1, Speed(0.01)))
    run_some(policy, clock, 100, 8.0)
    fill(policy, 3)
    running[:] = [600]
    error = refusal(policy, prompt_tokens=400)
    wanted_s = 0.01 * 2 * (400 + FIXED_TOKENS) - 6
    assert (error.reason, error.retry_after_s) == ("ttft", pytest.approx(wanted_s)), "prompts that are ahead count"
    # the same prompt, of which little has to run: it waits for no more of the longer one than that
    fill(policy, 1, prompt_tokens=400, saved_tokens=300.0)
    running.clear()
    fill(policy, 3)
    assert policy.num_waiting == 3
    error = refusal(policy)
    assert (error.reason, error.retry_after_s) == ("ttft", pytest.approx(2)), "and the queue: 4 × 8 s / 4"


def test_prompts_wait_where_turns_are_fair():
    running = []
    policy = AdmissionPolicy(8, 50, backlog=lambda: Backlog(running, 1, Speed(0.001)))
    fill(policy, 1)
    running[:] = [1000, 1000]
    long, short = (policy.offer(Ask(prompt_tokens=tokens, tenant=f"t{tokens}"))[0] for tokens in (500, 10))
    assert not policy.runs(long), "two prompts are ahead of it already"
    other = policy.offer(Ask(prompt_tokens=10, limits=limits(priority="high")))[0]
    assert policy.runs(other), "a short one slips in between those that run"
    running[:] = [1000]
    assert policy.go_on() == [long, short], "a prompt has run"


async def test_who_waits_is_told_when_room_came_without_a_word_and_another_asks():
    running, entered, release = [], [], asyncio.Event()
    admission = Admission(AdmissionPolicy(8, 50, backlog=lambda: Backlog(running, 1, Speed(0.01))))
    tasks = [asyncio.create_task(hold(admission, Ask(1), entered, release))]
    await settle()
    running[:] = [1000, 1000]
    tasks.append(asyncio.create_task(hold(admission, Ask(2, prompt_tokens=500), entered, release)))
    await settle()
    running.clear()  # as when a worker tells that another gateway's prompts have run
    tasks.append(asyncio.create_task(hold(admission, Ask(3), entered, release)))
    await settle()
    release.set()
    await asyncio.wait_for(asyncio.gather(*tasks), 5)
    assert entered == [1, 2, 3]
    assert (admission.num_running, admission.num_waiting) == (0, 0)


def test_a_wrong_guess_keeps_nobody_out_for_ever():
    clock = Clock()
    policy = AdmissionPolicy(1, 50, clock, max_ttft_s=1.0)
    run_some(policy, clock, 1, 3600.0)
    place, starts = policy.offer(Ask(remaining_s=5.0))
    assert starts, "nothing runs: only by running is it put right"
    assert refusal(policy).reason == "ttft"
    policy.end(place, 1)
    assert policy.offer(Ask())[1]


def test_a_long_pause_makes_nobody_wait():
    clock = Clock()
    policy = AdmissionPolicy(2, 50, clock)
    run_some(policy, clock, 100, 1.0)
    clock.now_s += 86400
    fill(policy, 4)
    assert policy.wait_s(Ask()) == pytest.approx(1.5)


def limits(**given):
    return TenantLimits(**given)


class Engine:
    """Runs what starts, each request for as long as it has tokens, and counts what each tenant was served."""

    def __init__(self, policy, clock, tokens_per_s=10.0):
        self.policy, self.clock, self.rate = policy, clock, tokens_per_s
        self.running, self.served, self.order = {}, Counter(), []

    def begin(self, place, tokens):
        self.running[place] = (self.clock.now_s + tokens / self.rate, tokens)
        self.order.append(place.tenant)

    def until_end(self, tokens_of):
        place = min(self.running, key=lambda one: self.running[one][0])
        self.clock.now_s, tokens = self.running.pop(place)
        self.served[place.tenant] += tokens
        for started in self.policy.end(place, 1, tokens):
            self.begin(started, tokens_of(started.tenant))
        return place.tenant


def overloaded(tenants, num_ends, max_running=4, max_waiting=40):
    """Tokens that each tenant is served while all of them always want more: {tenant: (limits, tokens a request)}."""
    clock = Clock()
    policy = AdmissionPolicy(max_running, max_waiting, clock)
    engine = Engine(policy, clock)

    def offer_all():
        for tenant, (bounds, tokens) in tenants.items():
            for _ in range(max_waiting):
                try:
                    place, starts = policy.offer(Ask(tenant=tenant, limits=bounds, prompt_tokens=tokens, max_tokens=0))
                except Overloaded:
                    break
                if starts:
                    engine.begin(place, tokens)

    offer_all()
    for _ in range(num_ends):
        engine.until_end(lambda tenant: tenants[tenant][1])
        offer_all()
    total = sum(engine.served.values())
    return {tenant: engine.served[tenant] / total for tenant in tenants}


def test_tenants_share_tokens_by_weight_whatever_their_requests_are_like():
    shares = overloaded(
        {"short": (limits(), 10), "long": (limits(), 400), "heavy": (limits(weight=2), 50)},
        num_ends=2000,
    )
    assert shares == {
        "short": pytest.approx(0.25, abs=0.03), "long": pytest.approx(0.25, abs=0.03),
        "heavy": pytest.approx(0.5, abs=0.05),
    }  # fmt: skip


def test_a_higher_class_goes_first():
    shares = overloaded(
        {"a": (limits(priority="high"), 10), "b": (limits(), 10), "c": (limits(priority="low"), 10)}, 500
    )
    assert shares["a"] > 0.9
    clock = Clock()
    policy = AdmissionPolicy(1, 10, clock)
    first = policy.offer(Ask(tenant="c", limits=limits(priority="low")))[0]
    places = {
        name: policy.offer(Ask(tenant=name, limits=limits(priority=priority)))[0]
        for name, priority in (("c", "low"), ("b", "normal"), ("a", "high"))
    }
    started, running = [], first
    while policy.num_waiting:
        (running,) = policy.end(running, 1)
        started.append(running.tenant)
    assert started == ["a", "b", "c"]
    assert running is places["c"]


def test_a_tenant_that_floods_the_queue_keeps_nobody_out():
    clock = Clock()
    policy = AdmissionPolicy(2, 20, clock)
    fill(policy, 22, tenant="flood")
    assert refusal(policy, tenant="flood").reason == "queue_full"
    modest = fill(policy, 10, tenant="modest")
    assert refusal(policy, tenant="modest").reason == "queue_full"
    assert policy.num_waiting == 30
    for number in range(30):
        try:
            policy.offer(Ask(tenant=f"t{number}"))
        except Overloaded as exc:
            assert exc.reason == "queue_full"
    assert policy.num_waiting == 40, "twice the queue, whoever comes"
    assert all(not policy.runs(place) for place in modest)


def test_who_was_away_begins_where_the_others_are():
    clock = Clock()
    policy = AdmissionPolicy(1, 100, clock)
    engine = Engine(policy, clock)
    for place in fill(policy, 51, tenant="busy", prompt_tokens=10, max_tokens=0):
        if policy.runs(place):
            engine.begin(place, 10)
    for _ in range(20):
        engine.until_end(lambda tenant: 10)
    fill(policy, 10, tenant="back", prompt_tokens=10, max_tokens=0)
    for _ in range(20):
        engine.until_end(lambda tenant: 10)
    turns = engine.order[21:]
    assert turns.count("back") == turns.count("busy") == 10
    assert all(a != b for a, b in pairwise(turns)), "in turns, not ten in a row"


def test_an_end_looks_at_each_tenant_a_few_times(monkeypatch):
    """And not at each for each: thousands of tenants would hold the event loop up."""
    queue, places, looks = FairQueue(), [Place(f"t{i}", TenantLimits(), 1, 0, 1000.0) for i in range(200)], 0
    for place in places:
        queue.add(place)
    for place in places:
        queue.start(place)
    for place in places[:100]:
        queue.end(place, 5000)

    def is_busy(tenant):
        nonlocal looks
        looks += 1
        return bool(tenant.waiting or tenant.running)

    monkeypatch.setattr(fair_queue._Tenant, "is_busy", property(is_busy))
    queue.end(places[100], 5000)
    assert looks < 10 * len(places)


def test_what_a_request_really_took_is_settled():
    clock = Clock()
    policy = AdmissionPolicy(1, 100, clock)
    running = fill(policy, 1, tenant="a", prompt_tokens=10, max_tokens=0)[0]
    fill(policy, 3, tenant="a", prompt_tokens=10, max_tokens=0)
    fill(policy, 3, tenant="b", prompt_tokens=10, max_tokens=0)
    started = []
    for used in (100, 10, 10, 10, 10, 10):
        (running,) = policy.end(running, 1, used)
        started.append(running.tenant)
    assert started == ["b", "b", "b", "a", "a", "a"], "the first answer was ten times as long as it was taken for"


def test_tokens_a_second_of_a_tenant():
    clock = Clock()
    policy = AdmissionPolicy(100, 10, clock, burst_s=10.0)
    bound = {"tenant": "a", "limits": limits(tokens_per_s=100), "max_tokens": 0}
    places = fill(policy, 4, prompt_tokens=300, **bound)
    error = refusal(policy, prompt_tokens=1, **bound)
    assert (error.reason, error.retry_after_s) == ("tenant_tokens", pytest.approx(2))
    fill(policy, 1, tenant="b", prompt_tokens=10**9)
    clock.now_s += 2.01
    fill(policy, 1, prompt_tokens=1, **bound)
    clock.now_s += 1
    for place in places:
        policy.end(place, 1, 600)
    assert refusal(policy, **bound).retry_after_s == pytest.approx(11, abs=0.2), (
        "answers are charged when they are known"
    )
    clock.now_s += 3600
    fill(policy, 4, prompt_tokens=300, **bound)
    assert refusal(policy, **bound).reason == "tenant_tokens", "nobody saves up more than the burst"


def test_tokens_over_an_hour_keep_to_the_rate():
    clock, taken = Clock(), 0
    policy = AdmissionPolicy(100, 10, clock, burst_s=10.0)
    for _ in range(36_000):
        clock.now_s += 0.1
        try:
            place, _ = policy.offer(Ask(tenant="a", limits=limits(tokens_per_s=50), prompt_tokens=40, max_tokens=0))
        except Overloaded:
            continue
        taken += 70
        policy.end(place, 1, 70)
    assert taken == pytest.approx(50 * 3600, rel=0.01)


def test_choices_of_a_tenant_at_once():
    policy = AdmissionPolicy(4, 10)
    bound = {"tenant": "a", "limits": limits(max_num_seqs=6)}
    places = fill(policy, 2, num_choices=3, **bound)
    assert refusal(policy, **bound).reason == "tenant_seqs"
    fill(policy, 1, tenant="b")
    policy.leave(places[1], 3)
    fill(policy, 3, **bound)
    assert refusal(policy, **bound).reason == "tenant_seqs"
    with pytest.raises(InvalidRequest, match=r"sampling\.n: got 7; allowed: at most 6"):  # coming again would not help
        policy.offer(Ask(7, **bound))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("oelr"), st.integers(0, 5), st.integers(1, 6)), max_size=80))
def test_whatever_happens_room_and_turns_add_up(events):
    clock = Clock()
    policy, room = AdmissionPolicy(8, 6, clock), 8
    places, asked = {}, defaultdict(list)
    bounds = [limits(priority=p, weight=w) for p, w in (("high", 1), ("normal", 3), ("normal", 1), ("low", 1))]
    for kind, which, size in events:
        clock.now_s += 1
        if kind == "o":
            tenant = which % 4
            try:
                place, _ = policy.offer(Ask(size, f"t{tenant}", bounds[tenant], prompt_tokens=size))
            except Overloaded:
                continue
            places[place] = size
            asked[place.tenant].append(place)
        elif kind == "r":
            room = 4 + which
            policy.resize(room)
        elif places:
            place = list(places)[which % len(places)]
            num_choices = places.pop(place)
            (policy.end if policy.runs(place) else policy.leave)(place, num_choices)
        running = [place for place in places if policy.runs(place)]
        assert policy.num_running == len(running)
        assert policy.num_waiting == len(places) - len(running)
        assert policy._free == room - sum(place.need for place in running)
        for mine in asked.values():
            states = [policy.runs(place) for place in mine if place in places]
            assert states == sorted(states, reverse=True), "a tenant's requests start in their order"
        waiting = len(places) - len(running)
        assert not waiting or running, "nobody waits for nothing"
    for place, num_choices in list(places.items()):
        (policy.end if policy.runs(place) else policy.leave)(place, num_choices)
    assert (policy.num_running, policy.num_waiting, policy._free) == (0, 0, room)
    assert not policy._queue._tenants
    assert not policy._quotas._seqs
