"""Where running requests lie, and since when. Pure bookkeeping, free of torch.

                leave                left                  come                 came
    (start) DEVICE ───> LEAVING ───────────────> PARKED ──────────> COMING ──────────────> DEVICE
              ^            │ stay                 │ ^ ^
              └────────────┘               spill  │ │ │ fetched
                                                  v │ │
                                      STORING ──────┘ └───── FETCHING
                                         │   kept               ^
                                 written └────────> STORED ─────┘ fetch

    place      reserved on the device   in host memory   in the store   runs
    DEVICE     yes                      values           no             yes
    LEAVING    yes                      yes              no             no; a step under way is settled first
    PARKED     no                       yes              no             no
    COMING     yes                      yes              no             no
    STORING    no                       yes              yes            no
    STORED     no                       no               yes            no
    FETCHING   no                       yes              yes            no

`tiers` decides between the device and host memory, `overflow` between host memory and the store. What moves between
those two keeps its place in the line for the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from .pages import Region


class Place(Enum):
    """Where a running request lies."""

    DEVICE = "device"
    LEAVING = "leaving"
    PARKED = "parked"
    COMING = "coming"
    STORING = "storing"
    STORED = "stored"
    FETCHING = "fetching"


ON_DEVICE = frozenset({Place.DEVICE, Place.LEAVING, Place.COMING})
PARKED_ON_HOST = frozenset(Place) - {Place.DEVICE, Place.STORED}
IN_STORE = frozenset({Place.STORING, Place.STORED, Place.FETCHING})


@dataclass
class Stay:
    """A running request.

    Attributes:
        since: stamp of its last change between the device and host memory.
        values_bytes: of the prompt's values that lie in host memory wherever else it runs from.
        parked_bytes: of host memory that it takes, or took last, besides those.
        served: steps that it had since it came.
        last_step: number of the last of them.
        left_at: number of the step that it left before.
    """

    place: Place
    since: int
    values_bytes: int = 0
    parked_bytes: int = 0
    served: int = 0
    last_step: int = -1
    left_at: int = 0

    @property
    def away_bytes(self) -> int:
        """Of host memory, or of the store, that all of it takes while it is away from the device."""
        return self.values_bytes + self.parked_bytes


class Stays:
    """The places of running requests, by id."""

    def __init__(self) -> None:
        self._stays: dict[str, Stay] = {}
        self._clock = 0

    def __getitem__(self, request_id: str) -> Stay:
        return self._stays[request_id]

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._stays

    def stamp(self) -> int:
        """A number above all that were given before."""
        self._clock += 1
        return self._clock

    def add(self, request_id: str, values_bytes: int) -> None:
        """A request runs from now on, on the device."""
        self._stays[request_id] = Stay(Place.DEVICE, self.stamp(), values_bytes)

    def remove(self, request_id: str) -> Stay:
        """A request has ended."""
        return self._stays.pop(request_id)

    def items(self) -> Iterable[tuple[str, Stay]]:
        """All of them, as they are now; any thread may ask."""
        return list(self._stays.items())

    def at(self, *places: Place) -> list[str]:
        """Requests that lie in one of these places; any thread may ask."""
        return [request_id for request_id, stay in self.items() if stay.place in places]

    def move(self, request_id: str, origin: Place, to: Place) -> Stay:
        """Change a place; where the device is left or reached, the time of it as well."""
        stay = self._stays[request_id]
        assert stay.place is origin, f"{request_id} goes from {origin.value} to {to.value}, it is {stay.place.value}"
        if not IN_STORE & {origin, to}:
            stay.since = self.stamp()
        stay.place = to
        return stay


def parked_region(request_id: str) -> Region:
    """What a request that is away from the device takes of host memory."""
    return Region(request_id, parked=True)
