"""The ways to a redis-server that `bench store` compares: our store, the client library alone, and Redis' own tool."""

from __future__ import annotations

import csv
import math
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import InternalError
from ..kvstore.config import StoreConfig
from ..kvstore.head import encode_head
from ..kvstore.identity import HeadKey, StoreKey
from ..kvstore.opening import open_store
from ..kvstore.store import Head, HeadWrite, Store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

OURS, LIBRARY, TOOL = "kvsluice", "redis-py", "redis-benchmark"
TTL_S = 900.0
TOOL_TIMEOUT_S = 120.0


class Side(Protocol):
    """Operations as a store has them; each one may be under way several times."""

    async def write(self, key: StoreKey, value: bytes) -> None: ...
    async def read(self, key: StoreKey) -> bytes | None: ...
    async def move_head(self, key: HeadKey, before: Head | None, after: Head) -> None: ...
    async def remove(self, keys: Sequence[str]) -> None: ...


class StoreSide:
    """Through our store: bounded, repeated where it fails, compared where a value is there, fenced."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def write(self, key: StoreKey, value: bytes) -> None:
        await self._store.put(key, value, TTL_S)

    async def read(self, key: StoreKey) -> bytes | None:
        return await self._store.get(key)

    async def move_head(self, key: HeadKey, before: Head | None, after: Head) -> None:
        if await self._store.compare_and_set_head(key, before, after, TTL_S) is not HeadWrite.WRITTEN:
            raise InternalError("a head was not where it had been left")

    async def remove(self, keys: Sequence[str]) -> None:
        for key in keys:
            await self._store.delete(StoreKey(key))


class LibrarySide:
    """The client library's own calls, with the same effect where nothing goes wrong."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def write(self, key: StoreKey, value: bytes) -> None:
        await self._client.set(key, value, nx=True, px=int(TTL_S * 1000))

    async def read(self, key: StoreKey) -> bytes | None:
        found: bytes | None = await self._client.get(key)
        return found

    async def move_head(self, key: HeadKey, before: Head | None, after: Head) -> None:
        async with self._client.pipeline(transaction=True) as pipe:
            await pipe.watch(key)
            if await pipe.get(key) != (None if before is None else encode_head(before)):
                raise InternalError("a head was not where it had been left")
            pipe.multi()
            pipe.set(key, encode_head(after), px=int(TTL_S * 1000))
            await pipe.execute()

    async def remove(self, keys: Sequence[str]) -> None:
        for key in keys:
            await self._client.delete(key)


@asynccontextmanager
async def open_sides(address: str, connections: int) -> AsyncIterator[dict[str, Side]]:
    """Both clients of a server, with as many connections each."""
    # loaded where it is used: the other parts run where no such library is installed
    from redis.asyncio import BlockingConnectionPool, Redis

    host, _, port = address.rpartition(":")
    async with AsyncExitStack() as stack:
        # one operation may take a while on a machine that does something else as well
        waits = {"operation_timeout_s": 60.0, "total_timeout_s": 60.0}
        store = await open_store(StoreConfig(url=f"redis://{address}", max_operations=connections, **waits))  # type: ignore[arg-type]
        stack.push_async_callback(store.close)
        pool = BlockingConnectionPool(host=host, port=int(port), max_connections=connections, protocol=2)
        client = Redis.from_pool(pool)
        stack.push_async_callback(client.aclose)
        yield {OURS: StoreSide(store), LIBRARY: LibrarySide(client)}


def has_tool() -> bool:
    """Whether Redis' own tool is installed."""
    return shutil.which("redis-benchmark") is not None


def run_tool(address: str, command: str, value_bytes: int, at_once: int, count: int) -> float:
    """Seconds of an operation, by Redis' own tool: a client in C that does nothing with what it gets.

    Args:
        command: set or get.
        count: operations; the tool counts milliseconds, so that too few take no time.

    Raises:
        InternalError: the tool fails.
    """
    host, _, port = address.rpartition(":")
    # what is read must be there first
    tests = ("set", "get") if command == "get" else ("set",)
    arguments = ["redis-benchmark", "-h", host, "-p", port, "-c", str(at_once), "-n", str(count)]
    try:
        done = subprocess.run(  # noqa: S603 - the command above
            [*arguments, "-d", str(value_bytes), "-t", ",".join(tests), "--csv"],
            capture_output=True, text=True, check=False, timeout=TOOL_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired as exc:
        raise InternalError("redis-benchmark does not end") from exc
    for line in csv.DictReader(done.stdout.splitlines()):
        if line.get("test", "").lower() == command:
            rate = float(line["rps"])
            if 0 < rate < math.inf:
                return 1 / rate
    raise InternalError(f"redis-benchmark failed: {done.stderr.strip()[-200:]}")
