"""Who lies on the device and who is parked, step by step, without a model."""

from __future__ import annotations

import pytest

from kvsluice.errors import ConfigError
from kvsluice.services.decode.overflow import OverflowPolicy
from kvsluice.services.decode.pages import PagePool
from kvsluice.services.decode.scheduler import Choice, Demand, Scheduler, Turns
from kvsluice.services.decode.tiers import Place, TierPolicy, Tiers


class Worker:
    """A scheduler whose moves take `move_steps` steps each way, and a count of who ran in which step.

    Args:
        room: bytes of the device; a request takes 10 and 5 a choice.
    """

    def __init__(self, room: int = 15, host: int = 1000, move_steps: int = 1, seqs: int = 8, **policy) -> None:
        self.scheduler = Scheduler(PagePool(room), seqs, 99, PagePool(host))
        self.tiers = self.scheduler.tiers = Tiers(
            self.scheduler.pool, self.scheduler.host, TierPolicy(**{"time_slice": 3} | policy), 4
        )
        self.move_steps = move_steps
        self.moving: dict[str, int] = {}
        self.ran: list[list[str]] = []

    def open(self, name: str, credits: int | None = None, n: int = 1, host: int = 0) -> None:
        self.scheduler.enqueue(name, Demand(10, 5, n, host), credits)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            for name in [name for name, left in self.moving.items() if left == 0]:
                del self.moving[name]
                if self.tiers.place(name) is Place.LEAVING:
                    self.scheduler.left(name, 15)
                else:
                    self.tiers.came(name, 15)
            for name in self.scheduler.admit():
                n = self.scheduler.pool.regions().keys()
                self.scheduler.start(
                    name, {r.choice: Turns() for r in n if r.request_id == name and r.choice is not None}
                )
            for name in (*self.tiers.at(Place.LEAVING), *self.tiers.at(Place.COMING)):
                self.moving.setdefault(name, self.move_steps)
            self.moving = {name: left - 1 for name, left in self.moving.items()}
            self.ran.append([choice.request_id for choice in self.scheduler.next_batch()])
            self.scheduler.check_integrity()

    def end(self, name: str) -> None:
        self.moving.pop(name, None)
        self.scheduler.end_request(name)

    def turns(self, name: str) -> int:
        return sum(name in ran for ran in self.ran)

    def places(self, names: str) -> list[Place]:
        return [self.tiers.place(name) for name in names]


def test_a_slice_is_had_before_the_next_one_comes() -> None:
    worker = Worker()
    worker.open("a")
    worker.open("b")
    worker.step(4)
    assert worker.ran[:3] == [["a"]] * 3
    assert worker.places("a") == [Place.LEAVING]
    worker.step(4)
    assert worker.turns("b") == 3
    worker.step(40)
    assert abs(worker.turns("a") - worker.turns("b")) <= 3
    assert worker.turns("a") + worker.turns("b") >= 48 * 3 // 5 - 3, "a slice of 3 for each 2 steps of moving"


def test_nobody_leaves_for_nobody() -> None:
    worker = Worker(room=30)
    worker.open("a")
    worker.open("b")
    worker.step(50)
    assert worker.turns("a") == worker.turns("b") == 50
    assert worker.tiers.counts.preemptions == 0


@pytest.mark.parametrize(("room", "count", "move_steps", "ahead"), [(15, 5, 1, 2), (45, 9, 3, 1), (60, 7, 2, 3)])
def test_everyone_has_a_share(room: int, count: int, move_steps: int, ahead: int) -> None:
    worker = Worker(room, move_steps=move_steps, ahead=ahead)
    names = [str(i) for i in range(count)]
    for name in names:
        worker.open(name)
    worker.step(60)
    before = {name: worker.turns(name) for name in names}
    worker.step(600)
    shares = [worker.turns(name) - before[name] for name in names]
    assert min(shares) > 0.7 * sum(shares) / count


