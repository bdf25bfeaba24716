"""A store in Redis 7 or newer: one server, a cluster, or a master that sentinels name. No server-side scripts.

A value is SET if it is not there, and compared where it is. A head changes between WATCH and EXEC. Times to live are
renewed by PEXPIRE GT, which never shortens them. Every write carries its time to live in the same command, so nothing
is ever stored without an end. Why each operation may be repeated after a reply was lost:

    put      finds its own value, and renews it
    renew    renews again
    delete   finds nothing; its answer may then be False although it did delete
    head     finds its own head, which counts as written
"""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from redis import exceptions

from ..errors import ConfigError, CorruptFrame, InternalError
from .config import StoreConfig
from .guard import Bounds, Cause, Guard, StoreCounters, Trouble
from .head import MAX_HEAD_BYTES, decode_head, encode_head
from .identity import HeadKey, StoreKey
from .redis_links import Links, Place, Session, cause_of, open_links
from .store import Head, HeadWrite, check_ttl

T = TypeVar("T")

PROBE_PREFIX = "kvsluice:probe:"
PROBE_TTL_MS = 10_000
MAX_TTL_MS = 1 << 52
SCAN_PAGE = 1000
OLDEST_VERSION = 7
AT_START = {
    Cause.AUTH: "store_password_file: the server refuses user or password; allowed: what the server's ACL says",
    Cause.DENIED: "store_url: the user may not run a command that a store needs; allowed: the ACL of docs/store.md",
    Cause.TLS: "store_url: no TLS connection; allowed: a server that speaks TLS, with a certificate for its host name "
    "from an authority of store_ca_file, and, where it wants one, store_cert_file",
    Cause.WRONG_KIND: "store_url: one server and a cluster are mixed up; allowed: redis+cluster:// for a cluster",
    Cause.MOVED: "store_url: the server belongs to a cluster; allowed: redis+cluster:// for a cluster",
}

logger = logging.getLogger(__name__)


def _ttl_ms(ttl_s: float) -> int:
    """At least `ttl_s`, in milliseconds; more than 100,000 years are cut."""
    check_ttl(ttl_s)
    return MAX_TTL_MS if ttl_s * 1000 >= MAX_TTL_MS else math.ceil(ttl_s * 1000)


def _number(reply: Any) -> int:
    if not isinstance(reply, int):
        raise Trouble(Cause.GARBLED)
    return reply


def _bytes(reply: Any) -> bytes:
    if not isinstance(reply, bytes):
        raise Trouble(Cause.GARBLED)
    return reply


async def _look(session: Session, key: str, max_bytes: int) -> bytes | None:
    """Watch a key and read the beginning of what it holds; what is read counts only once an EXEC has succeeded."""
    replies = await session.exchange(("WATCH", key), ("EXISTS", key), ("GETRANGE", key, 0, max_bytes))
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return _bytes(replies[2]) if _number(replies[1]) else None


