"""Which running requests lie on the device and which are parked in host memory. Pure policy, free of torch.

A worker lets more requests run than its device holds. They take turns there: a time slice on the device, then out of
the way of the next one. All of a request's choices move together. `stays` draws the places.

Room goes to who has waited longest, parked or not yet let in; nothing that came later passes. Where there is too
little, others have to leave:

- those that wait for their clients first, the one that ran longest ago before the others;
- then those that have had their time slice, the one with most steps since it came before the others, and of as many
  the largest.

A request that is parked and waits for its client stays where it is, or moves on to the store (`overflow`). Every
request that has something to do comes back, as those before it in line have their slices or end. Requests are let in as
long as what the device does not hold of all of them, and the values that lie in host memory, stay below its high
watermark, and beyond it by what the store takes; once one has had to wait for that, none is until they are below the
low one. What is left serves the turns of those that are in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from ...errors import ConfigError
from .overflow import Overflow, OverflowPolicy
from .pages import PagePool, Region
from .stays import ON_DEVICE, PARKED_ON_HOST, Place, Stays, parked_region

__all__ = ["Place", "Room", "TierCounts", "TierPolicy", "Tiers"]


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
        ahead: requests that room is made for at once: while one is on its way, room is made for the next.
        overflow: between host memory and the store; has the watermarks.
    """

    time_slice: int = 128
    ahead: int = 2
    overflow: OverflowPolicy = field(default_factory=OverflowPolicy)

    def __post_init__(self) -> None:
        if self.time_slice < 1:
            raise ConfigError(f"kv_time_slice_steps: got {self.time_slice}; allowed: at least 1")
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


class Tiers:
    """Places of running requests, and who has to move.

    Args:
        pool, host: the ledgers of both memories.
        page_nbytes: what host memory is taken in.
    """

    def __init__(self, pool: PagePool, host: PagePool, policy: TierPolicy, page_nbytes: int) -> None:
        self.policy = policy
        self.counts = TierCounts()
        self.stays = Stays()
        self.overflow = Overflow(self.stays, host, policy.overflow)
        self._pool = pool
        self._host = host
        self._page_nbytes = page_nbytes
        self._steps = 0
        self._is_full = False

    def start(self, request_id: str, values_bytes: int = 0) -> None:
        """A request runs from now on, on the device.

        Args:
            values_bytes: of the prompt's values in host memory.
        """
        self.stays.add(request_id, values_bytes)

    def end(self, request_id: str) -> None:
        """A request has ended, wherever it lies; its device memory is the caller's to free, and its values."""
        if self.stays.remove(request_id).place in PARKED_ON_HOST:
            self._host.release(parked_region(request_id))

    def place(self, request_id: str) -> Place:
        """Where a running request lies."""
        return self.stays[request_id].place

    def is_on_device(self, request_id: str) -> bool:
        """Whether a request has memory reserved there, if it was let in."""
        return request_id not in self.stays or self.place(request_id) in ON_DEVICE

    def is_stored(self, request_id: str) -> bool:
        """Whether a request is in the store alone."""
        return request_id in self.stays and self.place(request_id) is Place.STORED

    def since(self, request_id: str) -> int:
        """Stamp of a running request's last change between the device and host memory."""
        return self.stays[request_id].since

    def at(self, *places: Place) -> list[str]:
        """Requests that lie in one of these places."""
        return self.stays.at(*places)

    def ran(self, request_ids: set[str]) -> None:
        """A step of these requests is launched."""
        self._steps += 1
        for request_id in request_ids:
            stay = self.stays[request_id]
            stay.served += 1
            stay.last_step = self._steps

    def resize(self, request_id: str, nbytes: int) -> bool:
        """Say how many bytes a leaving request takes in host memory; False when there is no room for them."""
        assert self.place(request_id) is Place.LEAVING, "what moves is reserved for"
        region = parked_region(request_id)
        self._host.release(region)
        size = self._rounded(nbytes)
        if self._host.reserve({region: size}):
            self.stays[request_id].parked_bytes = size
            return True
        self._host.reserve({region: 0})
        return False

    def stay(self, request_id: str) -> None:
        """A leaving request does not leave, and has another time slice."""
        self._host.release(parked_region(request_id))
        self.stays.move(request_id, Place.LEAVING, Place.DEVICE).served = 0

    def left(self, request_id: str, nbytes: int) -> None:
        """A leaving request is in host memory; its device memory is the caller's to free."""
        stay = self.stays.move(request_id, Place.LEAVING, Place.PARKED)
        stay.left_at = self._steps
        self.counts.preemptions += 1
        self.counts.bytes_down += nbytes

    def come(self, request_id: str) -> None:
        """A parked request begins to come; its device memory is reserved by the caller."""
        self.stays.move(request_id, Place.PARKED, Place.COMING)

    def came(self, request_id: str, nbytes: int) -> None:
        """A request that comes is on the device."""
        stay = self.stays.move(request_id, Place.COMING, Place.DEVICE)
        stay.served = 0
        self._host.release(parked_region(request_id))
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
        may_leave = refused = 0
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
            else:
                refused = refused or self._rounded(size)
        if nbytes > 0:
            if may_leave < nbytes:
                return Room.LATER
            self.overflow.want(self._host.free_bytes - room + refused)
            return Room.HOST_IS_FULL
        for request_id in leaving:
            size = self._rounded(size_of(request_id))
            self._host.reserve({parked_region(request_id): size})
            self.stays.move(request_id, Place.DEVICE, Place.LEAVING).parked_bytes = size
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
        spare = self.overflow.spare_bytes(self._rounded(nbytes)) - values
        shares = (self.policy.overflow.low, self.policy.overflow.high)
        low, high = (int(share * self._host.capacity_bytes) + spare for share in shares)
        self._is_full = beyond > low if self._is_full else beyond + nbytes > high
        return not self._is_full

    def regions(self) -> dict[Region, int]:
        """What is reserved in host memory for requests that are away from the device, or on their way."""
        held = self._host.regions()
        return {parked_region(r): held[parked_region(r)] for r in self.stays.at(*PARKED_ON_HOST)}

    def _in_turn(self, size_of: Callable[[str], int], is_paused: Callable[[str], bool]) -> Sequence[str]:
        """Requests that may leave, the first one first."""
        paused, served = [], []
        for request_id, stay in self.stays.items():
            if stay.place is not Place.DEVICE:
                continue
            if is_paused(request_id):
                paused.append((stay.last_step, -size_of(request_id), request_id))
            elif stay.served >= self.policy.time_slice:
                served.append((-stay.served, -size_of(request_id), request_id))
        return [entry[-1] for entry in (*sorted(paused), *sorted(served))]

    def _rounded(self, nbytes: int) -> int:
        return -(-nbytes // self._page_nbytes) * self._page_nbytes
