"""What requests have reserved in the ledgers of a decode worker's memories. Free of torch; see `pages`.

A request's prompt, and its values in host memory, are held by the reception of its layers, then by every live choice;
a tail by its choice. What is away from the device, or in the store, has given its regions there back.
"""

from __future__ import annotations

from collections.abc import Collection

from ...errors import InvalidRequest
from .pages import Demand, PagePool, Region


class Holdings:
    """Reserves and frees what a request may take.

    Args:
        pool: the device's ledger.
        host: that of host memory; None = there is none, and no demand for it.
    """

    def __init__(self, pool: PagePool, host: PagePool | None) -> None:
        self._pool, self._host = pool, host

    def check_fits(self, demand: Demand) -> None:
        """Raises `InvalidRequest` for a request that the empty memories do not hold either."""
        if demand.total_bytes > self._pool.capacity_bytes:
            raise InvalidRequest(
                "num_prompt_tokens",
                f"the caches may take {demand.total_bytes} bytes ({demand.prompt_bytes} for the prompt, "
                f"{demand.num_choices} x {demand.tail_bytes} for the answers)",
                f"at most {self._pool.capacity_bytes} bytes; less with a shorter prompt, fewer tokens or choices",
            )
        if self._host is not None and demand.host_bytes > self._host.capacity_bytes:
            raise InvalidRequest(
                "num_prompt_tokens",
                f"the prompt's values may take {demand.host_bytes} bytes of host memory",
                f"at most {self._host.capacity_bytes} bytes; less with a shorter prompt",
            )

    def shortage(self, demand: Demand) -> str:
        """What a request needs, and what there is."""
        needs = _shortage(demand.total_bytes, self._pool)
        return (
            needs if self._host is None else f"{needs}, and of host memory {_shortage(demand.host_bytes, self._host)}"
        )

    def has_room(self, demand: Demand) -> bool:
        """Whether both memories have what a request needs."""
        return self.has_host_room(demand) and demand.total_bytes <= self._pool.free_bytes

    def has_host_room(self, demand: Demand) -> bool:
        """Whether host memory has room for its values."""
        return self._host is None or demand.host_bytes <= self._host.free_bytes

    def let_in(self, request_id: str, demand: Demand) -> None:
        """Reserve all that a request will ever need; there is room."""
        reserved = self._pool.reserve(demand.regions(request_id))
        if self._host is not None and demand.host_bytes:
            reserved = self._host.reserve({Region(request_id): demand.host_bytes}) and reserved
        assert reserved, "there was room"

    def start(self, request_id: str, demand: Demand, live: Collection[int]) -> None:
        """Reception has ended: its choices hold the prompt, and the tails of those not live are freed."""
        for index in range(demand.num_choices):
            if index not in live:
                self._pool.release(Region(request_id, index))
        for pool in self._pools(demand):
            for _ in live:
                pool.retain(Region(request_id))
            pool.release(Region(request_id))

    def end_reception(self, request_id: str, demand: Demand) -> None:
        """A request ends before it has started."""
        self.start(request_id, demand, ())

    def end_choice(self, request_id: str, demand: Demand, index: int, on_device: bool, on_host: bool) -> None:
        """A live choice ends: free what it alone held, where it has something."""
        if on_device:
            self._pool.release(Region(request_id, index))
            self._pool.release(Region(request_id))
        if on_host and self._host is not None and demand.host_bytes:
            self._host.release(Region(request_id))

    def leave_device(self, request_id: str, live: Collection[int]) -> None:
        """A request is away from the device."""
        for index in live:
            self._pool.release(Region(request_id, index))
            self._pool.release(Region(request_id))

    def enter_device(self, request_id: str, demand: Demand, live: Collection[int]) -> None:
        """It is to come back; there is room."""
        tails = {Region(request_id, index): demand.tail_bytes for index in live}
        assert self._pool.reserve({Region(request_id): demand.prompt_bytes} | tails), "there was room"
        for _ in range(len(live) - 1):
            self._pool.retain(Region(request_id))

    def leave_host(self, request_id: str, demand: Demand, live: Collection[int]) -> None:
        """Its values are away from host memory, too."""
        if self._host is not None and demand.host_bytes:
            for _ in live:
                self._host.release(Region(request_id))

    def enter_host(self, request_id: str, demand: Demand, live: Collection[int]) -> None:
        """Its values are to come back there; there is room."""
        if self._host is not None and demand.host_bytes:
            assert self._host.reserve({Region(request_id): demand.host_bytes}), "there was room"
            for _ in range(len(live) - 1):
                self._host.retain(Region(request_id))

    def _pools(self, demand: Demand) -> list[PagePool]:
        """The ledgers that have a region of the prompt."""
        return [self._pool, self._host] if self._host is not None and demand.host_bytes else [self._pool]


def _shortage(wanted: int, pool: PagePool) -> str:
    return f"{wanted} bytes, {pool.free_bytes} of {pool.capacity_bytes} are free"
