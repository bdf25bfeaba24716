"""A store whose frames also lie in this process, so that what a worker wrote or read it need not fetch again."""

from __future__ import annotations

from collections import OrderedDict

from .identity import FRAMES, HeadKey, StoreKey
from .store import Head, HeadWrite, Store


class CachedStore:
    """A `Store` over another one, with the frames used last in memory.

    Whether a frame is there the other store alone says, so what has expired there or was deleted is gone here, too; a
    read of what is held costs it a question and no payload. Only frames are held: their names carry the epoch of who
    wrote them, so what lies under one never becomes anything else. Calls belong to one event loop.

    Args:
        store: keeps everything; `close` closes it.
        capacity_bytes: of frames in memory; those used least lately make room.

    Attributes:
        hits, misses: frames that were read from memory, and from the other store.
    """

    def __init__(self, store: Store, capacity_bytes: int) -> None:
        if capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes must be above 0, got {capacity_bytes}")
        self.capacity_bytes = capacity_bytes
        self.used_bytes = self.hits = self.misses = 0
        self._store = store
        self._frames: OrderedDict[StoreKey, bytes] = OrderedDict()

    async def put(self, key: StoreKey, value: bytes, ttl_s: float) -> None:
        await self._store.put(key, value, ttl_s)
        self._hold(key, value)

    async def get(self, key: StoreKey) -> bytes | None:
        held = self._frames.get(key)
        if held is None:
            value = await self._store.get(key)
            if value is not None:
                self._hold(key, value)
                self.misses += key.startswith(FRAMES)
            return value
        if not await self._store.exists(key):
            self._drop(key)
            return None
        self.hits += 1
        if key in self._frames:  # others may have been read meanwhile
            self._frames.move_to_end(key)
        return held

    async def exists(self, key: StoreKey) -> bool:
        return await self._store.exists(key)

    async def renew(self, key: StoreKey, ttl_s: float) -> bool:
        return await self._store.renew(key, ttl_s)

    async def delete(self, key: StoreKey) -> bool:
        self._drop(key)
        return await self._store.delete(key)

    async def read_head(self, key: HeadKey) -> Head | None:
        return await self._store.read_head(key)

    async def compare_and_set_head(self, key: HeadKey, expected: Head | None, new: Head, ttl_s: float) -> HeadWrite:
        return await self._store.compare_and_set_head(key, expected, new, ttl_s)

    async def scan(self, prefix: str) -> list[str]:
        return await self._store.scan(prefix)

    async def close(self) -> None:
        self._frames.clear()
        self.used_bytes = 0
        self.capacity_bytes = 0
        await self._store.close()

    def check_integrity(self) -> None:
        assert self.used_bytes == sum(map(len, self._frames.values())), "bytes in memory do not add up"
        assert self.used_bytes <= self.capacity_bytes, "more is in memory than there is room for"
        self._store.check_integrity()

    def _hold(self, key: StoreKey, value: bytes) -> None:
        if not key.startswith(FRAMES) or len(value) > self.capacity_bytes:
            return
        self._drop(key)
        while self.used_bytes + len(value) > self.capacity_bytes:
            self._drop(next(iter(self._frames)))
        self._frames[key] = bytes(value)  # the same object where it is one already
        self.used_bytes += len(value)

    def _drop(self, key: StoreKey) -> None:
        held = self._frames.pop(key, None)
        if held is not None:
            self.used_bytes -= len(held)