def test_those_that_wait_for_their_clients_go_first_whatever_their_slice() -> None:
    worker = Worker(room=30, time_slice=1000)
    worker.open("a", credits=2)
    worker.open("b")
    worker.step(4)
    worker.open("c")
    worker.step(3)
    assert worker.places("abc") == [Place.PARKED, Place.DEVICE, Place.DEVICE]
    worker.step(20)
    assert worker.places("a") == [Place.PARKED], "it has nothing to do"
    worker.scheduler.grant("a", 5)
    worker.step(20)
    assert worker.turns("a") == 2, "the others have their slice"
    worker.end("c")
    worker.step(10)
    assert worker.turns("a") == 7


def test_the_one_with_most_steps_leaves_and_among_equals_the_largest() -> None:
    worker = Worker(room=45)
    worker.open("a")
    worker.step()
    worker.open("b", n=2)
    worker.step(3)
    worker.open("c")
    worker.step()
    assert worker.places("ab") == [Place.LEAVING, Place.DEVICE]
    worker = Worker(room=45)
    worker.open("a")
    worker.open("b", n=2)
    worker.step(3)
    worker.open("c")
    worker.step()
    assert worker.places("ab") == [Place.DEVICE, Place.LEAVING]


def test_nothing_overtakes_a_large_one() -> None:
    worker = Worker(room=40)
    for name in "ab":
        worker.open(name)
    worker.step(2)
    worker.open("large", n=6)
    worker.open("c")
    worker.step(3)
    assert set(worker.places("ab")) <= {Place.LEAVING, Place.PARKED}
    worker.step(3)
    assert worker.turns("large") > 0 == worker.turns("c")
    worker.step(60)
    assert all(worker.turns(name) > 9 for name in ("a", "b", "large", "c"))


def test_above_the_high_watermark_nobody_new_is_let_in_until_below_the_low_one() -> None:
    worker = Worker(host=100, overflow=OverflowPolicy(high=0.5, low=0.2))
    for name in "abcdef":
        worker.open(name)
    worker.step(60)
    running = [name for name in "abcdef" if worker.turns(name)]
    assert running == ["a", "b", "c", "d"], "three are parked in 16 bytes each"
    assert worker.scheduler.num_waiting == 2
    before = {name: worker.turns(name) for name in running}
    worker.step(60)
    assert all(worker.turns(name) > before[name] for name in running), "the others still take turns"
    worker.end("a")
    worker.step(30)
    assert worker.turns("e") == 0
    worker.end("b")
    worker.end("c")
    worker.step(30)
    assert worker.turns("e") > 0


def test_one_that_waits_for_host_memory_does_not_keep_the_parked_away() -> None:
    worker = Worker(host=64)
    worker.open("a", host=32)
    worker.open("b")
    worker.step(4)
    worker.open("c", host=32)
    worker.step(40)
    assert worker.turns("c") == 0
    assert min(worker.turns("a"), worker.turns("b")) > 9
    worker.end("a")
    worker.end("b")
    worker.step(4)
    assert worker.turns("c") > 0


@pytest.mark.parametrize("place", [Place.DEVICE, Place.LEAVING, Place.PARKED, Place.COMING])
def test_ending_anywhere_gives_everything_back(place: Place) -> None:
    worker = Worker(move_steps=2)
    worker.open("a", n=1)
    worker.open("b")
    worker.step()
    while worker.places("a") != [place]:
        worker.step()
    assert worker.scheduler.end_choice(Choice("a", 0))
    worker.moving.pop("a", None)
    worker.scheduler.check_integrity()
    worker.step(3)
    worker.end("b")
    assert worker.scheduler.pool.used_bytes == worker.scheduler.host.used_bytes == 0


def test_one_that_host_memory_does_not_take_after_all_stays() -> None:
    worker = Worker(host=20)
    worker.open("a")
    worker.open("b")
    worker.step(3)
    worker.scheduler.admit()
    assert worker.places("a") == [Place.LEAVING]
    assert not worker.tiers.resize("a", 24)
    worker.tiers.stay("a")
    worker.scheduler.check_integrity()
    assert worker.scheduler.host.used_bytes == 0
    worker.step(2)
    assert worker.turns("a") == 5


@pytest.mark.parametrize(
    ("values", "named"),
    [({"time_slice": 0}, "kv_time_slice_steps"), ({"ahead": 0}, "ahead")],
)
def test_a_policy_that_makes_no_sense_is_refused(values: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        TierPolicy(**values)
