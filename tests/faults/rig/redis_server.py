"""Real redis-servers of the test's own: on loopback, in a folder of their own, gone when the test is.

A server keeps its port, so what connects to it may find it again after a restart. Servers persist nothing unless a
setting says so.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from kvsluice.tests.faults.rig.certificates import Authority, KeyPair
from kvsluice.tests.faults.rig.processes import Child, wait_until

HOST = "127.0.0.1"
STORE_ACL = (
    "resetchannels resetkeys ~kvsluice:* -@all +set +getrange +exists +del +pexpire "
    "+watch +multi +exec +scan +cluster|slots +asking +info"
)
"""The least that a store's user needs; docs/store.md prints the same line."""


def needs_redis() -> None:
    """Skip the test where there is no redis-server."""
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server on this machine; on Debian: apt-get install redis-server")


def free_port() -> int:
    """A port that nobody listens on now, outside the range that connections get theirs from."""
    for _ in range(1000):
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port: int = probe.getsockname()[1]
        # somebody's outgoing connection may take a port of that range before the server does
        candidate = 10_000 + port % 20_000
        with socket.socket() as probe:
            try:
                probe.bind((HOST, candidate))
            except OSError:
                continue
            return candidate
    raise AssertionError("no free port")


class RedisServer:
    """One redis-server.

    Args:
        folder: for its data, settings and log.
        password: of the default user, which the test itself uses.
        store_password: adds the user `store` with `STORE_ACL`.
        authority, keys: TLS alone, with this certificate; clients must show one of the same authority.
        settings: lines of its configuration.
        sentinel: run as a sentinel.
        launcher: what the command begins with, such as `ip netns exec NAME`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        password: str | None = None,
        store_password: str | None = None,
        authority: Authority | None = None,
        keys: KeyPair | None = None,
        settings: Mapping[str, Any] | None = None,
        sentinel: bool = False,
        host: str = HOST,
        launcher: tuple[str, ...] = (),
    ) -> None:
        needs_redis()
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.host, self.port = folder, host, free_port()
        self.password, self.keys, self.authority = password, keys, authority
        self._store_password = store_password
        self._settings = dict(settings or {})
        self._sentinel = sentinel
        self._launcher = launcher
        self._child: Child | None = None

    @property
    def process(self) -> Child:
        assert self._child is not None, "the server has not been started"
        return self._child

    def start(self, wait: bool = True) -> None:
        """Start it; waits until it answers, unless told not to. An occupied port is given up for another."""
        for _ in range(20):
            config = self.folder / "server.conf"
            config.write_text("\n".join(self._lines()) + "\n")
            command = [*self._launcher, "redis-server", str(config), *(["--sentinel"] if self._sentinel else [])]
            self._child = Child(command, self.folder / "log")
            if not wait:
                return
            wait_until(lambda: self.answers() or not self.process.runs, "the server answers")
            if self.process.runs:
                return
            self.port = free_port()
        raise AssertionError(f"redis-server does not start: {(self.folder / 'log').read_text()[-2000:]}")

    def _lines(self) -> Iterator[str]:
        yield from (f"bind {self.host}", f"dir {self.folder}", "daemonize no", "protected-mode no")
        if self.keys is None or self.authority is None:
            yield f"port {self.port}"
        else:
            yield from ("port 0", f"tls-port {self.port}", "tls-replication yes", "tls-auth-clients yes")
            yield f"tls-cert-file {self.keys.certificate}"
            yield f"tls-key-file {self.keys.key}"
            yield f"tls-ca-cert-file {self.authority.certificate}"
        if not self._sentinel:
            yield from ('save ""', "repl-diskless-sync-delay 0")
        if self.password is not None:
            yield f"requirepass {self.password}"
        if self._store_password is not None:
            yield f"user store on >{self._store_password} {STORE_ACL}"
        for name, value in self._settings.items():
            yield from (f"{name} {line}" for line in (value if isinstance(value, list) else [value]))

    def answers(self) -> bool:
        """Whether it answers now; a server that is still loading does not count."""
        with self.admin() as admin:
            try:
                return bool(admin.ping())
            except redis.RedisError:
                return False

    @contextmanager
    def admin(self) -> Iterator[redis.Redis]:
        """A client with every permission, which blocks."""
        options: dict[str, Any] = {}
        if self.keys is not None and self.authority is not None:
            options = {"ssl": True, "ssl_ca_certs": str(self.authority.certificate)}
            options |= {"ssl_certfile": str(self.keys.certificate), "ssl_keyfile": str(self.keys.key)}
        client = redis.Redis(
            self.host, self.port, password=self.password, socket_timeout=10, protocol=2, retry=None, **options
        )
        try:
            yield client
        finally:
            client.close()

    def run(self, *command: Any) -> Any:
        """The reply to one command."""
        with self.admin() as admin:
            return admin.execute_command(*command)

    def info(self, name: str) -> Any:
        with self.admin() as admin:
            return admin.info("everything")[name]

    def leave_room(self, num_bytes: int | None) -> None:
        """Let it take so many bytes more than it holds now; None lifts the limit."""
        self.run("CONFIG", "SET", "maxmemory", 0 if num_bytes is None else self.info("used_memory") + num_bytes)

    def pause(self) -> None:
        self.process.pause()

    def resume(self) -> None:
        self.process.resume()

    def kill(self) -> None:
        self.process.kill()

    def restart(self, empty: bool = True, wait: bool = True) -> None:
        """Crash and start again on the same port, without what was stored unless told otherwise."""
        self.kill()
        if empty:
            for name in ("dump.rdb", "appendonlydir"):
                path = self.folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        port = self.port
        self.start(wait=wait)
        assert self.port == port, "somebody took the server's port"

    def stop(self) -> None:
        """End it, whatever state it is in."""
        if self._child is not None:
            self._child.kill()


@contextmanager
def running(server: RedisServer) -> Iterator[RedisServer]:
    """The server, started; ended with the block."""
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextmanager
def redis_cluster(folder: Path, num_masters: int = 3, store_password: str | None = None) -> Iterator[list[RedisServer]]:
    """A cluster of masters that share the slots evenly, ready for use."""
    settings = {"cluster-enabled": "yes", "cluster-node-timeout": 15_000, "cluster-announce-ip": HOST}
    servers = [
        RedisServer(folder / str(i), settings=settings | {"cluster-port": free_port()}, store_password=store_password)
        for i in range(num_masters)
    ]
    try:
        bounds = [16384 * i // num_masters for i in range(num_masters + 1)]
        for i, server in enumerate(servers):
            server.start()
            server.run("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
            server.run("CLUSTER", "ADDSLOTSRANGE", bounds[i], bounds[i + 1] - 1)
        for server in servers[1:]:
            servers[0].run("CLUSTER", "MEET", HOST, server.port, server._settings["cluster-port"])
        wait_until(lambda: all(_cluster_is_whole(server, num_masters) for server in servers), "the cluster is whole")
        yield servers
    finally:
        for server in servers:
            server.stop()


def _cluster_is_whole(server: RedisServer, num_masters: int) -> bool:
    with server.admin() as admin:
        info = admin.execute_command("CLUSTER INFO")
        slots = admin.execute_command("CLUSTER SLOTS")
    return info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == num_masters == len(slots)


@contextmanager
def redis_sentinel(folder: Path) -> Iterator[tuple[RedisServer, RedisServer, RedisServer]]:
    """A master called `main`, its replica, and one sentinel that fails over alone after a second."""
    master = RedisServer(folder / "master", settings={"repl-ping-replica-period": 1})
    with running(master):
        replica = RedisServer(
            folder / "replica", settings={"replicaof": f"{HOST} {master.port}", "repl-ping-replica-period": 1}
        )
        watched = ["down-after-milliseconds main 1000", "failover-timeout main 3000"]
        lines = {"sentinel": [f"monitor main {HOST} {master.port} 1", *watched]}
        sentinel = RedisServer(folder / "sentinel", settings=lines, sentinel=True)
        with running(replica):
            wait_until(lambda: replica.info("master_link_status") == "up", "the replica follows")
            with running(sentinel):
                wait_until(lambda: _num_replicas(sentinel) == 1, "the sentinel knows the replica")
                yield master, replica, sentinel


def _num_replicas(sentinel: RedisServer) -> int:
    with sentinel.admin() as admin:
        return int(admin.sentinel_masters()["main"]["num-slaves"])
