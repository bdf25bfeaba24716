"""Which parked requests go on from host memory to the store, and which come back. Pure policy, free of torch and of
clocks of its own.

    host memory   0 ──────────────── low ─────── high ── capacity
                     to here they go  <───────────┘ above it, or where somebody waits for room

What goes:

- first those that wait for their clients, the one that ran longest ago before the others;
- then, where that is not enough, those that wait for their turn, the one that came last before the others: it waits
  longest. For one that is to come back from the store, only such make room as are behind it in the line.

What comes back: whoever has something to do, in the order of the line for the device, as soon as host memory takes it
below the high watermark. So what is on the device came from host memory, and no step waits for the store: who is there
is passed by in the line. `ahead` requests at most are on their way in each direction.

A store that fails a write takes nothing for `retry_s`, one that has lost something for `loss_pause_s`; requests stay
where they are then, and what lies there is still read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ...errors import ConfigError
from .pages import PagePool
from .stays import IN_STORE, Place, Stays, parked_region


@dataclass(frozen=True)
class OverflowPolicy:
    """How host memory is shared with the store.

    Attributes:
        store_bytes: that parked requests may take there; 0 = none go there.
        high, low: watermarks, as shares of host memory.
        ahead: requests that are on their way at once, in each direction.
        retry_s: how long nothing more is written after a write that failed.
        loss_pause_s: the same after a request that did not come back, which cost its prompt.
    """

    store_bytes: int = 0
    high: float = 0.9
    low: float = 0.8
    ahead: int = 2
    retry_s: float = 5.0
    loss_pause_s: float = 60.0

    def __post_init__(self) -> None:
        if self.store_bytes < 0:
            raise ConfigError(f"store_offloading_bytes: got {self.store_bytes}; allowed: at least 0")
        if not 0 < self.low <= self.high <= 1:
            raise ConfigError(f"host watermarks: got {self.low} and {self.high}; allowed: 0 < low <= high <= 1")
        if self.ahead < 1:
            raise ConfigError(f"ahead: got {self.ahead}; allowed: at least 1")


@dataclass
class OverflowCounts:
    """What has moved so far.

    Attributes:
        writes, reads: requests that went to the store, and that came back.
        bytes_down, bytes_up: that moved, of those.
        failures: moves that the store failed.
    """

    writes: int = 0
    reads: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    failures: int = 0


class Overflow:
    """Who moves between host memory and the store. Values of a prompt go and come with their request.

    Args:
        stays: places of running requests.
        host: the ledger of host memory.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        stays: Stays,
        host: PagePool,
        policy: OverflowPolicy,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.policy = policy
        self.counts = OverflowCounts()
        self.is_attached = False
        self._stays, self._host, self._clock = stays, host, clock
        self._closed_until_s = -float("inf")
        self._goal_bytes: int | None = None  # of host memory in use, that somebody waits for
        self._behind = -1  # only those of the line that came after it make room

    @property
    def used_bytes(self) -> int:
        """Of the store, by requests that lie there or are on the way."""
        return sum(stay.away_bytes for _, stay in self._stays.items() if stay.place in IN_STORE)

    @property
    def takes(self) -> bool:
        """Whether requests may go to the store now."""
        return self.is_attached and bool(self.policy.store_bytes) and self._clock() >= self._closed_until_s

    def spare_bytes(self, largest: int) -> int:
        """By how much more all requests may take away from the device for what the store holds, or would.

        Args:
            largest: bytes of a request that is to be let in. Room for `ahead` of those is left in the store, or they
                could not change places with those in host memory.
        """
        stays = [stay for _, stay in self._stays.items()]
        values = sum(stay.values_bytes for stay in stays if stay.place is Place.STORED)
        if not self.takes:
            return max(0, self.used_bytes - values)
        largest = max(largest, *(stay.away_bytes for stay in stays), 0)
        return max(0, self.policy.store_bytes - values - self.policy.ahead * largest)

    def forget_wishes(self) -> None:
        """Who waits for host memory is asked anew."""
        self._goal_bytes, self._behind = None, -1

    def want(self, nbytes: int, since: int = -1) -> None:
        """Somebody waits for so many bytes of host memory.

        Args:
            since: his stamp, where those before him in the line need not make room.
        """
        goal = max(0, self._host.capacity_bytes - nbytes)
        self._behind = since if self._goal_bytes is None else min(self._behind, since)
        self._goal_bytes = goal if self._goal_bytes is None else min(self._goal_bytes, goal)

    def spill(self, has_turn: Callable[[str], bool]) -> list[str]:
        """Requests that begin to go to the store now."""
        if not self.takes:
            return []
        under_way = self._stays.at(Place.STORING)
        freed = sum(self._stays[request_id].away_bytes for request_id in under_way)
        freed += sum(self._stays[request_id].parked_bytes for request_id in self._stays.at(Place.COMING))
        used = self._host.used_bytes - freed
        capacity, policy = self._host.capacity_bytes, self.policy
        goal = int(policy.low * capacity) if used > policy.high * capacity else capacity
        goal = goal if self._goal_bytes is None else min(goal, self._goal_bytes)
        room, going = policy.store_bytes - self.used_bytes, list[str]()
        for request_id in self._in_turn(has_turn):
            size = self._stays[request_id].away_bytes
            if used <= goal or len(under_way) + len(going) >= policy.ahead:
                break
            if size <= room:
                self._stays.move(request_id, Place.PARKED, Place.STORING)
                going.append(request_id)
                used, room = used - size, room - size
        return going

    def written(self, request_id: str, has_turn: bool) -> bool:
        """A request that was to go is in the store. False = host memory has room again meanwhile and it has something
        to do, so it stays, and what was written is of no use; else its host memory is freed, but for the values, which
        are the caller's to free."""
        enough = self._goal_bytes is None and self._host.used_bytes <= self.policy.low * self._host.capacity_bytes
        if has_turn and enough:
            self._stays.move(request_id, Place.STORING, Place.PARKED)
            return False
        stay = self._stays.move(request_id, Place.STORING, Place.STORED)
        self._host.release(parked_region(request_id))
        self.counts.writes += 1
        self.counts.bytes_down += stay.away_bytes
        return True

    def refused(self, request_id: str) -> None:
        """The store did not take a request: it stays where it is."""
        self._stays.move(request_id, Place.STORING, Place.PARKED)
        self.counts.failures += 1
        self._closed_until_s = self._clock() + self.policy.retry_s

    def fetch(self, has_turn: Callable[[str], bool]) -> list[str]:
        """Requests that begin to come back now; host memory is reserved for them, but for the values, which is the
        caller's to do."""
        coming: list[str] = []
        stored = [request_id for request_id in self._stays.at(Place.STORED) if has_turn(request_id)]
        num_under_way = len(self._stays.at(Place.FETCHING))
        claimed = 0  # by values of those that come
        for request_id in sorted(stored, key=lambda one: self._stays[one].since):
            if num_under_way + len(coming) == self.policy.ahead:
                break
            stay = self._stays[request_id]
            used = self._host.used_bytes + claimed
            if not self._fits(used, stay.away_bytes):
                margin = self._host.capacity_bytes - int(self.policy.high * self._host.capacity_bytes)
                self.want(stay.away_bytes + margin, stay.since)
                break
            reserved = self._host.reserve({parked_region(request_id): stay.parked_bytes})
            assert reserved, "there was room"
            claimed += stay.values_bytes
            self._stays.move(request_id, Place.STORED, Place.FETCHING)
            coming.append(request_id)
        return coming

    def fetched(self, request_id: str) -> None:
        """A request is back in host memory."""
        stay = self._stays.move(request_id, Place.FETCHING, Place.PARKED)
        self.counts.reads += 1
        self.counts.bytes_up += stay.away_bytes

    def lost(self) -> None:
        """A request did not come back."""
        self.counts.failures += 1
        self._closed_until_s = max(self._closed_until_s, self._clock() + self.policy.loss_pause_s)

    def check_integrity(self) -> None:
        """Assert that the store holds no more than it may."""
        assert self.used_bytes <= self.policy.store_bytes, "parked requests take no more of the store than they may"

    def _fits(self, used: int, nbytes: int) -> bool:
        if used + nbytes <= self.policy.high * self._host.capacity_bytes:
            return True
        # a request larger than the watermark leaves comes when nobody else is parked
        others = self._stays.at(Place.PARKED, Place.LEAVING, Place.COMING, Place.STORING, Place.FETCHING)
        return not others and used + nbytes <= self._host.capacity_bytes

    def _in_turn(self, has_turn: Callable[[str], bool]) -> Iterator[str]:
        """Requests that may go, the first one first."""
        parked = [(request_id, self._stays[request_id]) for request_id in self._stays.at(Place.PARKED)]
        waiting = [(stay.last_step, one) for one, stay in parked if not has_turn(one)]
        in_line = [(-stay.since, one) for one, stay in parked if has_turn(one) and stay.since > self._behind]
        for _, request_id in (*sorted(waiting), *sorted(in_line)):
            yield request_id
