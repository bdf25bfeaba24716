"""A store inside the process, bounded in bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import InternalError, StoreUnavailable
from .identity import HeadKey, StoreKey
from .store import Head, HeadWrite, check_ttl


@dataclass
class _Held:
    """What lies under a key until its deadline, and what it is charged with."""

    content: bytes | Head
    deadline: float
    charged_bytes: int


class MemoryStore:
    """A `Store` that loses everything with its process.

    Charged are the bytes of keys and contents. When `capacity_bytes` is reached, what has expired goes; living values
    are never evicted, so a write that still finds no room is refused with `StoreUnavailable`. Until then, expired
    values stay in memory unseen. Every method runs to its end without awaiting, so calls from one event loop are
    atomic; other threads must not call it.

    Args:
        capacity_bytes: of keys and contents together.
        clock: seconds that never go back.
    """

    def __init__(self, capacity_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        if capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes must be above 0, got {capacity_bytes}")
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._clock = clock
        self._values: dict[str, _Held] = {}
        self._heads: dict[str, _Held] = {}
        self._closed = False

    async def put(self, key: StoreKey, value: bytes, ttl_s: float) -> None:
        check_ttl(ttl_s)
        held = self._find(self._values, key)
        if held is None:
            self._insert(self._values, key, bytes(value), len(value), ttl_s)
        elif held.content == value:
            self._prolong(held, ttl_s)
        else:
            raise InternalError("another value lives under this key of the store")

    async def get(self, key: StoreKey) -> bytes | None:
        held = self._find(self._values, key)
        if held is None:
            return None
        assert isinstance(held.content, bytes)
        return held.content

    async def exists(self, key: StoreKey) -> bool:
        return self._find(self._values, key) is not None

    async def renew(self, key: StoreKey, ttl_s: float) -> bool:
        check_ttl(ttl_s)
        held = self._find(self._values, key)
        if held is not None:
            self._prolong(held, ttl_s)
        return held is not None

    async def delete(self, key: StoreKey) -> bool:
        found = self._find(self._values, key) is not None
        self._drop(self._values, key)
        return found

    async def read_head(self, key: HeadKey) -> Head | None:
        held = self._find(self._heads, key)
        if held is None:
            return None
        assert isinstance(held.content, Head)
        return held.content

    async def compare_and_set_head(self, key: HeadKey, expected: Head | None, new: Head, ttl_s: float) -> HeadWrite:
        check_ttl(ttl_s)
        current = await self.read_head(key)
        if current == new:
            self._prolong(self._heads[key], ttl_s)
            return HeadWrite.WRITTEN
        if current is not None and current.epoch > new.epoch:
            return HeadWrite.FENCED
        if current != expected:
            return HeadWrite.CHANGED
        self._insert(self._heads, key, new, len(new.manifest), ttl_s)
        return HeadWrite.WRITTEN

    async def scan(self, prefix: str) -> list[str]:
        self._check_open()
        self._drop_expired()
        return sorted(key for key in (*self._values, *self._heads) if key.startswith(prefix))

    async def close(self) -> None:
        self._closed = True
        self._values.clear()
        self._heads.clear()
        self.used_bytes = 0

    def check_integrity(self) -> None:
        held = [*self._values.values(), *self._heads.values()]
        assert self.used_bytes == sum(item.charged_bytes for item in held), "charged bytes do not add up"
        assert self.used_bytes <= self.capacity_bytes, "more is held than there is room for"
        assert not (self._closed and held), "a closed store holds values"

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailable("the store is closed")

    def _find(self, table: Mapping[str, _Held], key: str) -> _Held | None:
        self._check_open()
        held = table.get(key)
        return held if held is not None and held.deadline > self._clock() else None

    def _prolong(self, held: _Held, ttl_s: float) -> None:
        held.deadline = max(held.deadline, self._clock() + ttl_s)

    def _insert(self, table: dict[str, _Held], key: str, content: bytes | Head, num_bytes: int, ttl_s: float) -> None:
        """Put content under a key whose present content may go: a head's predecessor, or something expired."""
        charged = len(key.encode()) + num_bytes
        if self._room(table, key) < charged:
            self._drop_expired()
        if self._room(table, key) < charged:
            raise StoreUnavailable("the store is full")
        self._drop(table, key)
        table[key] = _Held(content, self._clock() + ttl_s, charged)
        self.used_bytes += charged

    def _room(self, table: Mapping[str, _Held], key: str) -> int:
        """Bytes that are free once what lies under `key` is gone."""
        return self.capacity_bytes - self.used_bytes + (table[key].charged_bytes if key in table else 0)

    def _drop(self, table: dict[str, _Held], key: str) -> None:
        held = table.pop(key, None)
        if held is not None:
            self.used_bytes -= held.charged_bytes

    def _drop_expired(self) -> None:
        now = self._clock()
        for table in (self._values, self._heads):
            for key in [key for key, held in table.items() if held.deadline <= now]:
                self._drop(table, key)
