"""Admission, states and turns, without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from kvsluice.errors import ConfigError, DuplicateRequest, InvalidRequest, Overloaded
from kvsluice.services.decode.pages import PagePool, Region
from kvsluice.services.decode.scheduler import Choice, Demand, Phase, Scheduler, Turns


@pytest.fixture
def build() -> Iterator:
    built: list[Scheduler] = []

    def make(capacity: int = 1000, seqs: int = 4, waiting: int = 8, host: int | None = None) -> Scheduler:
        built.append(Scheduler(PagePool(capacity), seqs, waiting, None if host is None else PagePool(host)))
        return built[-1]

    yield make
    for scheduler in built:
        scheduler.check_integrity()


def open_and_start(scheduler: Scheduler, name: str, n: int = 1, credits: int | None = None, replay: int = 0) -> None:
    scheduler.enqueue(name, Demand(10, 5, n), credits)
    assert scheduler.admit() == [name]
    scheduler.start(name, {i: Turns(replay) for i in range(n)})


def test_a_request_goes_through_its_states_and_leaves_nothing(build) -> None:
    scheduler = build()
    scheduler.enqueue("a", Demand(10, 5, 2), None)
    assert scheduler.phase("a") is Phase.WAITING
    scheduler.admit()
    assert scheduler.phase("a") is Phase.RECEIVING
    assert scheduler.pool.used_bytes == 20
    assert scheduler.next_batch() == []
    scheduler.start("a", {0: Turns(), 1: Turns()})
    assert scheduler.phase("a") is Phase.RUNNING
    assert scheduler.next_batch() == [Choice("a", 0), Choice("a", 1)]
    scheduler.check_integrity()
    assert not scheduler.end_choice(Choice("a", 0))
    assert scheduler.pool.regions() == {Region("a"): 10, Region("a", 1): 5}
    scheduler.check_integrity()
    assert scheduler.end_choice(Choice("a", 1))
    assert scheduler.pool.used_bytes == 0
    assert scheduler.phase("a") is None


def test_admission_is_by_bytes_and_in_order(build) -> None:
    scheduler = build(capacity=100)
    scheduler.enqueue("a", Demand(60, 10, 1), None)
    scheduler.enqueue("big", Demand(50, 0, 1), None)
    scheduler.enqueue("small", Demand(10, 0, 1), None)
    assert scheduler.admit() == ["a"]
    assert scheduler.admit() == [], "the small one would fit, but does not overtake"
    assert scheduler.num_waiting == 2
    scheduler.end_request("a")
    assert scheduler.admit() == ["big", "small"]


def test_a_full_queue_and_a_request_too_large_are_refused_with_numbers(build) -> None:
    scheduler = build(capacity=100, waiting=1)
    scheduler.enqueue("a", Demand(90, 0, 1), None)
    scheduler.admit()
    scheduler.enqueue("b", Demand(90, 0, 1), None)
    with pytest.raises(Overloaded, match=r"1 requests wait.*needs 20 bytes, 10 of 100"):
        scheduler.enqueue("c", Demand(20, 0, 1), None)
    with pytest.raises(InvalidRequest, match=r"130 bytes .*100 for the prompt, 3 x 10 .*at most 100 bytes"):
        scheduler.enqueue("d", Demand(100, 10, 3), None)
    with pytest.raises(DuplicateRequest):
        scheduler.enqueue("a", Demand(1, 0, 1), None)


def test_admission_takes_both_memories_or_none(build) -> None:
    scheduler = build(capacity=100, host=50)
    scheduler.enqueue("a", Demand(10, 5, 2, host_bytes=40), None)
    scheduler.enqueue("b", Demand(10, 5, 1, host_bytes=20), None)
    scheduler.enqueue("c", Demand(10, 5, 1), None)
    assert scheduler.admit() == ["a"], "c needs no host memory, but does not overtake"
    assert (scheduler.pool.used_bytes, scheduler.host.used_bytes) == (20, 40)
    scheduler.start("a", {0: Turns(), 1: Turns()})
    scheduler.end_choice(Choice("a", 0))
    scheduler.check_integrity()
    assert scheduler.host.used_bytes == 40, "the other choice reads them"
    scheduler.end_choice(Choice("a", 1))
    assert scheduler.admit() == ["b", "c"]
    assert (scheduler.pool.used_bytes, scheduler.host.used_bytes) == (30, 20)
    scheduler.end_request("b")
    scheduler.check_integrity()
    assert scheduler.host.used_bytes == 0
    with pytest.raises(InvalidRequest, match="51 bytes of host memory; allowed: at most 50 bytes"):
        scheduler.enqueue("d", Demand(1, 1, 1, host_bytes=51), None)
    for name in "efgh":
        scheduler.enqueue(name, Demand(1, 0, 1, host_bytes=50), None)
    scheduler.max_waiting = 4
    with pytest.raises(Overloaded, match=r"needs 6 bytes, 85 of 100 are free, and of host memory 9 bytes, 50 of 50"):
        scheduler.enqueue("i", Demand(5, 1, 1, host_bytes=9), None)


def test_a_queue_of_length_zero_still_lets_in_what_fits(build) -> None:
    scheduler = build(capacity=100, waiting=0)
    scheduler.enqueue("a", Demand(60, 0, 1), None)
    scheduler.admit()
    with pytest.raises(Overloaded):
        scheduler.enqueue("b", Demand(60, 0, 1), None)


@pytest.mark.parametrize("stage", ["waiting", "receiving", "running"])
def test_ending_a_request_at_any_stage_frees_everything(build, stage: str) -> None:
    scheduler = build(capacity=100)
    scheduler.enqueue("other", Demand(60, 0, 1), None)
    scheduler.admit()
    if stage != "waiting":
        scheduler.end_request("other")
    scheduler.enqueue("a", Demand(40, 10, 2), None)
    scheduler.admit()
    if stage == "running":
        scheduler.start("a", {0: Turns(), 1: Turns()})
    assert scheduler.phase("a").value == stage
    scheduler.end_request("a")
    scheduler.check_integrity()
    assert scheduler.pool.used_bytes == (60 if stage == "waiting" else 0)
    assert (scheduler.num_waiting, scheduler.num_running) == (0, 0)


def test_choices_that_had_ended_get_no_turn_and_no_memory(build) -> None:
    scheduler = build()
    scheduler.enqueue("a", Demand(10, 5, 3), None)
    scheduler.admit()
    scheduler.start("a", {1: Turns()})
    assert scheduler.pool.regions() == {Region("a"): 10, Region("a", 1): 5}
    scheduler.enqueue("b", Demand(10, 5, 1), None)
    scheduler.admit()
    scheduler.start("b", {})
    assert scheduler.phase("b") is None
    assert scheduler.pool.used_bytes == 15


def test_more_choices_than_slots_take_turns(build) -> None:
    scheduler = build(seqs=3)
    for name in "abcd":
        open_and_start(scheduler, name, n=2)
    turns: Counter = Counter()
    for step in range(1, 25):
        batch = scheduler.next_batch()
        assert len(batch) == len(set(batch)) == 3
        turns.update(batch)
        if step % 8 == 0:  # 8 choices, 3 slots: 8 steps are three rounds
            assert set(turns.values()) == {step // 8 * 3}
    last_seen = dict.fromkeys(turns, 0)
    for step in range(1, 20):
        for choice in scheduler.next_batch():
            assert step - last_seen[choice] <= 3
            last_seen[choice] = step


def test_a_late_request_gets_its_turn(build) -> None:
    scheduler = build(seqs=1)
    open_and_start(scheduler, "a")
    open_and_start(scheduler, "b")
    scheduler.next_batch()
    open_and_start(scheduler, "c")
    assert [scheduler.next_batch()[0].request_id for _ in range(4)] == ["b", "a", "c", "b"]


def test_credits_pause_and_resume_a_request_without_taking_a_slot(build) -> None:
    scheduler = build(seqs=1)
    open_and_start(scheduler, "a", credits=2)
    open_and_start(scheduler, "b")
    assert [scheduler.next_batch()[0].request_id for _ in range(6)] == ["a", "b", "a", "b", "b", "b"]
    scheduler.grant("a", 1)
    assert [scheduler.next_batch()[0].request_id for _ in range(3)] == ["a", "b", "b"]
    assert scheduler.pool.used_bytes == 30, "a paused choice keeps its memory"
    scheduler.end_request("b")
    assert not scheduler.has_eligible()
    assert scheduler.next_batch() == []
    scheduler.grant("gone", 5)


def test_credits_are_shared_by_the_choices_of_a_request(build) -> None:
    scheduler = build(seqs=8)
    open_and_start(scheduler, "a", n=3, credits=4)
    turns = [[c.index for c in scheduler.next_batch()] for _ in range(3)]
    assert turns == [[0, 1, 2], [0], []]
    scheduler.grant("a", 1)
    assert [c.index for c in scheduler.next_batch()] == [1], "the one that waited longest"


def test_replayed_tokens_cost_no_credit(build) -> None:
    scheduler = build()
    open_and_start(scheduler, "a", credits=1, replay=3)
    assert [len(scheduler.next_batch()) for _ in range(6)] == [1, 1, 1, 1, 0, 0]


def test_a_choice_that_has_had_its_last_turn_waits_for_its_end() -> None:
    scheduler = Scheduler(PagePool(1000), 4, 8)
    open_and_start(scheduler, "other")
    scheduler.enqueue("a", Demand(10, 5, 2), 9)
    scheduler.admit()
    scheduler.start("a", {0: Turns(2, 3), 1: Turns(0, 3)})
    assert [[c.index for c in scheduler.next_batch() if c.request_id == "a"] for _ in range(4)] == [[0, 1]] * 3 + [[]]
    assert scheduler.num_running == 3
    scheduler.grant("a", 5)
    assert [c.request_id for c in scheduler.next_batch()] == ["other"]
    assert not scheduler.end_choice(Choice("a", 0)) and scheduler.end_choice(Choice("a", 1))
    scheduler.check_integrity()
    assert scheduler.has_eligible()


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_seqs"):
        Scheduler(PagePool(1), 0, 1)
    with pytest.raises(ConfigError, match="max_waiting"):
        Scheduler(PagePool(1), 1, -1)


def test_integrity_notices_a_lost_choice(build) -> None:
    scheduler = Scheduler(PagePool(100), 2, 2)
    open_and_start(scheduler, "a")
    scheduler._ring.clear()
    with pytest.raises(AssertionError):
        scheduler.check_integrity()


def test_a_leash_holds_a_choice_until_it_is_lengthened(build) -> None:
    scheduler = build()
    scheduler.enqueue("a", Demand(10, 5, 2), credits=9)
    scheduler.admit()
    scheduler.start("a", {0: Turns(replays=3, leash=2), 1: Turns()})
    for _ in range(2):
        assert len(scheduler.next_batch()) == 2
    assert scheduler.next_batch() == [Choice("a", 1)], "replays are held as well"
    scheduler.lengthen(Choice("a", 0), 1)
    assert len(scheduler.next_batch()) == 2
    scheduler.end_choice(Choice("a", 1))
    assert not scheduler.has_eligible()
    scheduler.lengthen(Choice("a", 0), float("inf"))
    assert scheduler.has_eligible()
    scheduler.lengthen(Choice("a", 1), 1)
    scheduler.lengthen(Choice("b", 0), 1)
    scheduler.end_request("a")
