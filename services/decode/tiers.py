"""Which running requests lie on the device and which are parked in host memory. Pure policy, free of torch.

A worker lets more requests run than its device holds. They take turns there: a time slice on the device, then out of
the way of the next one. All of a request's choices move together.

                 leave                left                  come                 came
    (start) DEVICE ───> LEAVING ───────────────> PARKED ──────────> COMING ──────────────> DEVICE
              ^            │ stay (no room for it in host memory)
              └────────────┘

    place      reserved on the device   reserved in host memory   runs
    DEVICE     yes                      no                        yes
    LEAVING    yes                      yes                       no; a step that is under way is settled first
    PARKED     no                       yes                       no
    COMING     yes                      yes                       no

Room goes to who has waited longest, parked or not yet let in; nothing that came later passes. Where there is too
little, others have to leave:

- those that wait for their clients first, the one that ran longest ago before the others;
- then those that have had their time slice, the one with most steps since it came before the others, and of as many
  the largest.

A request that is parked and waits for its client stays where it is. Every request that has something to do comes back,
as those before it in line have their slices or end. Requests are let in as long as what the device does not hold of all
of them, and the values that lie in host memory, stay below its high watermark; once one has had to wait for that, none
is until they are below the low one. What is left serves the turns of those that are in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from ...errors import ConfigError
from .pages import PagePool, Region


class Place(Enum):
    """Where a running request lies."""

    DEVICE = "device"
    LEAVING = "leaving"
    PARKED = "parked"
    COMING = "coming"


class Room(Enum):
    """What came of asking for room."""

    MADE = "made"
    LATER = "later"  # too many still have their time slice
    HOST_IS_FULL = "host is full"


@dataclass(frozen=True)
class TierPolicy:
    """How the device is shared in time.

    Attributes:
        time_slice: steps that a request may have on the device before it has to make room, at least 1. Moving a request
            costs about as much as a step or two, so some dozens keep that small.
        high, low: watermarks, as shares of host memory.
        ahead: requests that room is made for at once: while one is on its way, room is made for the next.
    """

    time_slice: int = 128
    high: float = 0.9
    low: float = 0.8
    ahead: int = 2

    def __post_init__(self) -> None:
        if self.time_slice < 1:
            raise ConfigError(f"kv_time_slice_steps: got {self.time_slice}; allowed: at least 1")
        if not 0 < self.low <= self.high <= 1:
            raise ConfigError(f"host watermarks: got {self.low} and {self.high}; allowed: 0 < low <= high <= 1")
        if self.ahead < 1:
            raise ConfigError(f"ahead: got {self.ahead}; allowed: at least 1")


@dataclass
class TierCounts:
    """What has moved so far.

    Attributes:
        preemptions: requests that left the device before their end.
        resumes: those that came back.
        bytes_down, bytes_up: that moved, of requests that arrived.
        parked_steps: steps that others had while requests were away, over all that came back.
    """

    preemptions: int = 0
    resumes: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    parked_steps: int = 0


@dataclass
class Stay:
    """A running request.

    Attributes:
        since: stamp of its last change of place.
        served: steps that it had since it came.
        last_step: number of the last of them.
        left_at: number of the step that it left before.
    """

    place: Place
    since: int
    served: int = 0
    last_step: int = -1
    left_at: int = 0


class Tiers:
    """Places of running requests, and who has to move.

    Args:
        pool, host: the ledgers of both memories.
        page_nbytes: what host memory is taken in.
    """

    def __init__(self, pool: PagePool, host: PagePool, policy: TierPolicy, page_nbytes: int) -> None:
        self.policy = policy
        self.counts = TierCounts()
        self._pool = pool
        self._host = host
        self._page_nbytes = page_nbytes
        self._stays: dict[str, Stay] = {}
        self._clock = 0  # stamps
        self._steps = 0
        self._is_full = False

    def stamp(self) -> int:
        """A number above all that were given before."""
        self._clock += 1
        return self._clock

    def start(self, request_id: str) -> None:
        """A request runs from now on, on the device."""
        self._stays[request_id] = Stay(Place.DEVICE, self.stamp())

    def end(self, request_id: str) -> None:
        """A request has ended, wherever it lies; its device memory is the caller's to free."""
        stay = self._stays.pop(request_id)
        if stay.place is not Place.DEVICE:
            self._host.release(_parked(request_id))

    def place(self, request_id: str) -> Place:
        """Where a running request lies."""
        return self._stays[request_id].place

    def is_parked(self, request_id: str) -> bool:
        """Whether a request is a running one that is on the host alone."""
        stay = self._stays.get(request_id)
        return stay is not None and stay.place is Place.PARKED

    def since(self, request_id: str) -> int:
        """Stamp of a running request's last change of place."""
        return self._stays[request_id].since

    def at(self, place: Place) -> list[str]:
        """Requests that lie in a place."""
        return [request_id for request_id, stay in list(self._stays.items()) if stay.place is place]

    def ran(self, request_ids: set[str]) -> None:
        """A step of these requests is launched."""
        self._steps += 1
        for request_id in request_ids:
            stay = self._stays[request_id]
            stay.served += 1
            stay.last_step = self._steps

    def resize(self, request_id: str, nbytes: int) -> bool:
        """Say how many bytes a leaving request takes in host memory; False when there is no room for them."""
        assert self.place(request_id) is Place.LEAVING, "what moves is reserved for"
        region = _parked(request_id)
        self._host.release(region)
        if self._host.reserve({region: self._rounded(nbytes)}):
            return True
        self._host.reserve({region: 0})
        return False

    def stay(self, request_id: str) -> None:
        """A leaving request does not leave, and has another time slice."""
        self._host.release(_parked(request_id))
        self._move(request_id, Place.LEAVING, Place.DEVICE).served = 0

    def left(self, request_id: str, nbytes: int) -> None:
        """A leaving request is in host memory; its device memory is the caller's to free."""
        self._move(request_id, Place.LEAVING, Place.PARKED).left_at = self._steps
        self.counts.preemptions += 1
        self.counts.bytes_down += nbytes

    def come(self, request_id: str) -> None:
        """A parked request begins to come; its device memory is reserved by the caller."""
        self._move(request_id, Place.PARKED, Place.COMING)

    def came(self, request_id: str, nbytes: int) -> None:
        """A request that comes is on the device."""
        stay = self._move(request_id, Place.COMING, Place.DEVICE)
        stay.served = 0
        self._host.release(_parked(request_id))
        self.counts.resumes += 1
        self.counts.bytes_up += nbytes
        self.counts.parked_steps += self._steps - stay.left_at

    def make_room(
        self,
        nbytes: int,
        size_of: Callable[[str], int],
        is_paused: Callable[[str], bool],
    ) -> Room:
        """Have requests leave until `nbytes` more will be free than are now, or none.

        Args:
            size_of: bytes of the device that a running request has reserved.
            is_paused: whether a running request waits for others than the worker.
        """
        nbytes -= sum(size_of(request_id) for request_id in self.at(Place.LEAVING))
        room = self._host.free_bytes
        leaving: list[str] = []
        may_leave = 0
        for request_id in self._in_turn(size_of, is_paused):
            if nbytes <= 0:
                break
            size = size_of(request_id)
            may_leave += size
            if self._rounded(size) <= room:
                leaving.append(request_id)
                room -= self._rounded(size)
                nbytes -= size
                may_leave -= size
        if nbytes > 0:
            return Room.HOST_IS_FULL if may_leave >= nbytes else Room.LATER
        for request_id in leaving:
            self._host.reserve({_parked(request_id): self._rounded(size_of(request_id))})
            self._move(request_id, Place.DEVICE, Place.LEAVING)
        return Room.MADE

    def takes_more(self, nbytes: int, admitted: int) -> bool:
        """Whether one more request, of so many bytes of the device, may be let in beside those that are.

        Args:
            admitted: the same of all of them.
        """
        beyond = admitted - self._pool.capacity_bytes
        if beyond + nbytes <= 0:
            return True  # all have their place on the device
        values = self._host.used_bytes - sum(self.regions().values())
        low, high = (int(share * self._host.capacity_bytes) - values for share in (self.policy.low, self.policy.high))
        self._is_full = beyond > low if self._is_full else beyond + nbytes > high
        return not self._is_full

    def regions(self) -> dict[Region, int]:
        """What is reserved in host memory for requests that are not only on the device."""
        held = self._host.regions()
        return {_parked(r): held[_parked(r)] for r, stay in self._stays.items() if stay.place is not Place.DEVICE}

    def _in_turn(self, size_of: Callable[[str], int], is_paused: Callable[[str], bool]) -> Sequence[str]:
        """Requests that may leave, the first one first."""
        paused, served = [], []
        for request_id, stay in self._stays.items():
            if stay.place is not Place.DEVICE:
                continue
            if is_paused(request_id):
                paused.append((stay.last_step, -size_of(request_id), request_id))
            elif stay.served >= self.policy.time_slice:
                served.append((-stay.served, -size_of(request_id), request_id))
        return [entry[-1] for entry in (*sorted(paused), *sorted(served))]

    def _move(self, request_id: str, origin: Place, to: Place) -> Stay:
        stay = self._stays[request_id]
        assert stay.place is origin, f"{request_id} goes from {origin.value} to {to.value}, it is {stay.place.value}"
        stay.place, stay.since = to, self.stamp()
        return stay

    def _rounded(self, nbytes: int) -> int:
        return -(-nbytes // self._page_nbytes) * self._page_nbytes


def _parked(request_id: str) -> Region:
    return Region(request_id, parked=True)
