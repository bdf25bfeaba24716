"""Who goes on from host memory to the store, and who comes back, without a model or a store."""

from __future__ import annotations

import pytest

from kvsluice.errors import ConfigError
from kvsluice.services.decode.overflow import OverflowPolicy
from kvsluice.services.decode.pages import PagePool
from kvsluice.services.decode.scheduler import Demand, Scheduler, Turns
from kvsluice.services.decode.tiers import Place, TierPolicy, Tiers

SIZE = 16  # of host memory that a parked request takes


class Worker:
    """A scheduler whose moves between device and host are done by the next step, and those of the store when told.

    Args:
        room: bytes of the device; a request takes 15.
        host: bytes of host memory.
    """

    def __init__(self, room: int = 15, host: int = 100, time_slice: int = 2, **overflow) -> None:
        self.scheduler = Scheduler(PagePool(room), 8, 99, PagePool(host))
        self.now_s = 0.0
        policy = TierPolicy(time_slice, overflow=OverflowPolicy(**{"store_bytes": 1000} | overflow))
        self.tiers = self.scheduler.tiers = Tiers(self.scheduler.pool, self.scheduler.host, policy, 4)
        self.overflow = self.tiers.overflow
        self.overflow.is_attached = True
        self.overflow._clock = lambda: self.now_s
        self.ran: list[str] = []

    def open(self, names: str, credits: int | None = None, host: int = 0) -> None:
        for name in names:
            self.scheduler.enqueue(name, Demand(10, 5, 1, host), credits)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            for name in self.tiers.at(Place.LEAVING):
                self.tiers.resize(name, SIZE)
                self.scheduler.left(name, 15)
            for name in self.tiers.at(Place.COMING):
                self.tiers.came(name, 15)
            for name in self.scheduler.admit():
                self.scheduler.start(name, {0: Turns()})
            self.begin_moves()
            self.ran += [choice.request_id for choice in self.scheduler.next_batch()]
            self.scheduler.check_integrity()

    def begin_moves(self) -> None:
        self.scheduler.fetch()
        self.scheduler.spill()

    def store_works(self) -> None:
        for name in self.tiers.at(Place.FETCHING):
            self.overflow.fetched(name)
        for name in self.tiers.at(Place.STORING):
            self.scheduler.stored(name)
        self.scheduler.check_integrity()

    def run(self, count: int) -> None:
        for _ in range(count):
            self.step()
            self.store_works()

    def at(self, *places: Place) -> str:
        return "".join(sorted(self.tiers.at(*places)))


def test_below_the_high_watermark_nothing_moves() -> None:
    worker = Worker()
    worker.open("abcde")
    worker.run(60)
    assert worker.overflow.counts.writes == 0, "four are parked, and one more while they change: 80 of 100 bytes"
    assert worker.scheduler.num_waiting == 0


def test_those_that_wait_for_their_clients_go_first_the_longest_first() -> None:
    worker = Worker(high=0.7, low=0.5, ahead=4)
    worker.open("abcde", credits=1)
    worker.run(20)
    assert worker.at(Place.PARKED, Place.STORED) == "abcd", "e waits on the device, which nobody wants"
    assert worker.at(Place.STORED) == "", "64 of 100 bytes"
    worker.open("f")
    worker.run(3)
    assert worker.at(Place.STORED) == "ab", "80 is above 70; they ran longest ago, and 48 is below 50"
    worker.run(20)
    assert worker.at(Place.STORED) == "ab"
    worker.scheduler.grant("a", 1)
    worker.begin_moves()
    assert worker.at(Place.FETCHING) == "a"
    worker.run(10)
    assert worker.ran.count("a") == 2
    assert worker.overflow.counts.reads == 1


@pytest.mark.parametrize(("host", "count"), [(40, 9), (56, 12)])
def test_everyone_has_a_share_of_what_the_store_lets_in(host: int, count: int) -> None:
    worker = Worker(host=host)
    names = "abcdefghijklmnop"[:count]
    worker.open(names)
    worker.run(100)
    before = {name: worker.ran.count(name) for name in names}
    assert worker.scheduler.num_waiting == 0
    worker.run(900)
    shares = [worker.ran.count(name) - before[name] for name in names]
    assert min(shares) > 0.6 * sum(shares) / count
    assert worker.overflow.counts.reads > count
    for name in names:
        worker.scheduler.end_request(name)
    assert worker.scheduler.host.used_bytes == worker.scheduler.pool.used_bytes == worker.overflow.used_bytes == 0


def test_no_step_waits_for_the_store() -> None:
    worker = Worker(host=40)
    worker.open("abcdefgh")
    worker.run(100)
    stored = worker.at(Place.STORED, Place.STORING, Place.FETCHING)
    assert stored
    before = len(worker.ran)
    worker.step(60)  # the store does nothing meanwhile
    assert len(worker.ran) - before >= 30, "the others take turns"
    # what it has not brought yet is not run
    assert not set(worker.ran[before:]) & set(worker.at(Place.STORED, Place.FETCHING))


def test_no_more_goes_than_the_store_may_hold() -> None:
    worker = Worker(host=40, store_bytes=3 * SIZE)
    worker.open("abcdefghij")
    worker.run(300)
    assert SIZE <= worker.overflow.used_bytes <= 3 * SIZE
    assert worker.scheduler.num_waiting > 0, "others wait to be let in, as without a store"
    assert len(set(worker.ran[-60:])) >= 4, "those that are in take turns"


def test_a_store_that_fails_is_left_alone_for_a_while() -> None:
    worker = Worker(host=40, retry_s=5.0, loss_pause_s=60.0)
    worker.open("abcdefgh")
    while not worker.at(Place.STORING):
        worker.step()
    worker.overflow.refused(worker.at(Place.STORING)[0])
    worker.run(50)
    assert worker.at(Place.STORING, Place.STORED) == ""
    worker.now_s = 6.0
    worker.run(50)
    assert worker.at(Place.STORED)
    worker.overflow.lost()
    assert not worker.overflow.takes
    worker.now_s = 67.0
    assert worker.overflow.takes
    assert worker.overflow.counts.failures == 2


def test_values_go_and_come_with_their_request() -> None:
    worker = Worker(host=64)
    worker.open("abcd", host=8)
    worker.run(200)
    assert worker.scheduler.num_waiting == 0
    assert worker.overflow.counts.bytes_down == worker.overflow.counts.writes * (SIZE + 8)
    assert min(worker.ran.count(name) for name in "abcd") > 5


def test_one_that_has_something_to_do_again_stays_where_there_is_room() -> None:
    worker = Worker(high=0.5, low=0.4)
    worker.open("abcde", credits=1)
    worker.step(30)
    name = worker.at(Place.STORING)[0]
    for other in set("abcde") - {name}:
        worker.scheduler.end_request(other)
    worker.scheduler.grant(name, 5)
    worker.scheduler.admit()
    assert not worker.scheduler.stored(name)
    worker.run(10)
    assert worker.ran.count(name) == 6
    assert worker.overflow.counts.writes == 0


@pytest.mark.parametrize(
    ("values", "named"),
    [({"store_bytes": -1}, "store_offloading_bytes"), ({"low": 0.95}, "watermarks"), ({"ahead": 0}, "ahead")],
)
def test_a_policy_that_makes_no_sense_is_refused(values: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        OverflowPolicy(**values)
