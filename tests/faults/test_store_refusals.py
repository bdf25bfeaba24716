"""Servers that answer, but with a refusal: the configuration is at fault at the start, the store is later."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kvsluice.errors import ConfigError, CorruptFrame, InternalError, StoreUnavailable
from kvsluice.kvstore.config import StoreConfig
from kvsluice.kvstore.guard import Cause
from kvsluice.kvstore.identity import FrameIdent, frame_key, head_key, manifest_key
from kvsluice.kvstore.opening import open_store
from kvsluice.kvstore.redis import RedisStore
from kvsluice.kvstore.store import Head
from kvsluice.tests.faults.rig.certificates import Authority
from kvsluice.tests.faults.rig.leaks import Baseline, keys_without_end
from kvsluice.tests.faults.rig.processes import wait_until
from kvsluice.tests.faults.rig.redis_server import HOST, STORE_ACL, RedisServer, redis_cluster, running

IDENT = FrameIdent(request_id="r", epoch=1, tenant="t", model_fingerprint="m", recipe_fingerprint="c")
KEY, OTHER = frame_key(IDENT, 0), frame_key(IDENT, 1)
HEAD = head_key(IDENT)
FIRST = Head(1, manifest_key(IDENT))
ADMIN, STORE = "admin-canary-1", "store-canary-2"
MIB = 1024 * 1024


def config(server: RedisServer, scheme: str = "redis", user: str = "", **changes: Any) -> StoreConfig:
    times = {"connect_timeout_s": 2.0, "operation_timeout_s": 2.0, "total_timeout_s": 5.0}
    return StoreConfig(**{"url": f"{scheme}://{user}{HOST}:{server.port}"} | times | changes)


@asynccontextmanager
async def opened(settings: StoreConfig) -> AsyncIterator[RedisStore]:
    baseline = Baseline()
    store = await open_store(settings)
    assert isinstance(store, RedisStore)
    try:
        yield store
        store.check_integrity()
    finally:
        await store.close()
    await baseline.check()


async def refused(settings: StoreConfig, names: str) -> None:
    """Start-up stops with an error that names the field, says nothing that is secret, and leaves nothing open."""
    baseline = Baseline()
    with pytest.raises(ConfigError, match=f"^{names}: .*; allowed: ") as caught:
        await open_store(settings)
    assert "canary" not in repr(caught.value) + str(caught.value.__cause__) + repr(settings)
    await baseline.check()


def secret(folder: Path, text: str) -> str:
    (folder / "secret").write_text(text)
    return str(folder / "secret")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Iterator[RedisServer]:
    with running(RedisServer(tmp_path_factory.mktemp("plain"))) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Iterator[RedisServer]:
    folder = tmp_path_factory.mktemp("guarded")
    with running(RedisServer(folder, password=ADMIN, store_password=STORE)) as server:
        yield server


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory, authority) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("tls"), authority=authority, keys=authority.issue("server"))
    with running(server):
        yield server


async def test_a_missing_password_stops_the_start(guarded):
    await refused(config(guarded), "store_password_file")


async def test_a_wrong_password_stops_the_start(guarded, tmp_path):
    await refused(config(guarded, user="store@", password_file=secret(tmp_path, "canary-wrong")), "store_password_file")


async def test_a_password_that_nobody_wants_stops_the_start(plain, tmp_path):
    await refused(config(plain, password_file=secret(tmp_path, "canary")), "store_password_file")


async def test_an_unknown_user_stops_the_start(guarded, tmp_path):
    await refused(config(guarded, user="nobody@", password_file=secret(tmp_path, STORE)), "store_password_file")


@pytest.mark.parametrize("text", ["", "\n", "x" * 5000, None])
async def test_a_password_file_without_a_password_stops_the_start(guarded, tmp_path, text):
    file = str(tmp_path / "none") if text is None else secret(tmp_path, text)
    await refused(config(guarded, user="store@", password_file=file), "store_password_file")


async def test_the_password_may_stand_in_the_environment(guarded, monkeypatch):
    settings = config(guarded, user="store@", password_env="STORE_SECRET")
    await refused(settings, "store_password_env")
    monkeypatch.setenv("STORE_SECRET", STORE)
    async with opened(settings) as store:
        await store.put(KEY, b"v", 60)


@pytest.mark.parametrize("command", ["set", "getrange", "exists", "del", "pexpire", "watch", "multi", "exec", "scan"])
async def test_every_command_of_the_least_user_is_needed(guarded, tmp_path, command):
    guarded.run("ACL", "SETUSER", "few", "reset", "on", f">{STORE}", *STORE_ACL.split(), f"-{command}")
    await refused(config(guarded, user="few@", password_file=secret(tmp_path, STORE)), "store_url")


async def test_a_user_without_info_is_served_with_a_warning(guarded, tmp_path, caplog):
    guarded.run("ACL", "SETUSER", "few", "reset", "on", f">{STORE}", *STORE_ACL.split(), "-info")
    with caplog.at_level(logging.WARNING, "kvsluice.kvstore"):
        async with opened(config(guarded, user="few@", password_file=secret(tmp_path, STORE))) as store:
            await store.put(KEY, b"v", 60)
    assert "maxmemory-policy" in caplog.text


async def test_the_least_user_may_do_nothing_else(guarded):
    with guarded.admin() as admin:
        admin.execute_command("AUTH", "store", STORE)
        for denied in ("EVAL x 0", "CONFIG GET x", "KEYS *", "FLUSHALL", "SUBSCRIBE x", "GET other"):
            with pytest.raises(Exception, match="no permissions"):
                admin.execute_command(*denied.split())


async def test_a_password_that_changes_is_read_anew(guarded, tmp_path):
    guarded.run("ACL", "SETUSER", "moody", "reset", "on", ">old-canary", *STORE_ACL.split())
    file = secret(tmp_path, "old-canary")
    async with opened(config(guarded, user="moody@", password_file=file)) as store:
        await store.put(KEY, b"v", 60)
        guarded.run("ACL", "SETUSER", "moody", "resetpass", ">new-canary")
        guarded.run("CLIENT", "KILL", "USER", "moody")
        with pytest.raises(StoreUnavailable) as caught:
            await store.get(KEY)
        assert "canary" not in str(caught.value)
        assert store.counters.failed_calls[Cause.AUTH] == 1
        secret(tmp_path, "new-canary")
        assert await store.get(KEY) == b"v"


async def test_a_permission_that_is_taken_away_is_no_configuration_error(guarded, tmp_path):
    guarded.run("ACL", "SETUSER", "moody", "reset", "on", f">{STORE}", *STORE_ACL.split())
    async with opened(config(guarded, user="moody@", password_file=secret(tmp_path, STORE))) as store:
        guarded.run("ACL", "SETUSER", "moody", "-set")
        with pytest.raises(StoreUnavailable):
            await store.put(KEY, b"v", 60)
        assert store.counters.failed_calls[Cause.DENIED] == 1


async def test_plaintext_to_a_tls_port_is_named(encrypted):
    await refused(config(encrypted), "store_url")


async def test_tls_to_a_plaintext_port_is_named(plain, authority):
    await refused(config(plain, "rediss", ca_file=str(authority.certificate)), "store_url")


async def test_tls_needs_a_certificate_of_the_right_authority_and_host(encrypted, authority, tmp_path):
    client = authority.issue("client")
    pair = {"cert_file": str(client.certificate), "key_file": str(client.key)}
    trusted = {"ca_file": str(authority.certificate)}
    async with opened(config(encrypted, "rediss", **trusted, **pair)) as store:
        await store.put(KEY, b"v", 60)
    await refused(config(encrypted, "rediss", **trusted), "store_url")  # the server wants a certificate
    stranger = Authority(tmp_path / "stranger")
    await refused(config(encrypted, "rediss", ca_file=str(stranger.certificate), **pair), "store_url")
    await refused(config(encrypted, "rediss", **pair), "store_url")  # the system does not know this authority
    elsewhere = RedisServer(tmp_path / "other", authority=authority, keys=authority.issue("other", ("other.example",)))
    with running_unchecked(elsewhere):
        await refused(config(elsewhere, "rediss", **trusted, **pair), "store_url")


def running_unchecked(server: RedisServer):
    """A server whose certificate is for another host, so the rig's own client cannot ask whether it is up."""
    server.answers = lambda: "Ready to accept" in (server.folder / "log").read_text()  # type: ignore[method-assign]
    return running(server)


