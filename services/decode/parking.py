"""Moving requests between the device and host memory, beside the steps.

    down   storages ──copies on a stream of their own──> pages of host memory; once they are there, the storages are
           emptied, which gives their memory back
    up     the storages are given memory, somewhere ──copies──> and once all is there, the pages are given back

A storage is emptied and filled in place, so every tensor that shows it, in whatever object, shows the same bits again;
addresses are others, which `SequenceCache.relocated` tells. Nothing waits for a copy: whether it is done is asked
between steps. Only where copies under way are dropped does work that comes later on the device wait for them, because
the memory that they read and write is free then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..staging import Event as DeviceEvent
from .host_pages import HostPages, TakenPages
from .offload import Offload, StoreTier
from .scheduler import Scheduler
from .sequence import RequestRun
from .stays import IN_STORE, Place
from .tiers import TierPolicy, Tiers

ALIGNMENT = 256  # of a storage in host memory


def storages_of(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """The storages behind tensors, each once, by an identity that emptying does not change."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in found}


@dataclass
class Saved:
    """State of a request in host memory.

    Attributes:
        storages: what it is of; emptied while it lies here alone.
        sizes: their bytes.
        pages: what it lies in; None = it is in the store.
        choices: that it is of.
    """

    storages: Mapping[int, torch.UntypedStorage]
    sizes: Mapping[int, int]
    pages: TakenPages | None
    choices: frozenset[int]

    @property
    def nbytes(self) -> int:
        """Bytes that were copied."""
        return sum(self.sizes.values())

    @property
    def room_nbytes(self) -> int:
        """Bytes of host memory that they lie in, one storage behind the other."""
        return sum(map(_aligned, self.sizes.values()))

    def parts(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Pieces of host memory, and the pieces of those storages that are not empty which belong there, uint8."""
        assert self.pages is not None, "what is copied lies in host memory"
        parts = []
        left = iter(self.pages.spans)
        span, at = next(left), 0
        for key, size in self.sizes.items():
            begin, is_there = 0, self.storages[key].nbytes() > 0
            own = torch.empty(0, dtype=torch.uint8, device=device).set_(self.storages[key])
            while begin < size:
                if at == len(span):
                    span, at = next(left), 0
                count = min(size - begin, len(span) - at)
                if is_there:
                    parts.append((span[at : at + count], own[begin : begin + count]))
                begin, at = begin + count, at + count
            at += _aligned(size) - size
            while at > len(span):
                at -= len(span)
                span = next(left)
        return parts


class CopyStream:
    """Copies in one direction that are under way, on a stream of their own.

    Args:
        device: where the storages are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def run(self, targets: list[Tensor], sources: list[Tensor]) -> torch.cuda.Event | None:
        """Copy behind all that the calling thread has given the device so far. Returns when it is done; None = now."""
        if self._stream is None:
            torch._foreach_copy_(targets, sources)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            torch._foreach_copy_(targets, sources, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        return done


class Parking:
    """Moves requests as the scheduler's tiers say, which it has from here.

    Args:
        scheduler: of no request yet.
        runs: running requests.
        fail: ends a request by an error.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        policy: TierPolicy,
        host: HostPages,
        device: torch.device,
        runs: Mapping[str, RequestRun],
        fail: Callable[[str, Exception], object],
    ) -> None:
        self._scheduler = scheduler
        assert scheduler.host is not None, "there is host memory, and its ledger"
        self._tiers = scheduler.tiers = Tiers(scheduler.pool, scheduler.host, policy, host.page_nbytes)
        self._host = host
        self._device = device
        self._runs = runs
        self._fail = fail
        self._down, self._up = CopyStream(device), CopyStream(device)
        self._saved: dict[str, Saved] = {}
        self._under_way: dict[str, torch.cuda.Event | None] = {}
        self._offload: Offload | None = None

    def use_store(self, store: StoreTier, mark: Callable[[], DeviceEvent | None]) -> None:
        """From now on parked requests may move on to a store.

        Args:
            mark: a point behind all that the calling thread has given the device.
        """
        self._offload = Offload(self._scheduler, self._host, self._runs, self._saved, store, mark, self._fail)
        self._tiers.overflow.is_attached = True

    def overflow(self) -> None:
        """Begin those moves to the store, and from it, that are due."""
        if self._offload is not None:
            self._offload.move()

    @property
    def held_bytes(self) -> int:
        """Bytes of host memory that are taken."""
        return sum(_num_pages(saved) for saved in self._saved.values()) * self._host.page_nbytes

    def move(self, in_flight: Collection[str], admit: Callable[[], list[str]]) -> list[str]:
        """Settle the copies that are done, and begin those that are due. Call it where the device finds everything
        that was packed ahead.

        Args:
            in_flight: requests of a step that is not settled, which stay.
            admit: lets others in, and says who is to move.

        Returns:
            what `admit` does.
        """
        for request_id in list(self._under_way):
            self._guarded(request_id, self._finish)
        admitted = admit()
        for request_id in self._tiers.at(Place.LEAVING):
            if request_id not in self._under_way and request_id not in in_flight:
                self._guarded(request_id, self._leave)
        for request_id in self._tiers.at(Place.COMING):
            if request_id not in self._under_way:
                self._guarded(request_id, self._come)
        return admitted

    def wait(self) -> None:
        """Wait for a copy that is under way, if one is: there is nothing else to do."""
        done = next(iter(self._under_way.values()), None)
        if done is not None:
            done.synchronize()

    def drop(self, request_id: str) -> None:
        """A request has ended: forget what is here of it."""
        done = self._under_way.pop(request_id, None)
        if done is not None:
            torch.cuda.current_stream(self._device).wait_event(done)
        self._saved.pop(request_id, None)
        if self._offload is not None:
            self._offload.drop(request_id)

    def check_integrity(self) -> None:
        """Assert that what is here is what the tiers say."""
        coming = set(self._tiers.at(Place.COMING))
        parked = set(self._tiers.at(Place.PARKED, *IN_STORE))
        leaving = set(self._tiers.at(Place.LEAVING)) & set(self._under_way)
        assert set(self._saved) == parked | coming | leaving, "what is not on the device alone is in host memory"
        assert set(self._under_way) <= leaving | coming, "only what changes its place is copied"
        sizes = self._tiers.regions()
        for request_id, saved in self._saved.items():
            reserved = sum(size for region, size in sizes.items() if region.request_id == request_id)
            taken = _num_pages(saved) * self._host.page_nbytes
            assert taken == reserved, f"{request_id} is parked in {taken} bytes, {reserved} are reserved"
            if request_id in parked:
                assert not any(storage.nbytes() for storage in saved.storages.values()), (
                    "what is parked is nowhere else"
                )

    def _guarded(self, request_id: str, action: Callable[[str], None]) -> None:
        try:
            action(request_id)
        except Exception as exc:  # memory that is not to be had, or a device that has failed: this request's end
            self._fail(request_id, exc)

    def _leave(self, request_id: str) -> None:
        run = self._runs[request_id]
        storages = storages_of(run.tensors())
        sizes = {key: storage.nbytes() for key, storage in storages.items()}
        saved = Saved(storages, sizes, None, frozenset(run.choices))
        if not self._tiers.resize(request_id, saved.room_nbytes):
            self._tiers.stay(request_id)
            return
        saved.pages = self._host.take(-(-saved.room_nbytes // self._host.page_nbytes))
        parts = saved.parts(self._device)
        self._under_way[request_id] = self._down.run([host for host, _ in parts], [own for _, own in parts])
        self._saved[request_id] = saved

    def _come(self, request_id: str) -> None:
        run, saved = self._runs[request_id], self._saved[request_id]
        # a choice may have ended meanwhile, and what it alone held is not wanted any more
        wanted = saved.storages if saved.choices == run.choices.keys() else storages_of(run.tensors())
        for key, storage in wanted.items():
            storage.resize_(saved.sizes[key])
        parts = saved.parts(self._device)
        self._under_way[request_id] = self._up.run([own for _, own in parts], [host for host, _ in parts])

    def _finish(self, request_id: str) -> None:
        done = self._under_way[request_id]
        if done is not None and not done.query():  # type: ignore[no-untyped-call]
            return
        saved = self._saved[request_id]
        del self._under_way[request_id]
        if self._tiers.place(request_id) is Place.LEAVING:
            for storage in saved.storages.values():
                storage.resize_(0)
            self._scheduler.left(request_id, saved.nbytes)
            return
        if done is not None:
            torch.cuda.current_stream(self._device).wait_event(done)
        self._runs[request_id].relocated()
        del self._saved[request_id]
        self._tiers.came(request_id, sum(storage.nbytes() for storage in saved.storages.values()))


def _num_pages(saved: Saved) -> int:
    return 0 if saved.pages is None else len(saved.pages.views)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
