"""The order in which prompts run, simulated without a model."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsluice.errors import ConfigError, DuplicateRequest
from kvsluice.services.prefill.batcher import Batcher, WorkItem

NUM_LAYERS = 4


def always(request_id: str) -> bool:
    return True


def make(chunk: int = 4, pack: int = 8, active: int = 10_000, patience: float = 1.0) -> Batcher:
    return Batcher(NUM_LAYERS, chunk, pack, active, patience)


def run_pack(batcher: Batcher, ready=always) -> tuple[list[WorkItem], list[str]]:
    """Run one pack. Returns its items and the prompts that finished with it."""
    items = batcher.plan(ready)
    finished = []
    for request_id in batcher.advance(items):
        if items[0].layer + 1 == NUM_LAYERS:
            batcher.remove(request_id)
            finished.append(request_id)
        else:
            rows = max(i.end for i in items if i.request_id == request_id)
            batcher.next_layer(request_id, rows)
    return items, finished


def run_all(batcher: Batcher, ready=always) -> list[list[WorkItem]]:
    packs = []
    while len(batcher):
        items, _ = run_pack(batcher, ready)
        assert items, "work is left and nothing is held back"
        packs.append(items)
    return packs


def test_a_single_prompt_runs_every_layer_in_order_on_a_grid_of_its_rows() -> None:
    batcher = make(chunk=4, pack=8)
    batcher.add("a", 10)
    items = [item for pack in run_all(batcher) for item in pack]
    grid = [(0, 4), (4, 8), (8, 10)]
    assert [(i.layer, i.begin, i.end) for i in items] == [(layer, *c) for layer in range(NUM_LAYERS) for c in grid]


def test_the_grid_of_a_prompt_does_not_depend_on_its_neighbours() -> None:
    alone = make()
    alone.add("a", 11)
    wanted = [item for pack in run_all(alone) for item in pack]
    together = make()
    for request_id, rows in (("b", 3), ("a", 11), ("c", 7)):
        together.add(request_id, rows)
    got = [item for pack in run_all(together) for item in pack if item.request_id == "a"]
    assert got == wanted


def test_packs_hold_one_layer_and_stay_within_the_limit() -> None:
    batcher = make(chunk=4, pack=8)
    for name, rows in (("a", 3), ("b", 2), ("c", 30), ("d", 1)):
        batcher.add(name, rows)
    for pack in run_all(batcher):
        assert len({item.layer for item in pack}) == 1
        assert sum(item.num_rows for item in pack) <= 8


def test_prompts_of_the_same_layer_share_a_pack() -> None:
    batcher = make(chunk=4, pack=8)
    batcher.add("a", 3)
    batcher.add("b", 2)
    packs = run_all(batcher)
    assert len(packs) == NUM_LAYERS
    assert all({item.request_id for item in pack} == {"a", "b"} for pack in packs)


def test_a_short_prompt_slips_in_between_the_items_of_a_long_one() -> None:
    batcher = make(chunk=4, pack=4)
    batcher.add("long", 40)
    order = [run_pack(batcher)[0][0].request_id for _ in range(3)]
    batcher.add("short", 4)
    order += [run_pack(batcher)[0][0].request_id for _ in range(NUM_LAYERS + 1)]
    assert order == ["long"] * 3 + ["short"] * NUM_LAYERS + ["long"]


@pytest.mark.parametrize("patience", [0.0, 0.5, 1.0, 2.0])
def test_a_stream_of_short_prompts_delays_a_long_one_by_no_more_than_the_bound(patience: float) -> None:
    batcher = make(chunk=4, pack=8, patience=patience)
    batcher.add("long", 40)
    delay_rows, shorts = 0, 0
    while "long" in batcher:
        while len(batcher) < 4:  # there is always a shorter prompt waiting
            batcher.add(f"short-{shorts}", 6)
            shorts += 1
        items, _ = run_pack(batcher)
        if all(item.request_id != "long" for item in items):
            delay_rows += sum(item.num_rows for item in items)
    assert delay_rows < patience * 40 * NUM_LAYERS + 8
    if patience >= 1:
        assert delay_rows >= 40, "short prompts did overtake"


def test_without_patience_prompts_lead_in_order_of_arrival() -> None:
    batcher = make(chunk=4, pack=4, patience=0)
    for name, rows in (("a", 12), ("b", 4), ("c", 8)):
        batcher.add(name, rows)
    leaders = [pack[0].request_id for pack in run_all(batcher)]
    assert leaders == sorted(leaders)


def test_a_prompt_whose_receiver_is_slow_is_skipped_and_not_charged() -> None:
    batcher = make(chunk=4, pack=4, patience=0.1)
    batcher.add("slow", 8)
    for n in range(5):
        batcher.add(f"other-{n}", 8)
    while len(batcher) > 1:
        items, _ = run_pack(batcher, ready=lambda r: r != "slow")
        assert all(item.request_id != "slow" for item in items)
    assert batcher.plan(lambda r: False) == []
    assert [i.request_id for i in run_pack(batcher)[0]] == ["slow"]


def test_started_prompts_stay_within_the_limit_and_a_longer_one_runs_alone() -> None:
    batcher = make(chunk=4, pack=8, active=10)
    sizes = {"a": 6, "b": 6, "c": 4, "huge": 25}
    for name, rows in sizes.items():
        batcher.add(name, rows)
    started: set[str] = set()
    while len(batcher):
        items, finished = run_pack(batcher)
        started |= {item.request_id for item in items}
        active = sum(sizes[name] for name in started)
        assert active <= 10 or started == {"huge"}
        started -= set(finished)


def test_an_urgent_prompt_that_waits_for_room_lets_no_later_arrival_start() -> None:
    batcher = make(chunk=4, pack=4, active=10, patience=0.25)
    batcher.add("first", 4)
    run_pack(batcher)
    batcher.add("big", 10)
    steps_of_others, n = 0, 0
    while True:
        while len(batcher) < 4:
            batcher.add(f"small-{n}", 4)
            n += 1
        items, _ = run_pack(batcher)
        if any(item.request_id == "big" for item in items):
            break
        steps_of_others += sum(item.num_rows for item in items)
    assert steps_of_others <= 4 * NUM_LAYERS + 0.25 * 10 * NUM_LAYERS + 4 + 10 * NUM_LAYERS


def test_rows_dropped_between_layers_shrink_what_is_left() -> None:
    batcher = make(chunk=4, pack=8)
    batcher.add("a", 8)
    assert batcher.num_pending_tokens == 8
    assert batcher.advance(batcher.plan(always)) == ["a"]
    batcher.next_layer("a", 2)
    assert batcher.num_pending_tokens == 2  # 3 layers x 2 rows over 4 layers, rounded up
    assert batcher.plan(always) == [WorkItem("a", 1, 0, 2)]


def test_a_removed_prompt_leaves_no_trace() -> None:
    batcher = make()
    batcher.add("a", 8)
    items = batcher.plan(always)
    batcher.remove("a")
    assert batcher.advance(items) == []
    assert batcher.num_pending_tokens == 0
    batcher.add("a", 4)
    with pytest.raises(DuplicateRequest):
        batcher.add("a", 4)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 8, 8, 1.0), "chunk_tokens"),
        ((4, 3, 8, 1.0), "max_pack_tokens"),
        ((4, 8, 0, 1.0), "max_active_tokens"),
        ((4, 8, 8, -1.0), "patience"),
    ],
)
def test_bad_limits_are_named(arguments: tuple, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Batcher(NUM_LAYERS, *arguments)


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 12)), min_size=1, max_size=12),
    active=st.integers(8, 60),
    patience=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_every_row_of_every_prompt_runs_once_a_layer(arrivals: list, active: int, patience: float) -> None:
    batcher = make(chunk=4, pack=8, active=active, patience=patience)
    waiting = sorted(enumerate(arrivals), key=lambda a: a[1][1])
    seen: Counter = Counter()
    step = 0
    while waiting or len(batcher):
        while waiting and (waiting[0][1][1] <= step or not len(batcher)):
            index, (rows, _) = waiting.pop(0)
            batcher.add(str(index), rows)
        items, _ = run_pack(batcher)
        seen.update((item.request_id, item.layer, row) for item in items for row in range(item.begin, item.end))
        step += 1
    assert set(seen.values()) == {1}
    assert len(seen) == sum(rows for rows, _ in arrivals) * NUM_LAYERS


def test_rows_that_were_found_do_not_run_in_their_layers() -> None:
    batcher = Batcher(num_layers=3, chunk_tokens=4, max_pack_tokens=8, max_active_tokens=100)
    batcher.add("a", 14)
    batcher.found("a", 8, 2)
    assert batcher.num_pending_tokens == -(-(2 * 6 + 14) // 3)
    ran = []
    for layer in range(3):
        while True:
            items = batcher.plan(lambda _: True)
            ran += [(item.layer, item.begin, item.end) for item in items]
            left = batcher._remaining(batcher._prompts["a"])
            complete = batcher.advance(items)
            assert batcher._remaining(batcher._prompts["a"]) == left - sum(item.num_rows for item in items)
            if complete:
                break
        if layer < 2:
            batcher.next_layer("a", 14)
    shared = [(layer, *rows) for layer in (0, 1) for rows in ((8, 12), (12, 14))]
    assert ran == [*shared, *((2, begin, min(begin + 4, 14)) for begin in range(0, 14, 4))]
    assert batcher.num_pending_tokens == 0


def test_what_is_found_makes_a_prompt_short() -> None:
    """Least remaining work first: a long prompt that was found for the most part goes before a shorter one."""
    batcher = Batcher(num_layers=2, chunk_tokens=4, max_pack_tokens=4, max_active_tokens=100)
    batcher.add("short", 12)
    batcher.add("long", 40)
    batcher.found("long", 36, 2)
    assert [item.request_id for item in batcher.plan(lambda _: True)] == ["long"]
    with pytest.raises(AssertionError):
        batcher.found("long", 32, 2)  # it has started
    for rows in (5, 12, 16):
        with pytest.raises(AssertionError):
            batcher.found("short", rows, 2)
