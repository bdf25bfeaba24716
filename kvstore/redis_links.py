"""Connections to Redis: one server, a cluster, or a master that sentinels name; and what their failures mean.

The client library brings connections, pools, parsing, and knows topologies. What is done here and not there: one
connection is held for a whole operation, so that WATCH, MULTI and EXEC meet; retries are left to `guard.py`, which
knows the deadline; and a connection that is given up is cut off at once, because one that waits for its buffer to
drain keeps descriptor and value as long as a silent network does.

Commands are sent in RESP 2, which needs no permission beyond the commands themselves.
"""

from __future__ import annotations

import secrets
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode, NodesManager
from redis.asyncio.connection import Connection, ConnectionPool
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool, SentinelManagedConnection
from redis.crc import key_slot
from redis.credentials import CredentialProvider

from ..errors import ConfigError
from .config import StoreAddress, StoreConfig, Topology, read_secret
from .guard import Cause, Trouble

Place = tuple[str, int] | None
"""Host and port of a cluster's primary; None where there is only one place."""

READ_BYTES = 256 * 1024

_CAUSES: tuple[tuple[type[BaseException], Cause], ...] = (
    (exceptions.NoPermissionError, Cause.DENIED),
    (exceptions.AuthenticationError, Cause.AUTH),
    (exceptions.AuthorizationError, Cause.AUTH),
    (exceptions.AuthenticationWrongNumberOfArgsError, Cause.AUTH),
    (exceptions.BusyLoadingError, Cause.LOADING),
    (exceptions.ReadOnlyError, Cause.READ_ONLY),
    (exceptions.OutOfMemoryError, Cause.FULL),
    (exceptions.ClusterDownError, Cause.CLUSTER_DOWN),
    (exceptions.SlotNotCoveredError, Cause.CLUSTER_DOWN),
    (exceptions.TryAgainError, Cause.MOVED),
    (exceptions.AskError, Cause.MOVED),
)
_MAX_CLIENTS = "max number of clients"
_NO_CLUSTER = "Cluster mode is not enabled"


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    for _ in range(16):
        if exc is None:
            return
        yield exc
        exc = exc.__cause__ or exc.__context__


