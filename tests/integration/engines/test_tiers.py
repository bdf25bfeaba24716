"""More requests than the device holds: they take turns there, and none says anything else for it."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvsluice.compression.recipe import get_recipe, recipe_names
from kvsluice.compression.sealing import Sealing
from kvsluice.errors import InternalError, InvalidRequest, RequestCancelled
from kvsluice.kernels.dispatch import TRITON, forced
from kvsluice.models.sampling import SamplingParams
from kvsluice.services.decode import parking as parking_module
from kvsluice.services.decode.engine import DecodeRequest, FailedEvent, FinishedEvent, OpenedEvent
from kvsluice.services.decode.host_pages import HostPages
from kvsluice.services.decode.tiers import Place, TierPolicy

PAGE = 4096
LOWRANK = {"kind": "lowrank", "rank": 12, "bits": 8}
PARAMS = (
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"n": 2, "seed": 4, "frequency_penalty": 0.2},
    {"seed": 2},
)


@pytest.fixture
def lookahead() -> bool:
    """Of engines that are not asked for the other way."""
    return True


def arena(num_pages: int = 2048) -> HostPages:
    return HostPages(num_pages * PAGE, torch.device("cpu"), PAGE)


def sealing(name: str, **more):
    """The recipe, sealing every 16 rows where it seals, and such that a prompt of 420 tokens is long enough for it."""
    recipe = get_recipe(name)
    window, retrieval = recipe.window.to_dict(), recipe.retrieval.to_dict()
    if recipe.window.seal_block:
        window |= {"local": 16, "seal_block": 16}
    if recipe.retrieval.needs_grid:
        retrieval |= {"budget_tokens": 32, "budget_rate": 0.01, "outliers": 2}
    return get_recipe(name, json.dumps({"window": window, "retrieval": retrieval} | more))


@pytest.fixture
def prompts(encode, prompt):
    """prompts(recipe) -> prompts with all kinds of sampling."""

    def make(recipe="exact", tokens: int = 20, length: int = 140, params=PARAMS):
        return [
            encode(prompt(length + 7 * i, i), SamplingParams(max_tokens=tokens, ignore_eos=True, **one), recipe)
            for i, one in enumerate(params)
        ]

    return make


def demand(bench, encoded):
    request = DecodeRequest("x", 1, len(encoded.ids), encoded.recipe, encoded.params)
    return bench(host=arena()).engine.demand(request)


def oversubscribed(bench, encoded, time_slice: int = 3, **more):
    """An engine whose device holds the largest of the requests and no other."""
    most = max(demand(bench, one).total_bytes for one in encoded)
    policy = TierPolicy(time_slice=time_slice)
    b = bench(capacity_bytes=most, tiers=policy, **{"host": arena()} | more)
    write_over_what_is_left(b.engine)
    return b


def write_over_what_is_left(engine) -> None:
    """Have others take the memory that a parked request leaves, so that who still reads it there reads no numbers."""
    plain, taken = engine.scheduler.left, []

    def left(request_id: str, nbytes: int) -> None:
        plain(request_id, nbytes)
        sizes = engine._parking._saved[request_id].sizes.values()
        taken.append([torch.full((size,), 255, dtype=torch.uint8) for size in sizes])

    engine.scheduler.left = left


def feed_opened(b, events, encoded) -> None:
    for event in events:
        if isinstance(event, OpenedEvent):
            b.feed(event.request_id, encoded[int(event.request_id)])


def run_all(b, encoded) -> list[list[list[int]]]:
    """Run the requests, each started when it is let in. Returns the tokens of every choice."""
    for i, one in enumerate(encoded):
        b.open(str(i), one)
    while b.engine.has_work:
        feed_opened(b, b.step(), encoded)
    return [[b.tokens(str(i), c) for c in range(one.params.n)] for i, one in enumerate(encoded)]


def counts(b):
    return b.engine.scheduler.tiers.counts


def at_baseline(b) -> bool:
    return (b.engine.host_free_bytes, b.engine.host.num_free) == (b.engine.host_capacity_bytes, b.engine.host.num_pages)


@pytest.mark.parametrize("name", recipe_names())
def test_turns_change_no_token(bench, prompts, name: str) -> None:
    """Blocks are sealed on the way, choices share their prompt, penalties are counted on the device."""
    encoded = prompts(sealing(name), length=420)
    assert all(one.recipe.name.startswith(name) for one in encoded), "none runs exact instead"
    alone = bench(host=arena())
    wanted = run_all(alone, encoded)
    b = oversubscribed(bench, encoded)
    assert run_all(b, encoded) == wanted
    assert counts(b).preemptions >= 3
    assert counts(b).resumes == counts(b).preemptions
    assert counts(b).bytes_down == counts(b).bytes_up > 0
    assert [b.ended(str(i)).steps for i in range(3)] == [alone.ended(str(i)).steps for i in range(3)]
    assert at_baseline(b)
    told = b.engine.tier_snapshot()
    assert (told.preemptions, told.device_to_host_bytes) == (counts(b).preemptions, counts(b).bytes_down)
    assert (told.device_used_bytes, told.device_sequences, told.host_used_bytes, told.host_sequences) == (0, 0, 0, 0)


def test_steps_that_are_waited_for_take_the_same_turns(bench, prompts) -> None:
    encoded = prompts(sealing("sluice"), length=420)
    b = oversubscribed(bench, encoded, lookahead=False)
    assert run_all(b, encoded) == run_all(bench(host=arena()), encoded)
    assert counts(b).preemptions >= 3


class TestThroughTheKernels:
    """Under the interpreter, which takes its time for every layer."""

    @pytest.fixture
    def model(self, make_model):
        return make_model(1)

    def test_what_lies_elsewhere_is_found(self, bench, prompts, monkeypatch) -> None:
        """Tables of addresses, hot sets, and rooms that blocks are packed to before they are due."""
        recipe = sealing("sluice-full", key_codec=LOWRANK)
        encoded = [*prompts(recipe, 8, 428, ({"seed": 1},)), *prompts(recipe, 4, 300, ({"seed": 2},))]
        wanted = run_all(bench(), encoded)
        sealed, seal = [], Sealing.seal
        monkeypatch.setattr(Sealing, "seal", lambda self: sealed.append(self.is_packed) or seal(self))
        b = oversubscribed(bench, encoded, time_slice=3)
        with forced(TRITON):
            assert run_all(b, encoded) == wanted
        assert sealed == [True], "of the first one, at position 432, in its second slice"
        assert counts(b).preemptions >= 1
        assert b.engine.runner.computation.hot_counts[0] > 0


def test_everyone_gets_on(bench, prompts) -> None:
    """Of four requests on a device for one, none is further behind than the slices of the others."""
    encoded = prompts(tokens=24, length=40, params=[{"seed": i} for i in range(4)])
    b = oversubscribed(bench, encoded, time_slice=4)
    for i, one in enumerate(encoded):
        b.open(str(i), one)
    quiet, told = dict.fromkeys("0123", 0), dict.fromkeys("0123", 0)
    while b.engine.has_work:
        feed_opened(b, b.step(), encoded)
        for name in told:
            now = len(b.tokens(name)) if b.of(name, OpenedEvent) else 0
            quiet[name] = 0 if now > told[name] else quiet[name] + 1
            told[name] = now
            assert quiet[name] < 4 * (4 + 5) or now == 23, "a turn, and what it takes to change places, for each"
    assert set(told.values()) == {23}


def test_who_waits_for_its_client_goes_first_and_stays_away(bench, prompts) -> None:
    encoded = prompts(tokens=12, length=40, params=({"seed": 0}, {"seed": 1}))
    b = oversubscribed(bench, encoded, time_slice=100)
    b.open("0", encoded[0], credits=3)
    b.open("1", encoded[1])
    while b.engine.has_work:
        feed_opened(b, b.step(), encoded)
    assert len(b.tokens("0")) == 3
    assert isinstance(b.ended("1"), FinishedEvent), "it had the device before any slice had ended"
    assert b.engine.scheduler.tiers.place("0") is Place.PARKED
    b.engine.grant("0", 20)
    b.run()
    assert b.tokens("0") == run_all(bench(), encoded)[0][0]


@pytest.mark.parametrize("place", [Place.DEVICE, Place.LEAVING, Place.PARKED, Place.COMING])
@pytest.mark.parametrize("choice", [None, 1])
def test_a_request_may_end_wherever_it_lies(bench, prompts, place: Place, choice: int | None) -> None:
    encoded = prompts(tokens=16, length=40, params=({"n": 2, "seed": 0}, {"n": 2, "seed": 1}))
    wanted = run_all(bench(), encoded)
    b = oversubscribed(bench, encoded)
    for i, one in enumerate(encoded):
        b.open(str(i), one)
    seen: set[Place] = set()
    while place not in seen:
        feed_opened(b, b.step(), encoded)
        stays = b.engine.scheduler.tiers
        seen = {stays.place("0")} if b.engine.scheduler.live_choices("0") else set()
    assert b.engine.cancel("0", choice)
    b.engine.check_integrity()
    while b.engine.has_work:
        feed_opened(b, b.step(), encoded)
    assert [b.tokens("1", c) for c in range(2)] == wanted[1]
    if choice is None:
        assert isinstance(b.ended("0").error, RequestCancelled)
    else:
        assert b.tokens("0", 0) == wanted[0][0]
    assert at_baseline(b)


def test_a_move_that_fails_ends_its_request_alone(bench, prompts, monkeypatch) -> None:
    encoded = prompts(tokens=16, length=40, params=({"seed": 0}, {"seed": 1}))
    wanted = run_all(bench(), encoded)
    plain, calls = parking_module.CopyStream.run, []

    def failing(self, targets, sources):
        calls.append(len(targets))
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return plain(self, targets, sources)

    monkeypatch.setattr(parking_module.CopyStream, "run", failing)
    b = oversubscribed(bench, encoded)
    run_all(b, encoded)
    ends = [b.ended(str(i)) for i in range(2)]
    failed = [type(end) for end in ends].index(FailedEvent)
    assert isinstance(ends[failed].error, InternalError)
    assert b.tokens(str(1 - failed)) == wanted[1 - failed][0]
    assert at_baseline(b)


def test_what_host_memory_does_not_take_waits_as_without_tiers(bench, prompts) -> None:
    encoded = prompts(tokens=10, length=40, params=[{"seed": i} for i in range(3)])
    need = -(-demand(bench, encoded[-1]).total_bytes // PAGE)
    b = oversubscribed(bench, encoded, host=arena(need // 2))
    assert run_all(b, encoded) == run_all(bench(), encoded)
    assert counts(b).preemptions == 0
    with pytest.raises(InvalidRequest, match="num_prompt_tokens: the caches may take"):
        oversubscribed(bench, encoded[:1]).open("large", encoded[2])


ACTIONS = st.lists(st.tuples(st.sampled_from(["open", "step", "step", "grant", "cancel", "choice"]), st.integers(0, 9)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS, pages=st.sampled_from([40, 100, 400]), time_slice=st.integers(1, 6), ahead=st.integers(1, 3))
def test_any_order_leaves_both_memories_whole(bench, mixed, actions, pages: int, time_slice: int, ahead: int) -> None:
    """`step` checks after each one that ledgers, arena, places and caches agree; who is not cancelled says what it
    says alone."""
    encoded, wanted, most = mixed
    b = bench(capacity_bytes=2 * most, tiers=TierPolicy(time_slice, ahead=ahead), host=arena(pages))
    cancelled: set[str] = set()
    names: list[str] = []
    for action, number in actions:
        name = names[number % len(names)] if names else ""
        if action == "open":
            names.append(str(len(names)))
            b.open(names[-1], encoded[(len(names) - 1) % 3], credits=None if number % 2 else 4)
        elif action == "grant" and name:
            b.engine.grant(name, number)
        elif action in ("cancel", "choice") and name:
            b.engine.cancel(name, 0 if action == "choice" else None)
            cancelled.add(name)
        b.engine.check_integrity()
        for event in b.step():
            if isinstance(event, OpenedEvent):
                b.feed(event.request_id, encoded[int(event.request_id) % 3])
    for name in names:
        b.engine.grant(name, 100)
    while b.engine.has_work:
        for event in b.step():
            if isinstance(event, OpenedEvent):
                b.feed(event.request_id, encoded[int(event.request_id) % 3])
    for name in set(names) - cancelled:
        of = int(name) % 3
        assert [b.tokens(name, c) for c in range(encoded[of].params.n)] == wanted[of]
    assert len({name for name in names if b.ended(name)}) == len(names)
    assert at_baseline(b)


@pytest.fixture
def mixed(bench, prompts):
    """Prompts of two recipes, what each says alone, and the most that one may take."""
    encoded = prompts("exact", tokens=8, length=30, params=({"seed": 1}, {"n": 2, "seed": 2}))
    encoded += prompts(sealing("kivi"), tokens=8, length=90, params=({"seed": 3},))
    return encoded, run_all(bench(), encoded), max(demand(bench, one).total_bytes for one in encoded)
