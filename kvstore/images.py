"""Memory of running requests that a worker has put away in a store for a while, byte for byte.

An image is of use to the process that wrote it and to nobody else, so nothing in the store names it: whoever wrote it
knows its pieces, with size and hash, renews them, and deletes them when the request is back or has ended. What a worker
leaves behind when it dies expires. Each piece is an envelope (`envelope.py`), its header the piece's own name.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from .envelope import Fault, checksum_of, corrupt, open_envelope, seal
from .identity import FrameIdent, StoreKey, image_key
from .sequences import MANY, read_frames, together
from .store import Store

MAGIC = b"KVSI"
PIECE_BYTES = 1008 * 1024  # with its envelope below 1 MiB, as frames are
_MAX_HEADER_BYTES = 256
_MAX_BYTES = PIECE_BYTES + 1024


@dataclass(frozen=True)
class Piece:
    """A part of an image.

    Attributes:
        key: its name.
        size_bytes: of the stored value.
        checksum: xxh3-64 that ends it.
    """

    key: StoreKey
    size_bytes: int
    checksum: int


class StoredImage:
    """One image. Methods are called one after the other.

    Every method raises `StoreUnavailable` where the store cannot be reached or has no room.

    Args:
        ident: whose memory it is; the epoch is in every name.
        number: counts what is put away of a request.
        ttl_s: how long it lives unless it is renewed.
    """

    def __init__(self, store: Store, ident: FrameIdent, number: int, ttl_s: float) -> None:
        self._store, self._ident, self._number, self._ttl_s = store, ident, number, ttl_s
        self._pieces: list[Piece] = []
        self._num_begun = 0

    async def write(self, num_bytes: int, read: Callable[[int, int], bytes]) -> None:
        """Put an image away.

        Args:
            num_bytes: of all of it.
            read: its bytes [begin, end); called on other threads.
        """
        begins = range(0, num_bytes, PIECE_BYTES)
        for first in range(0, len(begins), MANY):
            some = begins[first : first + MANY]
            self._num_begun = first + len(some)
            self._pieces += await together(
                [self._put(first + i, begin, min(begin + PIECE_BYTES, num_bytes), read) for i, begin in enumerate(some)]
            )

    async def read(self) -> AsyncIterator[bytes | memoryview]:
        """Its bytes, piece after piece, in order, the next ones under way while one is looked at.

        Raises:
            CorruptFrame: a piece is missing, or is not what was written.
        """
        index = 0
        async for data in read_frames(self._store, self._pieces):
            yield await asyncio.to_thread(_opened, self._pieces[index].key, data)
            index += 1

    async def renew(self) -> None:
        """Let it live for another time to live."""
        await together([self._store.renew(piece.key, self._ttl_s) for piece in self._pieces])

    async def delete(self) -> None:
        """Remove it, or what was written of it."""
        keys = [image_key(self._ident, self._number, index) for index in range(self._num_begun)]
        await together([self._store.delete(key) for key in keys])

    async def _put(self, index: int, begin: int, end: int, read: Callable[[int, int], bytes]) -> Piece:
        key = image_key(self._ident, self._number, index)
        data = await asyncio.to_thread(lambda: seal(MAGIC, key.encode(), read(begin, end)))
        await self._store.put(key, data, self._ttl_s)
        return Piece(key, len(data), checksum_of(data))


def _opened(key: StoreKey, data: bytes) -> memoryview:
    opened = open_envelope("image", MAGIC, data, _MAX_BYTES, _MAX_HEADER_BYTES)
    if opened.header != key.encode():
        raise corrupt("image", Fault.IDENTITY)
    return opened.body