@pytest.mark.parametrize("name", ["ca_file", "cert_file"])
async def test_a_file_that_holds_no_certificate_is_named(encrypted, authority, tmp_path, name):
    client = authority.issue("client")
    files = {"ca_file": str(authority.certificate), "cert_file": str(client.certificate), "key_file": str(client.key)}
    await refused(config(encrypted, "rediss", **files | {name: secret(tmp_path, "nothing")}), f"store_{name}")


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
async def test_a_server_that_drops_living_values_is_refused(tmp_path, policy):
    with running(RedisServer(tmp_path, settings={"maxmemory-policy": policy})) as server:
        await refused(config(server), "store_url")


async def test_a_cluster_and_one_server_are_not_mixed_up(plain, tmp_path):
    await refused(config(plain, "redis+cluster"), "store_url")
    with redis_cluster(tmp_path) as masters, pytest.raises(ConfigError, match=r"^store_url: "):
        for _ in range(20):  # the probe's key may happen to live here
            await (await open_store(config(masters[0]))).close()


async def test_an_absent_server_is_unavailable_not_misconfigured(tmp_path):
    baseline = Baseline()
    with running(RedisServer(tmp_path)) as server:
        pass
    with pytest.raises(StoreUnavailable):
        await open_store(config(server))
    await baseline.check()


async def test_a_replica_is_unavailable_for_writes(plain, tmp_path):
    with running(RedisServer(tmp_path, settings={"replicaof": f"{HOST} {plain.port}"})) as replica:
        wait_until(lambda: replica.info("master_link_status") == "up", "the replica follows")
        with pytest.raises(StoreUnavailable, match="replica"):
            await open_store(config(replica))


