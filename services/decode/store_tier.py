"""The store as a decode worker's lowest tier: images of parked requests, written, renewed, read and deleted.

The engine's thread asks; everything else belongs to the event loop, beside it. An operation that fails is told and not
tried again here: the store's guard has done that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from ...errors import KvsluiceError, SequenceLost
from ...kvstore.identity import FrameIdent
from ...kvstore.images import StoredImage
from ...kvstore.store import Store
from ..lifecycle import EngineThread
from ..telemetry import Recorder
from .failures import typed
from .host_pages import Extent
from .offload import ImageId
from .overflow import OverflowPolicy

logger = logging.getLogger(__name__)

Done = Callable[[KvsluiceError | None], None]


class StoreImages:
    """See `StoreTier`.

    Args:
        ttl_s: how long an image lives unless it is renewed.
        ident_of: whom a request's memory belongs to; None = it is not here any more. Called on the event loop.
        thread: the engine's.
        on_loop: has the event loop call something; any thread may ask.
        policy: says for how long a store that has failed is left alone.
    """

    def __init__(
        self,
        store: Store,
        ttl_s: float,
        ident_of: Callable[[ImageId], FrameIdent | None],
        thread: EngineThread,
        on_loop: Callable[[Callable[[], None]], None],
        recorder: Recorder,
        policy: OverflowPolicy,
    ) -> None:
        self._policy = policy
        self._store, self._ttl_s, self._ident_of = store, ttl_s, ident_of
        self._thread, self._on_loop, self._recorder = thread, on_loop, recorder
        self._images: dict[ImageId, StoredImage] = {}
        self._moves: dict[ImageId, asyncio.Task[None]] = {}
        self._deletions: set[asyncio.Task[None]] = set()
        self._renewing: asyncio.Task[None] | None = None

    def write(self, image: ImageId, extent: Extent, done: Done) -> None:
        """See `StoreTier`."""
        self._on_loop(lambda: self._begin(image, self._write(image, extent, done)))

    def read(self, image: ImageId, place: Callable[[int, bytes | memoryview], None], done: Done) -> None:
        """See `StoreTier`."""
        self._on_loop(lambda: self._begin(image, self._read(image, place, done)))

    def forget(self, image: ImageId) -> None:
        """See `StoreTier`."""
        self._on_loop(lambda: self._forget(image))

    async def close(self) -> None:
        """Delete what is put away, and wait for it: the engine has stopped."""
        if self._renewing is not None:
            self._renewing.cancel()
        for image in list(self._images):
            self._forget(image)
        await asyncio.gather(*self._deletions, return_exceptions=True)

    def _begin(self, image: ImageId, move: Coroutine[Any, Any, None]) -> None:
        self._moves[image] = asyncio.create_task(move)
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew())

    async def _write(self, image: ImageId, extent: Extent, done: Done) -> None:
        error: KvsluiceError | None = None
        try:
            ident = self._ident_of(image)
            if ident is None:
                raise SequenceLost("the request has ended")
            stored = self._images[image] = StoredImage(self._store, ident, image.number, self._ttl_s)
            await stored.write(extent.num_bytes, extent.read)
        except Exception as exc:
            error = typed(exc, image.request_id)
            self._discard(image)
        self._tell(image, "decode.stored", extent.num_bytes, error, done, self._policy.retry_s)

    async def _read(self, image: ImageId, place: Callable[[int, bytes | memoryview], None], done: Done) -> None:
        error: KvsluiceError | None = None
        at = 0
        try:
            async for data in self._images[image].read():
                begin, at = at, at + len(data)
                await self._thread.call(lambda begin=begin, data=data: place(begin, data))  # type: ignore[misc]
        except Exception as exc:
            error = typed(exc, image.request_id)
        self._discard(image)
        self._tell(image, "decode.fetched", at, error, done, self._policy.loss_pause_s)

    def _tell(
        self, image: ImageId, name: str, num_bytes: int, error: KvsluiceError | None, done: Done, pause_s: float
    ) -> None:
        self._moves.pop(image, None)
        if error is not None:
            logger.warning("moving request %s to the store or back failed: %s", image.request_id, error.type_name)
        outcome = "moved" if error is None else error.type_name
        self._recorder.record(name, request_id=image.request_id, epoch=image.epoch, nbytes=num_bytes, outcome=outcome)
        self._thread.post(lambda: self._done(error, done, pause_s))

    def _done(self, error: KvsluiceError | None, done: Done, pause_s: float) -> None:
        """On the engine's thread, which is to look again once the store is used again: who waits for room that only the
        store can make may be the only one that has something to do, and nothing else would wake it."""
        done(error)
        if error is not None:
            self._on_loop(lambda: self._wake_after(pause_s))

    def _wake_after(self, pause_s: float) -> None:
        asyncio.get_running_loop().call_later(pause_s, self._thread.wake)

    def _forget(self, image: ImageId) -> None:
        move = self._moves.pop(image, None)
        if move is not None:
            move.cancel()
        self._discard(image, move)

    def _discard(self, image: ImageId, move: asyncio.Task[None] | None = None) -> None:
        """Delete an image, once a move of it has ended."""
        stored = self._images.pop(image, None)
        if stored is None:
            return
        task = asyncio.create_task(self._delete(image, stored, move))
        self._deletions.add(task)
        task.add_done_callback(self._deletions.discard)

    async def _delete(self, image: ImageId, stored: StoredImage, move: asyncio.Task[None] | None) -> None:
        if move is not None:
            await asyncio.gather(move, return_exceptions=True)
        try:
            await stored.delete()
        except KvsluiceError as exc:
            logger.warning("memory of request %s stays in the store until it expires: %s", image.request_id, exc)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._ttl_s / 3)
            for image, stored in list(self._images.items()):
                try:
                    await stored.renew()
                except KvsluiceError as exc:  # if it expires, that is found when it is wanted
                    logger.warning("memory of request %s was not renewed: %s", image.request_id, exc)
