"""A store whose operations are timed and counted."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ...kvstore.identity import HeadKey, StoreKey
from ...kvstore.store import Head, HeadWrite, Store

T = TypeVar("T")

Observe = Callable[[str, float, bool], None]
"""What an operation was, its seconds, whether it failed."""


class MeasuredStore:
    """A `Store` over another one, which tells what each operation took, retries and waiting in line included.

    Args:
        store: does the work; `close` closes it.
        observe: called on the event loop after each operation.
    """

    def __init__(self, store: Store, observe: Observe) -> None:
        self.store = store
        self._observe = observe

    async def put(self, key: StoreKey, value: bytes, ttl_s: float) -> None:
        await self._timed("put", self.store.put(key, value, ttl_s))

    async def get(self, key: StoreKey) -> bytes | None:
        return await self._timed("get", self.store.get(key))

    async def exists(self, key: StoreKey) -> bool:
        return await self._timed("exists", self.store.exists(key))

    async def renew(self, key: StoreKey, ttl_s: float) -> bool:
        return await self._timed("renew", self.store.renew(key, ttl_s))

    async def delete(self, key: StoreKey) -> bool:
        return await self._timed("delete", self.store.delete(key))

    async def read_head(self, key: HeadKey) -> Head | None:
        return await self._timed("read_head", self.store.read_head(key))

    async def compare_and_set_head(self, key: HeadKey, expected: Head | None, new: Head, ttl_s: float) -> HeadWrite:
        return await self._timed("write_head", self.store.compare_and_set_head(key, expected, new, ttl_s))

    async def scan(self, prefix: str) -> list[str]:
        return await self._timed("scan", self.store.scan(prefix))

    async def close(self) -> None:
        await self.store.close()

    def check_integrity(self) -> None:
        self.store.check_integrity()

    async def _timed(self, operation: str, work: Awaitable[T]) -> T:
        begun_s, failed = time.perf_counter(), True
        try:
            result = await work
            failed = False
            return result
        finally:
            self._observe(operation, time.perf_counter() - begun_s, failed)