def cause_of(exc: BaseException) -> Cause:
    """What an exception of the library, of sockets or of TLS means. The first that is specific counts."""
    seen = list(_chain(exc))
    for link in seen:
        for kind, cause in _CAUSES:
            if isinstance(link, kind):
                return cause
        if _MAX_CLIENTS in str(link):
            return Cause.MAX_CLIENTS
        if isinstance(link, exceptions.ExecAbortError) and "because of: NOPERM " in str(link):
            return Cause.DENIED  # a user who may not EXEC, as Redis 7.0 says it
        if isinstance(link, ssl.SSLError) and not isinstance(link, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return Cause.TLS
    if any(isinstance(link, exceptions.RedisClusterException) and _NO_CLUSTER in str(link) for link in seen):
        return Cause.WRONG_KIND
    if any(isinstance(link, exceptions.TimeoutError | TimeoutError) for link in seen):
        return Cause.TIMEOUT
    return Cause.REFUSED if isinstance(exc, exceptions.ResponseError) else Cause.UNREACHABLE


class _Abrupt:
    """Ends connections without waiting for unsent bytes, and brings its own TLS context."""

    _writer: Any

    def __init__(self, *, tls: ssl.SSLContext | None = None, **kwargs: Any) -> None:
        self._tls = tls
        super().__init__(**kwargs)

    def _connection_arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = dict(super()._connection_arguments())  # type: ignore[misc]
        return arguments if self._tls is None else arguments | {"ssl": self._tls}

    async def disconnect(self, *args: Any, **kwargs: Any) -> None:
        if self._writer is not None:
            self._writer.transport.abort()
        await super().disconnect(*args, **kwargs)  # type: ignore[misc]


class _Connection(_Abrupt, Connection):
    pass


class _SentinelConnection(_Abrupt, SentinelManagedConnection):
    pass


class _Credentials(CredentialProvider):
    """User and password, the latter read anew for every connection."""

    def __init__(self, username: str | None, read: Callable[[], str | None]) -> None:
        self._username = username
        self._read = read

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        try:
            password = self._read() or ""
        except ConfigError as exc:
            raise exceptions.AuthenticationError("the password cannot be read") from exc
        return (self._username, password) if self._username else (password,)


class Session:
    """One connection, held for one operation.

    Attributes:
        clean: nothing is under way and nothing watched, so another operation may use the connection.
    """

    def __init__(self, connection: Any, asking: bool) -> None:
        self.clean = True
        self._connection = connection
        self._asking = asking

    async def exchange(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Send commands together and read all replies; an error reply stands in its place as an exception."""
        sent: list[tuple[Any, ...]] = []
        for command in commands:
            # holds for the next command, and from MULTI on to EXEC
            sent += [("ASKING",), command] if self._asking and command[0] != "EXEC" else [command]
        self.clean = False
        await self._connection.send_packed_command(self._connection.pack_commands(sent))
        replies = [await self._read() for _ in sent]
        self.clean = not any(command[0] == "WATCH" for command in commands)
        return [reply for command, reply in zip(sent, replies, strict=True) if command[0] != "ASKING"]

    async def call(self, *command: Any) -> Any:
        """The reply to one command; raises what the server refuses."""
        (reply,) = await self.exchange(command)
        return _checked(reply)

    async def transaction(self, *commands: tuple[Any, ...]) -> list[Any] | None:
        """Replies of commands that run as one; None where a watched key has changed. Ends watching."""
        asking, self._asking = self._asking, False
        first = [("ASKING",)] if asking else []
        try:
            *queued, replies = await self.exchange(*first, ("MULTI",), *commands, ("EXEC",))
        finally:
            self._asking = asking
        for reply in queued:
            _checked(reply)
        if _checked(replies) is None:
            return None
        if not isinstance(replies, list) or len(replies) != len(commands):
            raise Trouble(Cause.GARBLED)
        return [_checked(reply) for reply in replies]

    async def _read(self) -> Any:
        try:
            return await self._connection.read_response()
        except exceptions.ResponseError as exc:
            return exc
        except (exceptions.RedisError, OSError, EOFError):
            raise
        except Exception as exc:
            # a damaged reply fails wherever the parser happens to stumble
            raise Trouble(Cause.GARBLED) from exc


def _checked(reply: Any) -> Any:
    if isinstance(reply, Exception):
        raise reply
    return reply


class Links(Protocol):
    """Sessions with whichever servers hold a key."""

    def session(self, key: str) -> Any:
        """Async context manager: a session with the server that holds a key."""
        ...

    def session_at(self, place: Place, asking: bool = False) -> Any:
        """Async context manager: a session with one server."""
        ...

    def place_of(self, key: str) -> Place:
        """Where a session with a key's server would lead now, as far as that is known."""
        ...

    async def places(self) -> list[Place]:
        """Every server that takes writes."""
        ...

    async def probe_keys(self, prefix: str) -> list[str]:
        """New keys that begin with `prefix`, one at least for every server that takes writes."""
        ...

    async def close(self) -> None:
        """End all connections."""
        ...


@asynccontextmanager
async def _lent(pool: ConnectionPool, asking: bool = False) -> AsyncIterator[Session]:
    connection = await pool.get_connection()
    session = Session(connection, asking)
    try:
        yield session
    except exceptions.ReadOnlyError:
        session.clean = False  # another server may be the master by now
        raise
    finally:
        try:
            if not session.clean:
                await connection.disconnect(nowait=True)
        finally:
            await pool.release(connection)


def _new_key(prefix: str) -> str:
    return prefix + secrets.token_hex(8)


class SingleLinks:
    """One server, or the master that sentinels name at the time."""

    def __init__(self, pool: ConnectionPool, sentinel: Sentinel | None = None) -> None:
        self._pool = pool
        self._sentinel = sentinel

    def session(self, key: str) -> Any:
        return _lent(self._pool)

    def session_at(self, place: Place, asking: bool = False) -> Any:
        return _lent(self._pool, asking)

    def place_of(self, key: str) -> Place:
        return None

    async def places(self) -> list[Place]:
        return [None]

    async def probe_keys(self, prefix: str) -> list[str]:
        return [_new_key(prefix)]

    async def close(self) -> None:
        await self._pool.aclose()
        if self._sentinel is not None:
            await self._sentinel.aclose()


class ClusterLinks:
    """A cluster: the library knows which server holds which slot, and is asked again after every failure."""

    def __init__(self, hosts: tuple[tuple[str, int], ...], options: dict[str, Any], max_connections: int) -> None:
        node_options = options | {"connection_class": _Connection, "max_connections": max_connections}
        nodes = [ClusterNode(host, port, **node_options) for host, port in hosts]
        self._topology = NodesManager(nodes, False, node_options)
        self._options = node_options
        self._pools: dict[tuple[str, int], ConnectionPool] = {}
        self._stale = True
        self._suspect: str | None = None

    async def _refresh(self) -> None:
        if self._stale:
            await self._topology.initialize(last_failed_node_name=self._suspect)
            self._stale = False

    @asynccontextmanager
    async def session(self, key: str) -> AsyncIterator[Session]:
        await self._refresh()
        async with self.session_at(self.place_of(key)) as session:
            yield session

    def place_of(self, key: str) -> Place:
        nodes = self._topology.slots_cache.get(key_slot(key.encode()))
        return (nodes[0].host, int(nodes[0].port)) if nodes else None

    @asynccontextmanager
    async def session_at(self, place: Place, asking: bool = False) -> AsyncIterator[Session]:
        if place is None:
            self._stale = True
            raise exceptions.SlotNotCoveredError("no server is known")
        if place not in self._pools:
            self._pools[place] = ConnectionPool(host=place[0], port=place[1], **self._options)
        try:
            async with _lent(self._pools[place], asking) as session:
                yield session
        except BaseException as exc:
            if not isinstance(exc, Trouble | exceptions.OutOfMemoryError):
                self._stale, self._suspect = True, f"{place[0]}:{place[1]}"
            raise

    async def places(self) -> list[Place]:
        await self._refresh()
        return [(node.host, int(node.port)) for node in self._topology.get_nodes_by_server_type("primary")]

    async def probe_keys(self, prefix: str) -> list[str]:
        wanted, keys = set(await self.places()), []
        for _ in range(10_000):
            key = _new_key(prefix)
            if self.place_of(key) in wanted:
                wanted.discard(self.place_of(key))
                keys.append(key)
            if not wanted:
                break
        return keys

    async def close(self) -> None:
        for pool in self._pools.values():
            await pool.aclose()
        await self._topology.aclose()
        await self._topology.aclose("startup_nodes")


def tls_context(config: StoreConfig) -> ssl.SSLContext:
    """Trusts `ca_file` alone where there is one, checks host names, and shows the client's certificate.

    Raises:
        ConfigError: a file cannot be read or holds something else.
    """
    try:
        context = ssl.create_default_context(cafile=config.ca_file)
    except OSError as exc:
        raise ConfigError("store_ca_file: cannot be used; allowed: PEM file with certificates") from exc
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if config.cert_file and config.key_file:
        try:
            context.load_cert_chain(config.cert_file, config.key_file)
        except OSError as exc:
            raise ConfigError(
                "store_cert_file: cannot be used; allowed: PEM certificate, with its unencrypted key in store_key_file"
            ) from exc
    return context


def open_links(config: StoreConfig) -> Links:
    """Links to the servers of a URL; connects to nothing yet.

    Raises:
        ConfigError: a file that the configuration names cannot be used.
    """
    address = config.address
    common: dict[str, Any] = {
        "protocol": 2,
        "socket_timeout": config.operation_timeout_s,
        "socket_connect_timeout": config.connect_timeout_s,
        "socket_read_size": READ_BYTES,
        "driver_info": None,
        "tls": tls_context(config) if address.tls else None,
    }
    options = common | {"credential_provider": _credentials(config, address)}
    if address.topology is Topology.CLUSTER:
        return ClusterLinks(address.hosts, options, config.max_operations)
    options |= {"max_connections": config.max_operations, "db": address.db}
    if address.topology is Topology.SINGLE:
        ((host, port),) = address.hosts
        return SingleLinks(ConnectionPool(connection_class=_Connection, host=host, port=port, **options))
    file = config.sentinel_password_file
    password = None
    if file is not None:
        read_secret("store_sentinel_password_file", file)
        password = _Credentials(None, lambda: read_secret("store_sentinel_password_file", file))
    sentinel = Sentinel([])
    sentinel.sentinels = [
        Redis.from_pool(
            ConnectionPool(connection_class=_Connection, host=h, port=p, credential_provider=password, **common)
        )
        for h, p in address.hosts
    ]
    pool = SentinelConnectionPool(address.service, sentinel, connection_class=_SentinelConnection, **options)
    return SingleLinks(pool, sentinel)


def _credentials(config: StoreConfig, address: StoreAddress) -> _Credentials | None:
    def read() -> str | None:
        field = "store_password_file" if config.password_file else "store_password_env"
        return read_secret(field, config.password_file, config.password_env)

    return None if read() is None else _Credentials(address.username, read)