def _renewal(key: str, ttl_ms: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """PEXPIRE GT answers 0 for a key that lives long enough and for one that is not there; EXISTS tells them apart."""
    return ("PEXPIRE", key, ttl_ms, "GT"), ("EXISTS", key)


class RedisStore:
    """A `Store` in Redis. Made by `open_redis_store`; belongs to the event loop that made it.

    Attributes:
        counters: attempts, retries and failures by cause.
    """

    def __init__(self, config: StoreConfig, links: Links) -> None:
        self._config = config
        self._links = links
        self._guard = Guard(
            Bounds(
                attempt_timeout_s=config.connect_timeout_s + config.operation_timeout_s,
                total_timeout_s=config.total_timeout_s,
                max_attempts=config.max_attempts,
                max_operations=config.max_operations,
                max_bytes_in_flight=config.max_bytes_in_flight,
                breaker_failures=config.breaker_failures,
                breaker_pause_s=config.breaker_pause_s,
            )
        )

    @property
    def counters(self) -> StoreCounters:
        return self._guard.counters

    async def put(self, key: StoreKey, value: bytes, ttl_s: float) -> None:
        ttl_ms, value = _ttl_ms(ttl_s), bytes(value)
        if len(value) > self._config.max_value_bytes:
            raise Trouble(Cause.TOO_LONG)

        async def attempt(session: Session) -> None:
            while True:
                reply = await session.call("SET", key, value, "NX", "PX", ttl_ms)
                if reply == b"OK":
                    return
                if reply is not None:
                    raise Trouble(Cause.GARBLED)
                held = await _look(session, key, len(value))  # one byte more than ours shows a longer one
                done = await session.transaction(*(_renewal(key, ttl_ms) if held == value else [("EXISTS", key)]))
                if done is None or held is None:
                    continue  # it went away or changed meanwhile
                if held != value:
                    raise InternalError("another value lives under this key of the store")
                if _number(done[1]):
                    return

        await self._run(key, attempt, len(value))

    async def get(self, key: StoreKey) -> bytes | None:
        return await self._read(key, self._config.max_value_bytes)

    async def exists(self, key: StoreKey) -> bool:
        return bool(_number(await self._run(key, lambda session: session.call("EXISTS", key), 0)))

    async def renew(self, key: StoreKey, ttl_s: float) -> bool:
        ttl_ms = _ttl_ms(ttl_s)

        async def attempt(session: Session) -> bool:
            # no transaction: a full server queues none, and what it has must live on
            extend, look = _renewal(key, ttl_ms)
            await session.call(*extend)
            return bool(_number(await session.call(*look)))

        return await self._run(key, attempt, 0)

    async def delete(self, key: StoreKey) -> bool:
        return bool(_number(await self._run(key, lambda session: session.call("DEL", key), 0)))

    async def read_head(self, key: HeadKey) -> Head | None:
        raw = await self._read(key, MAX_HEAD_BYTES)
        return None if raw is None else decode_head(raw)

    async def compare_and_set_head(self, key: HeadKey, expected: Head | None, new: Head, ttl_s: float) -> HeadWrite:
        ttl_ms, raw = _ttl_ms(ttl_s), encode_head(new)

        async def attempt(session: Session) -> HeadWrite:
            while True:
                held = await _look(session, key, MAX_HEAD_BYTES)
                corrupt: CorruptFrame | None = None
                outcome = HeadWrite.CHANGED
                commands: tuple[tuple[Any, ...], ...] = (("EXISTS", key),)
                try:
                    current = None if held is None else decode_head(held)
                except CorruptFrame as exc:
                    corrupt = exc
                else:
                    if current == new:
                        outcome, commands = HeadWrite.WRITTEN, _renewal(key, ttl_ms)
                    elif current is not None and current.epoch > new.epoch:
                        outcome = HeadWrite.FENCED
                    elif current == expected:
                        outcome, commands = HeadWrite.WRITTEN, (("SET", key, raw, "PX", ttl_ms),)
                # also where nothing is written, EXEC says that what was read was so at one moment
                if await session.transaction(*commands) is None:
                    continue
                if corrupt is not None:
                    raise corrupt
                return outcome

        return await self._run(key, attempt, MAX_HEAD_BYTES)

    async def scan(self, prefix: str) -> list[str]:
        pattern = "".join("\\" + char if char in "\\*?[]^-" else char for char in prefix) + "*"
        found: set[str] = set()
        for place in await self._guard.run(lambda: self._translated(self._links.places()), 0):
            cursor = 0
            while True:
                cursor, names = await self._at(place, _scan_page(cursor, pattern))
                found.update(name for name in names if name.startswith(prefix))
                if cursor == 0:
                    break
        return sorted(found)

    async def close(self) -> None:
        await self._guard.close()
        await self._links.close()

    def check_integrity(self) -> None:
        self._guard.check_integrity()

    async def _read(self, key: str, max_bytes: int) -> bytes | None:
        async def attempt(session: Session) -> bytes | None:
            # no transaction: a full server queues none, and what it has must be readable
            held = _bytes(await session.call("GETRANGE", key, 0, max_bytes))
            if held or not _number(await session.call("EXISTS", key)):
                return held or None
            return _bytes(await session.call("GETRANGE", key, 0, max_bytes))

        held = await self._run(key, attempt, max_bytes)
        if held is not None and len(held) > max_bytes:
            raise CorruptFrame("corrupt value: longer than the store reads")
        return held

    async def _run(self, key: str, operation: Callable[[Session], Awaitable[T]], num_bytes: int) -> T:
        """An operation on the server that holds a key, within the store's bounds."""

        async def attempt() -> T:
            try:
                async with self._links.session(key) as session:
                    return await operation(session)
            except exceptions.AskError as exc:
                if isinstance(exc, exceptions.MovedError):
                    raise
                moving = exc
            # the key is on its way to another server, which knows it already
            async with self._links.session_at((moving.host, moving.port), asking=True) as session:
                return await operation(session)

        return await self._guard.run(lambda: self._translated(attempt()), num_bytes, lambda: self._links.place_of(key))

    async def _at(self, place: Place, operation: Callable[[Session], Awaitable[T]]) -> T:
        async def attempt() -> T:
            async with self._links.session_at(place) as session:
                return await operation(session)

        return await self._guard.run(lambda: self._translated(attempt()), 0, lambda: place)

    @staticmethod
    async def _translated(work: Awaitable[T]) -> T:
        """The result, with everything that the library raises made a `Trouble`."""
        try:
            return await work
        except (exceptions.RedisError, exceptions.RedisClusterException, OSError, EOFError) as exc:
            raise Trouble(cause_of(exc)) from exc

    async def check_server(self) -> None:
        """Do once what a store does all the time, on every server that takes writes, and read their settings.

        Raises:
            ConfigError: credentials, permissions, TLS or settings of a server do not do.
            StoreUnavailable: a server cannot be reached or takes no writes now.
        """
        try:
            keys = await self._guard.run(lambda: self._translated(self._links.probe_keys(PROBE_PREFIX)), 0)
            for key in keys:
                await self._run(key, partial(_probe, key=key), 0)
            for place in await self._guard.run(lambda: self._translated(self._links.places()), 0):
                await self._check_settings(place)
        except Trouble as exc:
            if exc.cause is Cause.UNREACHABLE and not self._config.address.tls and await self._speaks_tls():
                raise ConfigError("store_url: the server speaks TLS; allowed: rediss… in place of redis…") from exc
            if (
                exc.cause in (Cause.UNREACHABLE, Cause.TIMEOUT)
                and self._config.address.tls
                and await self._speaks_plain()
            ):
                raise ConfigError("store_url: the server speaks no TLS; allowed: redis… in place of rediss…") from exc
            if exc.cause in AT_START:
                raise ConfigError(AT_START[exc.cause]) from exc
            raise

    async def _check_settings(self, place: Place) -> None:
        try:
            text = _bytes(await self._at(place, lambda session: session.call("INFO")))
        except Trouble as exc:
            if exc.cause is not Cause.DENIED:
                raise
            logger.warning("the store's user may not run INFO, so the server's maxmemory-policy is not checked")
            return
        info = dict(line.split(":", 1) for line in text.decode(errors="replace").splitlines() if ":" in line)
        version = info.get("redis_version", "")
        if version.split(".")[0].isdigit() and int(version.split(".")[0]) < OLDEST_VERSION:
            raise ConfigError(f"store_url: the server is Redis {version[:16]}; allowed: {OLDEST_VERSION} or newer")
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            raise ConfigError(
                f"store_url: the server's maxmemory-policy {policy[:32]!r} drops living values; allowed: noeviction"
            )

    async def _speaks_tls(self) -> bool:
        """Whether what closed a plaintext connection answers a TLS greeting."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        host, port = self._config.address.hosts[0]
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                _, writer = await asyncio.open_connection(host, port, ssl=context)
        except (OSError, TimeoutError):
            return False
        writer.transport.abort()
        return True

    async def _speaks_plain(self) -> bool:
        """Whether what does not answer a TLS greeting answers a plaintext one."""
        host, port = self._config.address.hosts[0]
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                reader, writer = await asyncio.open_connection(host, port)
                writer.write(b"PING\r\n")
                answer = await reader.read(1)
        except (OSError, TimeoutError):
            return False
        writer.transport.abort()
        return answer in (b"+", b"-")


def _scan_page(cursor: int, pattern: str) -> Callable[[Session], Awaitable[tuple[int, list[str]]]]:
    async def page(session: Session) -> tuple[int, list[str]]:
        reply = await session.call("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_PAGE)
        if not isinstance(reply, list) or len(reply) != 2 or not isinstance(reply[1], list):
            raise Trouble(Cause.GARBLED)
        return int(_bytes(reply[0])), [_bytes(name).decode(errors="replace") for name in reply[1]]

    return page


async def _probe(session: Session, key: str) -> None:
    """Every command that a store sends, on a key of its own. May be repeated."""
    await session.call("SET", key, b"probe", "NX", "PX", PROBE_TTL_MS)
    await _look(session, key, 16)
    await session.transaction(*_renewal(key, PROBE_TTL_MS), ("GETRANGE", key, 0, 16))
    await _scan_page(0, PROBE_PREFIX + "*")(session)
    if not _number(await session.call("DEL", key)):
        raise Trouble(Cause.REFUSED)


async def open_redis_store(config: StoreConfig) -> RedisStore:
    """A store whose servers have answered and do what a store needs.

    Raises:
        ConfigError: the configuration, or a server's settings, do not do; names the field.
        StoreUnavailable: a server cannot be reached or takes no writes now.
    """
    store = RedisStore(config, open_links(config))
    try:
        await store.check_server()
    except BaseException:
        await store.close()
        raise
    return store
