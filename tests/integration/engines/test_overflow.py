"""More requests than the device and host memory hold: some lie in a store meanwhile, and none says anything else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvsluice.errors import CorruptFrame, SequenceLost, StoreUnavailable
from kvsluice.models.sampling import SamplingParams
from kvsluice.services.decode.engine import FailedEvent
from kvsluice.services.decode.host_pages import Extent
from kvsluice.services.decode.overflow import OverflowPolicy
from kvsluice.services.decode.tiers import Place, TierPolicy
from tests.integration.engines.test_tiers import (
    PAGE,
    arena,
    at_baseline,
    demand,
    feed_opened,
    run_all,
    sealing,
    write_over_what_is_left,
)

PARAMS = [{"temperature": 0.0, "repetition_penalty": 1.3}, {"n": 2, "seed": 4}, *({"seed": seed} for seed in range(5))]


@pytest.fixture
def lookahead() -> bool:
    return True


class Depot:
    """A store tier in this process. What it is asked for it does when `work` is called, piece by piece."""

    def __init__(self) -> None:
        self.images: dict = {}
        self.jobs: list = []
        self.write_error = self.read_error = None
        self.most = 0

    def write(self, image, extent, done) -> None:
        def run() -> None:
            if self.write_error is None:
                self.images[image] = extent.read(0, extent.num_bytes)
                self.most = max(self.most, len(self.images))
            done(self.write_error)

        self.jobs.append((image, run))

    def read(self, image, place, done) -> None:
        def run() -> None:
            data = self.images.pop(image)
            if self.read_error is None:
                for begin in range(0, len(data), 1000):
                    place(begin, memoryview(data)[begin : begin + 1000])
            done(self.read_error)

        self.jobs.append((image, run))

    def forget(self, image) -> None:
        self.jobs = [job for job in self.jobs if job[0] != image]
        self.images.pop(image, None)

    def work(self, count: int = 100) -> None:
        for _ in range(min(count, len(self.jobs))):
            self.jobs.pop(0)[1]()


@pytest.fixture
def prompts(encode, prompt):
    """prompts(recipe) -> prompts with all kinds of sampling."""

    def make(recipe="exact", tokens: int = 16, length: int = 90, params=PARAMS):
        return [
            encode(prompt(length + 7 * i, i), SamplingParams(max_tokens=tokens, ignore_eos=True, **one), recipe)
            for i, one in enumerate(params)
        ]

    return make


def pressed(bench, encoded, host_share: float = 2.5, store_bytes: int = 1 << 30, time_slice: int = 3):
    """An engine whose device holds one of the requests and its host memory two more; the rest has to go to a store."""
    most = max(demand(bench, one).total_bytes for one in encoded)
    values = max(demand(bench, one).host_bytes for one in encoded)
    policy = TierPolicy(time_slice, overflow=OverflowPolicy(store_bytes, ahead=1))
    host = arena(int(host_share * (most + values)) // PAGE)
    b = bench(capacity_bytes=most, tiers=policy, host=host)
    b.depot = Depot()
    b.engine.use_store(b.depot)
    write_over_what_is_left(b.engine)
    return b


def run_with_depot(b, encoded, before_work=lambda: None) -> list[list[list[int]]]:
    for i, one in enumerate(encoded):
        b.open(str(i), one)
    while b.engine.has_work or b.depot.jobs:
        feed_opened(b, b.step(), encoded)
        before_work()
        b.depot.work(1)
        b.engine.check_integrity()
    return [[b.tokens(str(i), c) for c in range(one.params.n)] for i, one in enumerate(encoded)]


def wipe(b) -> None:
    """Write over host memory that nobody holds, so that who still reads there reads no numbers."""
    if b.engine.host.num_free:
        for view in b.engine.host.take(b.engine.host.num_free).views:
            view.fill_(255)


@pytest.mark.parametrize("name", ["exact", "sluice-full", "xkv", "streaming"])
def test_the_store_changes_no_token(bench, prompts, name: str) -> None:
    encoded = prompts(sealing(name), length=420, params=PARAMS[:5])
    assert all(one.recipe.name.startswith(name) for one in encoded), "none runs exact instead"
    wanted = run_all(bench(host=arena(8192)), encoded)
    b = pressed(bench, encoded)
    assert run_with_depot(b, encoded, lambda: wipe(b)) == wanted
    told = b.engine.tier_snapshot()
    assert told.store_writes == told.store_reads >= 1
    assert told.host_to_store_bytes == told.store_to_host_bytes > 0
    assert (told.store_used_bytes, told.store_sequences, told.store_failures) == (0, 0, 0)
    assert at_baseline(b)
    assert not b.depot.images


def test_those_that_wait_for_their_clients_go_to_the_store_and_come_back_for_them(bench, prompts) -> None:
    encoded = prompts()
    wanted = run_all(bench(), encoded)
    b = pressed(bench, encoded, time_slice=1000)
    for i, one in enumerate(encoded):
        b.open(str(i), one, credits=4)
    for _ in range(400):
        feed_opened(b, b.step(), encoded)
        b.depot.work()
    assert not b.engine.has_work
    told = b.engine.tier_snapshot()
    assert told.store_sequences >= 3
    assert told.device_sequences + told.host_sequences + told.store_sequences == len(encoded)
    assert told.store_reads == 0, "nobody comes back for nothing"
    stored = b.engine.scheduler.tiers.at(Place.STORED)[0]
    b.engine.grant(stored, 100)
    assert b.depot.jobs, "it begins to come although no step runs"
    while b.depot.jobs or b.engine.has_work:
        b.depot.work()
        b.step()
    assert b.tokens(stored) == wanted[int(stored)][0]
    for i in range(len(encoded)):
        b.engine.grant(str(i), 100)
    while b.engine.has_work or b.depot.jobs:
        b.depot.work()
        b.step()
    assert [[b.tokens(str(i), c) for c in range(one.params.n)] for i, one in enumerate(encoded)] == wanted
    assert at_baseline(b)


@pytest.mark.parametrize("place", [Place.STORING, Place.STORED, Place.FETCHING])
@pytest.mark.parametrize("choice", [None, 1])
def test_a_request_may_end_on_its_way_to_the_store_and_back(bench, prompts, place: Place, choice: int | None) -> None:
    encoded = prompts(params=[{"n": 2, "seed": seed} for seed in range(6)])
    wanted = run_all(bench(), encoded)
    b = pressed(bench, encoded)
    for i, one in enumerate(encoded):
        b.open(str(i), one)
    found: list[str] = []
    while not found:
        feed_opened(b, b.step(), encoded)
        found = b.engine.scheduler.tiers.at(place)
        if not found:
            b.depot.work(1)
    assert b.engine.cancel(found[0], choice)
    b.engine.check_integrity()
    while b.engine.has_work or b.depot.jobs:
        feed_opened(b, b.step(), encoded)
        b.depot.work(1)
    kept = [0] if choice == 1 else []
    for i in range(len(encoded)):
        for c in kept if str(i) == found[0] else range(2):
            assert b.tokens(str(i), c) == wanted[i][c]
    assert at_baseline(b)
    assert not b.depot.images


def test_a_store_that_takes_nothing_leaves_all_where_they_are(bench, prompts) -> None:
    encoded = prompts()
    b = pressed(bench, encoded)
    b.depot.write_error = StoreUnavailable("full")
    assert run_with_depot(b, encoded) == run_all(bench(), encoded)
    told = b.engine.tier_snapshot()
    assert told.store_failures == 1, "it is left alone for a while"
    assert (told.store_writes, told.store_used_bytes) == (0, 0)
    assert at_baseline(b)


def test_what_the_store_has_lost_ends_its_request_alone(bench, prompts) -> None:
    encoded = prompts()
    wanted = run_all(bench(), encoded)
    b = pressed(bench, encoded)
    b.depot.read_error = CorruptFrame("corrupt sequence: a frame that the manifest names is missing")
    run_with_depot(b, encoded)
    lost = [i for i in range(len(encoded)) if isinstance(b.ended(str(i)), FailedEvent)]
    assert lost
    for i in range(len(encoded)):
        if i in lost:
            assert isinstance(b.ended(str(i)).error, SequenceLost), "which another worker replays"
            assert b.tokens(str(i)) == wanted[i][0][: len(b.tokens(str(i)))]
        else:
            assert [b.tokens(str(i), c) for c in range(encoded[i].params.n)] == wanted[i]
    assert b.engine.tier_snapshot().store_failures == len(lost)
    assert at_baseline(b)


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["open", "open", "step", "step", "work", "grant", "cancel", "break"]), st.integers(0, 9)),
    max_size=40,
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS, pages=st.sampled_from([60, 100, 160]), time_slice=st.integers(1, 5))
def test_any_order_leaves_all_memories_whole(bench, mixed, actions, pages: int, time_slice: int) -> None:
    encoded, wanted, most = mixed
    policy = TierPolicy(time_slice, overflow=OverflowPolicy(1 << 30, retry_s=0.0))
    b = bench(capacity_bytes=most, tiers=policy, host=arena(pages))
    depot = b.depot = Depot()
    b.engine.use_store(depot)
    names, cancelled = [], set()

    def step() -> None:
        feed_opened_of(b, b.step(), encoded)

    for action, number in actions:
        name = names[number % len(names)] if names else ""
        if action == "open":
            names.append(str(len(names)))
            b.open(names[-1], encoded[(len(names) - 1) % len(encoded)], credits=None if number % 2 else 3)
        elif action == "work":
            depot.work(1 + number % 3)
        elif action == "break":
            depot.write_error = StoreUnavailable("gone") if number % 2 else None
        elif action == "grant" and name:
            b.engine.grant(name, number)
        elif action == "cancel" and name:
            b.engine.cancel(name)
            cancelled.add(name)
        b.engine.check_integrity()
        step()
    for name in names:
        b.engine.grant(name, 100)
    while b.engine.has_work or depot.jobs:
        depot.work(1)
        step()
    for name in set(names) - cancelled:
        of = int(name) % len(encoded)
        assert [b.tokens(name, c) for c in range(encoded[of].params.n)] == wanted[of]
    assert at_baseline(b)
    assert not depot.images


def feed_opened_of(b, events, encoded) -> None:
    feed_opened(b, events, {int(event.request_id): encoded[int(event.request_id) % len(encoded)] for event in events})


@pytest.fixture
def mixed(bench, prompts):
    """Prompts of two recipes, what each says alone, and the most that one may take."""
    encoded = prompts("exact", tokens=8, length=30, params=({"seed": 1}, {"n": 2, "seed": 2}))
    encoded += prompts(sealing("kivi"), tokens=8, length=90, params=({"seed": 3},))
    return encoded, run_all(bench(), encoded), max(demand(bench, one).total_bytes for one in encoded)


def test_an_extent_is_the_bytes_of_its_parts_in_order() -> None:

    parts = [
        torch.arange(7, dtype=torch.uint8),
        torch.arange(7, 10, dtype=torch.uint8),
        torch.zeros(5, dtype=torch.uint8),
    ]
    extent = Extent(parts)
    extent.write(10, bytes(range(10, 15)))
    assert [extent.read(a, b) for a in range(16) for b in range(a, 16)] == [
        bytes(range(a, b)) for a in range(16) for b in range(a, 16)
    ]
