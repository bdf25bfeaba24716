"""Every store that the contract holds to account.

The servers are real and last for the session; each test gets an empty one and a store of its own. Time passes in a
server by shortening the life of every key, so that no test sleeps or depends on the machine's speed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from redis.crc import key_slot

from kvsluice.kvstore.cached import CachedStore
from kvsluice.kvstore.config import StoreConfig
from kvsluice.kvstore.memory import MemoryStore
from kvsluice.kvstore.opening import open_store
from kvsluice.kvstore.store import Store
from kvsluice.tests.faults.rig.certificates import Authority
from kvsluice.tests.faults.rig.leaks import keys_without_end
from kvsluice.tests.faults.rig.redis_server import HOST, RedisServer, redis_cluster, redis_sentinel, running

MIB = 1024 * 1024
PASSWORD = "store-secret"


@dataclass
class StoreRig:
    """A store, and what a test may do to it from outside.

    Attributes:
        store: empty.
        advance: lets so many seconds pass.
        value_bytes: size of a value of which about sixteen fit after `limit`.
        limit: leaves room for so many.
        together: those of some keys that lie on one server.
    """

    store: Store
    advance: Callable[[float], None]
    value_bytes: int = 4096
    limit: Callable[[], None] = lambda: None
    together: Callable[[Sequence[str]], list[str]] = list


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Servers:
    """Running servers behind one URL.

    Attributes:
        masters: that hold keys.
        config: of a store that uses them.
    """

    masters: list[RedisServer]
    config: StoreConfig

    def advance(self, seconds: float) -> None:
        for server in self.masters:
            with server.admin() as admin:
                for key in admin.scan_iter(count=1000):
                    left_ms = admin.pttl(key)
                    assert left_ms != -1, f"{key!r} never ends"
                    if left_ms <= seconds * 1000:
                        admin.delete(key)
                    else:
                        admin.pexpire(key, int(left_ms - seconds * 1000))

    def limit(self) -> None:
        for server in self.masters:
            server.leave_room(16 * MIB)

    def clear(self) -> None:
        for server in self.masters:
            server.run("FLUSHALL")
            server.leave_room(None)

    def together(self, keys: Sequence[str]) -> list[str]:
        """Those on the first master; all where there is no cluster."""
        if len(self.masters) == 1:
            return list(keys)
        return [key for key in keys if key_slot(key.encode()) < 16384 // len(self.masters)]


def secret_file(folder: Path) -> str:
    (folder / "password").write_text(PASSWORD + "\n")
    return str(folder / "password")


@pytest.fixture(scope="session")
def redis_servers(tmp_path_factory) -> Iterator[Servers]:
    with running(RedisServer(tmp_path_factory.mktemp("redis"))) as server:
        yield Servers([server], StoreConfig(url=f"redis://{HOST}:{server.port}"))


@pytest.fixture(scope="session")
def cluster_servers(tmp_path_factory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("cluster")
    with redis_cluster(folder, store_password=PASSWORD) as masters:
        url = f"redis+cluster://store@{HOST}:{masters[0].port},{HOST}:{masters[1].port}"
        yield Servers(masters, StoreConfig(url=url, password_file=secret_file(folder)))


@pytest.fixture(scope="session")
def sentinel_servers(tmp_path_factory) -> Iterator[Servers]:
    with redis_sentinel(tmp_path_factory.mktemp("sentinel")) as (master, _, sentinel):
        yield Servers([master], StoreConfig(url=f"redis+sentinel://{HOST}:{sentinel.port}/main"))


@pytest.fixture(scope="session")
def tls_servers(tmp_path_factory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("tls")
    authority = Authority(folder / "pki")
    server = RedisServer(
        folder / "server",
        password="admin-secret",
        store_password=PASSWORD,
        authority=authority,
        keys=authority.issue("server"),
    )
    client = authority.issue("client")
    with running(server):
        config = StoreConfig(
            url=f"rediss://store@{HOST}:{server.port}",
            password_file=secret_file(folder),
            ca_file=str(authority.certificate),
            cert_file=str(client.certificate),
            key_file=str(client.key),
        )
        yield Servers([server], config)


KINDS = ("memory", "cached", "redis", "cached-redis", "cluster", "sentinel", "tls")


@pytest.fixture(params=KINDS)
async def rig(request) -> AsyncIterator[StoreRig]:
    cached, _, kind = request.param.rpartition("-") if request.param != "cached" else ("cached", "", "memory")
    if kind == "memory":
        clock = Clock()
        rig = StoreRig(MemoryStore(capacity_bytes=64 * 1024, clock=clock), clock.advance)
        masters = []
    else:
        servers: Servers = request.getfixturevalue(f"{kind}_servers")
        servers.clear()
        store: Store = await open_store(servers.config)
        rig = StoreRig(store, servers.advance, MIB, servers.limit, servers.together)
        masters = servers.masters
    if cached:
        rig = replace(rig, store=CachedStore(rig.store, 3 * rig.value_bytes))
    yield rig
    rig.store.check_integrity()
    await rig.store.close()
    rig.store.check_integrity()
    assert [key for server in masters for key in keys_without_end(server)] == []


@pytest.fixture
def store(rig: StoreRig) -> Store:
    return rig.store