async def test_a_master_that_becomes_a_replica_still_reads(plain, tmp_path):
    with running(RedisServer(tmp_path)) as server:
        async with opened(config(server)) as store:
            await store.put(KEY, b"v", 60)
            server.run("CONFIG", "SET", "replica-serve-stale-data", "yes")
            server.run("REPLICAOF", HOST, 1)  # nobody is there, so it keeps what it has
            with pytest.raises(StoreUnavailable, match="replica"):
                await store.put(OTHER, b"w", 60)
            assert store.counters.failed_attempts[Cause.READ_ONLY] == 4
            assert store.counters.breaker_openings == 0
            server.run("REPLICAOF", "NO", "ONE")
            await store.put(OTHER, b"w", 60)
            assert await store.get(KEY) == b"v"


async def test_a_loading_server_is_unavailable_until_it_has_loaded(tmp_path):
    settings = {"key-load-delay": 2000, "loading-process-events-interval-bytes": 1024}
    with running(RedisServer(tmp_path)) as server:
        with server.admin() as admin, admin.pipeline(transaction=False) as pipe:
            for i in range(1000):
                pipe.set(f"kvsluice:filler:{i}", bytes(100), px=600_000)
            pipe.execute()
        async with opened(config(server)) as store:
            await store.put(KEY, b"v", 600)
            server.run("SAVE")
            server._settings |= settings
            server.restart(empty=False, wait=False)
            with pytest.raises(StoreUnavailable):
                while await store.get(KEY) is None:
                    raise AssertionError("a loading server has no misses")
            wait_until(lambda: "DB loaded" in (tmp_path / "log").read_text(), "the server has loaded")
            deadline = asyncio.get_running_loop().time() + 20
            while True:
                try:
                    assert await store.get(KEY) == b"v"
                    break
                except StoreUnavailable:
                    assert asyncio.get_running_loop().time() < deadline
            assert store.counters.failed_attempts[Cause.LOADING] > 0


async def test_too_many_clients_are_unavailable_until_there_are_fewer(tmp_path):
    with running(RedisServer(tmp_path)) as server, server.admin() as admin:
        admin.ping()
        async with opened(config(server)) as store:
            admin.config_set("maxclients", 1)
            admin.client_kill_filter(_type="normal", skipme=True)
            with pytest.raises(StoreUnavailable):
                await store.put(KEY, b"v", 60)
            assert store.counters.failed_attempts[Cause.MAX_CLIENTS] > 0
            admin.config_set("maxclients", 100)
            await store.put(KEY, b"v", 60)


async def test_a_full_server_refuses_values_and_serves_what_it_has(plain):
    plain.run("FLUSHALL")
    async with opened(config(plain)) as store:
        await store.put(KEY, b"v", 60)
        await store.compare_and_set_head(HEAD, None, FIRST, 60)
        plain.leave_room(0)
        try:
            for _ in range(10):
                with pytest.raises(StoreUnavailable, match="full"):
                    await store.put(OTHER, bytes(4 * MIB), 60)
            with pytest.raises(StoreUnavailable, match="full"):
                await store.compare_and_set_head(HEAD, FIRST, Head(2, manifest_key(IDENT)), 60)
            assert store.counters.failed_calls[Cause.FULL] == 11
            assert store.counters.retries == 0
            assert store.counters.breaker_openings == 0
            assert await store.get(KEY) == b"v"
            assert await store.read_head(HEAD) == FIRST
            assert await store.exists(OTHER) is False
            assert await store.renew(KEY, 600)
            assert await store.delete(KEY)
        finally:
            plain.leave_room(None)
        await store.put(OTHER, bytes(4 * MIB), 60)
    assert keys_without_end(plain) == []


async def test_what_others_wrote_under_our_keys_is_not_believed(plain):
    plain.run("FLUSHALL")
    async with opened(config(plain, max_value_bytes=1000)) as store:
        plain.run("SET", KEY, bytes(1001), "PX", 60_000)
        with pytest.raises(CorruptFrame):
            await store.get(KEY)
        with pytest.raises(InternalError):
            await store.put(KEY, bytes(1000), 60)
        assert await store.delete(KEY)
        plain.run("RPUSH", KEY, "a list")
        for call in (store.get(KEY), store.put(KEY, b"v", 60)):
            with pytest.raises(StoreUnavailable, match="refused"):
                await call
        assert await store.delete(KEY)
        for raw in (b"", b"junk", bytes(100_000)):
            plain.run("SET", HEAD, raw, "PX", 60_000)
            with pytest.raises(CorruptFrame):
                await store.read_head(HEAD)
            with pytest.raises(CorruptFrame):
                await store.compare_and_set_head(HEAD, None, FIRST, 60)
        assert plain.run("GET", HEAD) == bytes(100_000)  # nobody knows whose epoch that was
        await store.put(KEY, b"v", 60)
