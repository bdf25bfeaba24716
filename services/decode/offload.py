"""Moving parked requests from host memory to a store and back, beside the steps. Belongs to the engine's thread.

    down   pages of host memory ──> the store tier reads them, on threads of its own ──> told: they are there
           ──> the pages are given back
    up     pages are taken ──> the store tier brings piece after piece ──> told: that was all ──> parked again

What is moved are the bytes that the request lay in, those of its values included, so it comes back as what it was, of
whatever recipe and durability, and no token depends on where it has been. While it is away nothing of it is touched;
a request that ends meanwhile is forgotten, and whatever still comes for it is passed by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ...compression.interfaces import OffloadedValues
from ...errors import KvsluiceError, SequenceLost
from ..staging import Event as DeviceEvent
from .host_pages import Extent, HostPages
from .scheduler import Scheduler
from .sequence import RequestRun

if TYPE_CHECKING:
    from .parking import Saved


@dataclass(frozen=True)
class ImageId:
    """What is put away.

    Attributes:
        request_id, epoch: whose memory it is.
        number: another one for each time that something is put away.
    """

    request_id: str
    epoch: int
    number: int


class StoreTier(Protocol):
    """Puts away bytes, and brings them again. Nothing here waits; `done` and `place` are called later, on the thread
    that asked."""

    def write(self, image: ImageId, extent: Extent, done: Callable[[KvsluiceError | None], None]) -> None:
        """Put an image away, which does not change until then.

        Args:
            done: told what went wrong, if something did; nothing is there then.
        """
        ...

    def read(
        self,
        image: ImageId,
        place: Callable[[int, bytes | memoryview], None],
        done: Callable[[KvsluiceError | None], None],
    ) -> None:
        """Bring an image that was written; it is deleted when all is here.

        Args:
            place: takes bytes of it and where they begin.
        """
        ...

    def forget(self, image: ImageId) -> None:
        """It is of no use any more, whatever is under way: `done` may not be called."""
        ...


class Offload:
    """Moves requests as the scheduler's tiers say.

    Args:
        saved: what is parked; a request whose state has no pages is in the store.
        mark: a point behind all that the calling thread has given the device, which may still write to pages that are
            free by now.
        fail: ends a request by an error.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        host: HostPages,
        runs: Mapping[str, RequestRun],
        saved: Mapping[str, Saved],
        store: StoreTier,
        mark: Callable[[], DeviceEvent | None],
        fail: Callable[[str, Exception], object],
    ) -> None:
        assert scheduler.tiers is not None, "what is parked is parked by tiers"
        self._scheduler, self._overflow = scheduler, scheduler.tiers.overflow
        self._host, self._runs, self._saved, self._store = host, runs, saved, store
        self._mark, self._fail = mark, fail
        self._images: dict[str, ImageId] = {}
        self._num_images = 0

    def move(self) -> None:
        """Begin the moves that are due. Those that come back go first, as they say what room they lack."""
        for request_id in self._scheduler.fetch():
            self._read(request_id)
        for request_id in self._scheduler.spill():
            self._write(request_id)

    def drop(self, request_id: str) -> None:
        """A request has ended: forget what is put away of it."""
        image = self._images.pop(request_id, None)
        if image is not None:
            self._store.forget(image)

    def _write(self, request_id: str) -> None:
        self._num_images += 1
        image = ImageId(request_id, self._runs[request_id].request.epoch, self._num_images)
        self._images[request_id] = image
        self._store.write(image, self._extent(request_id), lambda error: self._written(image, error))

    def _written(self, image: ImageId, error: KvsluiceError | None) -> None:
        request_id = image.request_id
        if self._images.get(request_id) != image:
            return
        if error is not None:
            del self._images[request_id]
            self._overflow.refused(request_id)
        elif self._scheduler.stored(request_id):
            for values in self._values(request_id):
                values.leave()
            self._saved[request_id].pages = None
        else:
            self.drop(request_id)

    def _read(self, request_id: str) -> None:
        image, saved = self._images[request_id], self._saved[request_id]
        saved.pages = self._host.take(-(-saved.room_nbytes // self._host.page_nbytes))
        for values in self._values(request_id):
            values.enter(self._host.take(values.num_pages))
        extent, free = self._extent(request_id), self._mark()

        def place(begin: int, data: bytes | memoryview) -> None:
            nonlocal free
            if self._images.get(request_id) != image:
                return
            if free is not None:  # what the device had to do when the pages were taken is long done
                free.synchronize()
                free = None
            extent.write(begin, data)

        self._store.read(image, place, lambda error: self._back(image, error))

    def _back(self, image: ImageId, error: KvsluiceError | None) -> None:
        request_id = image.request_id
        if self._images.get(request_id) != image:
            return
        if error is not None:
            self._overflow.lost()
            self._fail(request_id, SequenceLost(f"a parked request cannot be read back: {error.message}"))
            return
        del self._images[request_id]
        self._overflow.fetched(request_id)

    def _extent(self, request_id: str) -> Extent:
        """All of a parked request's host memory, in the same order whatever pages it lies in."""
        saved = self._saved[request_id]
        assert saved.pages is not None, "it lies in host memory"
        return Extent([*saved.pages.views, *(view for values in self._values(request_id) for view in values.views)])

    def _values(self, request_id: str) -> list[OffloadedValues]:
        """The values of its prompt, which its choices share."""
        choice = next(iter(self._runs[request_id].choices.values()))
        return list(choice.cache.host_values())
