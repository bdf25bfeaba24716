"""A Redis store over bad networks and with servers that freeze, die and forget: bounded, healed, nothing made up.

Times are asserted only where they say "bounded": against bounds many times what the store's own timeouts add up to.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.crc import key_slot

from kvsluice.errors import StoreUnavailable
from kvsluice.kvstore.config import StoreConfig
from kvsluice.kvstore.guard import Cause, Trouble
from kvsluice.kvstore.identity import FrameIdent, frame_key, head_key, manifest_key
from kvsluice.kvstore.opening import open_store
from kvsluice.kvstore.redis import RedisStore
from kvsluice.kvstore.store import Head, HeadWrite
from kvsluice.tests.faults.rig.leaks import Baseline, keys_without_end
from kvsluice.tests.faults.rig.network import network
from kvsluice.tests.faults.rig.processes import wait_until
from kvsluice.tests.faults.rig.proxy import Proxy, Rules
from kvsluice.tests.faults.rig.redis_server import HOST, RedisServer, redis_cluster, redis_sentinel, running

IDENT = FrameIdent(request_id="r", epoch=1, tenant="t", model_fingerprint="m", recipe_fingerprint="c")
KEY, OTHER, AFTERWARDS = (frame_key(IDENT, index) for index in (0, 1, 10**6))
HEAD = head_key(IDENT)
FIRST, SECOND = Head(1, manifest_key(IDENT)), Head(2, manifest_key(IDENT))
MIB = 1024 * 1024
BOUNDED_S = 20.0
"""Ten times the longest that a call may take with the settings below."""


def config(port: int, host: str = HOST, **changes: Any) -> StoreConfig:
    """Impatient settings, so that faults are over soon."""
    settings: dict[str, Any] = {"connect_timeout_s": 0.5, "operation_timeout_s": 0.5, "total_timeout_s": 2.0}
    settings |= {"breaker_pause_s": 0.1, "max_operations": 8} | changes
    return StoreConfig(**{"url": f"redis://{host}:{port}"} | settings)


@asynccontextmanager
async def opened(settings: StoreConfig, proxy: Proxy | None = None) -> AsyncIterator[RedisStore]:
    """A store that must leave neither descriptors nor tasks behind; what `proxy` holds is not its fault."""
    baseline = Baseline()
    store = await open_store(settings)
    assert isinstance(store, RedisStore)
    try:
        yield store
        store.check_integrity()
        assert store.counters.operations_in_flight == store.counters.bytes_in_flight == 0
    finally:
        await store.close()
        if proxy is not None:
            proxy.clear()
            proxy.reset_all()
    await baseline.check()


async def healed(store: RedisStore) -> None:
    """The store does all its work again, by itself, within a bounded time."""
    deadline = time.monotonic() + BOUNDED_S
    while True:
        try:
            await store.put(AFTERWARDS, b"healed", 60)
            assert await store.get(AFTERWARDS) == b"healed"
            return
        except StoreUnavailable:
            assert time.monotonic() < deadline, "the store does not heal"
            await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[RedisServer]:
    with running(RedisServer(tmp_path_factory.mktemp("redis"))) as server:
        yield server


@pytest.fixture
def server(shared) -> Iterator[RedisServer]:
    shared.run("FLUSHALL")
    yield shared
    assert keys_without_end(shared) == []


@pytest.fixture
def proxy(server) -> Iterator[Proxy]:
    with Proxy(HOST, server.port) as proxy:
        yield proxy


async def test_a_frozen_server_costs_a_bounded_time_and_then_almost_none(server):
    async with opened(config(server.port)) as store:
        await store.put(KEY, b"v", 60)
        server.pause()
        try:
            began = time.monotonic()
            results = await asyncio.gather(*(store.get(KEY) for _ in range(200)), return_exceptions=True)
            assert time.monotonic() - began < BOUNDED_S
            assert {type(result) for result in results} == {Trouble}
            assert store.counters.breaker_openings >= 1
            assert store.counters.failed_calls[Cause.OPEN] > 100  # most did not wait for a timeout of their own
            assert store.counters.attempts < 60
        finally:
            server.resume()
        await healed(store)
        assert await store.get(KEY) == b"v"


async def test_a_server_that_restarts_empty_gives_misses_and_no_errors(tmp_path):
    with running(RedisServer(tmp_path)) as own:
        async with opened(config(own.port)) as store:
            await store.put(KEY, b"v", 60)
            await store.compare_and_set_head(HEAD, None, SECOND, 60)
            own.restart()
            assert await store.get(KEY) is None
            assert await store.read_head(HEAD) is None
            assert await store.compare_and_set_head(HEAD, SECOND, SECOND, 60) is HeadWrite.CHANGED
            assert await store.compare_and_set_head(HEAD, None, SECOND, 60) is HeadWrite.WRITTEN


async def test_a_dead_server_is_unavailable_until_it_is_back(tmp_path):
    with running(RedisServer(tmp_path)) as own:
        async with opened(config(own.port)) as store:
            own.kill()
            began = time.monotonic()
            for _ in range(5):
                with pytest.raises(StoreUnavailable):
                    await store.put(KEY, b"v", 60)
            assert time.monotonic() - began < BOUNDED_S
            assert store.counters.failed_attempts[Cause.UNREACHABLE] >= 5
            own.start()
            await healed(store)


async def test_flushing_all_the_time_only_makes_values_absent(server):
    async with opened(config(server.port)) as store:
        ended = asyncio.Event()

        async def flush() -> None:
            while not ended.is_set():
                await asyncio.to_thread(server.run, "FLUSHALL")

        flusher = asyncio.create_task(flush())
        found = 0
        for i in range(300):
            value = b"%d" % i
            await store.put(frame_key(IDENT, i), value, 60)
            got = await store.get(frame_key(IDENT, i))
            assert got in (None, value)
            found += got is not None
            write = await store.compare_and_set_head(HEAD, None, FIRST, 60)
            assert write is HeadWrite.WRITTEN
            assert await store.read_head(HEAD) in (None, FIRST)
        ended.set()
        await flusher
        assert found > 0
        assert store.counters.failed_calls.total() == 0


@pytest.mark.parametrize("direction", ["requests", "replies"])
async def test_what_is_lost_once_is_sent_again(proxy, direction):
    async with opened(config(proxy.port), proxy) as store:
        setattr(proxy, direction, Rules(drop=True, before=proxy.num_accepted))
        await store.put(KEY, b"v", 60)
        assert store.counters.failed_attempts[Cause.TIMEOUT] >= 1
        assert await store.get(KEY) == b"v"
        setattr(proxy, direction, Rules(drop=True, before=proxy.num_accepted))
        assert await store.compare_and_set_head(HEAD, None, FIRST, 60) is HeadWrite.WRITTEN
        setattr(proxy, direction, Rules(drop=True, before=proxy.num_accepted))
        assert await store.compare_and_set_head(HEAD, FIRST, SECOND, 60) is HeadWrite.WRITTEN
        assert await store.read_head(HEAD) == SECOND


async def test_a_write_whose_reply_was_lost_is_there(proxy, server):
    """The caller is told that it failed, which is not that it did nothing: writing again succeeds."""
    async with opened(config(proxy.port), proxy) as store:
        proxy.replies = Rules(drop=True)
        with pytest.raises(StoreUnavailable):
            await store.put(KEY, b"v", 60)
        assert server.run("GET", KEY) == b"v"
        proxy.clear()
        await healed(store)
        await store.put(KEY, b"v", 60)
        assert await store.get(KEY) == b"v"


async def test_a_silent_partition_is_bounded_and_heals(proxy):
    async with opened(config(proxy.port), proxy) as store:
        await store.put(KEY, bytes(MIB), 60)
        proxy.partition()
        began = time.monotonic()
        calls = [store.put(frame_key(IDENT, i), bytes(4 * MIB), 60) for i in range(2, 40)]
        results = await asyncio.gather(*calls, store.scan(""), return_exceptions=True)
        assert time.monotonic() - began < BOUNDED_S
        assert all(isinstance(result, StoreUnavailable) for result in results)
        assert store.counters.peak_bytes <= 64 * MIB
        proxy.clear()
        await healed(store)
        assert await store.get(KEY) == bytes(MIB)


async def test_a_cut_cable_is_bounded_and_heals(tmp_path):
    with network() as net, running(RedisServer(tmp_path, host=net.far, launcher=net.launcher)) as own:
        async with opened(config(own.port, net.far)) as store:
            await store.put(KEY, b"v", 60)
            net.cut()
            began = time.monotonic()
            for call in (store.put(OTHER, b"w", 60), store.get(KEY), store.renew(KEY, 60), store.delete(OTHER)):
                with pytest.raises(StoreUnavailable):
                    await call
            assert time.monotonic() - began < BOUNDED_S
            net.mend()
            await healed(store)
            assert await store.get(KEY) == b"v"


async def test_a_link_of_one_megabit_holds_a_bounded_number_of_bytes(proxy):
    room = 8 * MIB
    async with opened(config(proxy.port, max_bytes_in_flight=room), proxy) as store:
        proxy.requests = Rules(bytes_per_s=125_000)
        calls = [store.put(frame_key(IDENT, i), bytes(4 * MIB), 60) for i in range(20)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, StoreUnavailable) for result in results)
        assert store.counters.peak_bytes <= room
        assert store.counters.peak_operations <= 8
        assert set(store.counters.failed_calls) <= {Cause.TIMEOUT, Cause.OPEN, Cause.BUSY}
        proxy.clear()
        await healed(store)


async def test_a_slow_link_only_takes_time(proxy):
    async with opened(config(proxy.port, operation_timeout_s=30, total_timeout_s=60), proxy) as store:
        proxy.replies = Rules(bytes_per_s=500_000)
        value = os.urandom(200_000)
        await store.put(KEY, value, 60)
        assert await store.get(KEY) == value
        assert store.counters.retries == 0


async def test_jitter_makes_no_retries(proxy):
    async with opened(config(proxy.port, operation_timeout_s=20, total_timeout_s=30), proxy) as store:
        proxy.requests = proxy.replies = Rules(delay_s=0.0, jitter_s=0.1)
        await asyncio.gather(*(store.put(frame_key(IDENT, i), b"%d" % i, 60) for i in range(40)))
        got = await asyncio.gather(*(store.get(frame_key(IDENT, i)) for i in range(40)))
        assert got == [b"%d" % i for i in range(40)]
        assert store.counters.retries <= store.counters.calls // 10


@pytest.mark.parametrize("how", ["close_after", "reset_after"])
@pytest.mark.parametrize("direction", ["requests", "replies"])
async def test_a_connection_that_ends_at_any_byte_loses_nothing(proxy, direction, how):
    """Every byte of the short exchanges, and some of the long ones."""
    value = os.urandom(3000)
    places = [*range(0, 60, 2), 100, 150, 500, 2999, 3050, 3100]
    async with opened(config(proxy.port, operation_timeout_s=5, total_timeout_s=20), proxy) as store:
        for number, after in enumerate(places):
            key, head = frame_key(IDENT, number), head_key(FrameIdent(**vars(IDENT) | {"request_id": f"r{number}"}))
            proxy.clear()
            proxy.reset_all()
            setattr(proxy, direction, Rules(**{how: after}, before=proxy.num_accepted + 1))
            await store.put(key, value, 60)
            proxy.reset_all()
            setattr(proxy, direction, Rules(**{how: after}, before=proxy.num_accepted + 1))
            assert await store.compare_and_set_head(head, None, FIRST, 60) is HeadWrite.WRITTEN
            proxy.reset_all()
            setattr(proxy, direction, Rules(**{how: after}, before=proxy.num_accepted + 1))
            assert await store.get(key) == value
            assert await store.read_head(head) == FIRST
        assert store.counters.failed_calls.total() == 0
        assert store.counters.retries > len(places)


async def test_a_flipped_byte_never_passes_for_something_else(proxy, server):
    """Whatever byte of a reply changes: the right head, an error, or, where lengths hide it, an absent one."""
    async with opened(config(proxy.port, operation_timeout_s=0.2, breaker_failures=10**6), proxy) as store:
        await store.compare_and_set_head(HEAD, None, SECOND, 600)
        outcomes = []
        for place in range(0, 180, 3):
            proxy.reset_all()
            proxy.replies = Rules(flip_at=place, before=proxy.num_accepted + 1)
            try:
                outcomes.append(await store.read_head(HEAD))
            except Exception as exc:
                outcomes.append(type(exc).__name__)
        proxy.clear()
        assert set(outcomes) <= {SECOND, "CorruptFrame", "Trouble"}
        assert SECOND in outcomes
        assert "CorruptFrame" in outcomes
        await healed(store)
        assert await store.read_head(HEAD) == SECOND


async def test_cancelled_calls_leave_no_reply_behind(server):
    """A reply that nobody read must never answer the next call on the same connection."""
    async with opened(config(server.port, max_operations=4)) as store:
        for i in range(20):
            await store.put(frame_key(IDENT, i), b"%d" % i * 2000, 60)
        for round_number in range(30):
            tasks = [asyncio.create_task(store.get(frame_key(IDENT, i))) for i in range(20)]
            for _ in range(round_number % 7):
                await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for i, result in enumerate(results):
                assert isinstance(result, asyncio.CancelledError) or result == b"%d" % i * 2000
        assert store.counters.operations_in_flight == 0


async def test_closing_ends_what_is_under_way(server):
    async with opened(config(server.port, total_timeout_s=600, operation_timeout_s=600)) as store:
        server.pause()
        try:
            tasks = [asyncio.create_task(store.get(KEY)) for _ in range(20)]
            await asyncio.sleep(0.05)
            began = time.monotonic()
            await store.close()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert time.monotonic() - began < BOUNDED_S
            assert {result.cause for result in results} == {Cause.CLOSED}
        finally:
            server.resume()


async def test_a_frozen_node_of_a_cluster_leaves_the_others_at_work(tmp_path):
    with redis_cluster(tmp_path) as masters:
        async with opened(config(masters[0].port, url=f"redis+cluster://{HOST}:{masters[0].port}")) as store:
            keys = [frame_key(IDENT, i) for i in range(30)]
            for key in keys:
                await store.put(key, key.encode(), 60)
            masters[2].pause()
            try:
                results = await asyncio.gather(*(store.get(key) for key in keys), return_exceptions=True)
                # while its own calls time out they take places, so others may have to wait too long; not afterwards
                assert all(isinstance(r, Trouble) or r == key.encode() for key, r in zip(keys, results, strict=True))
                frozen = [key for key in keys if key_slot(key.encode()) >= 16384 * 2 // 3]
                assert 0 < len(frozen) < len(keys)
                with pytest.raises(Trouble):
                    await store.get(frozen[0])
                for key in set(keys) - set(frozen):
                    assert await store.get(key) == key.encode()
            finally:
                masters[2].resume()
            await store_heals_for(store, keys)


async def store_heals_for(store: RedisStore, keys: list[Any]) -> None:
    """Every value is found again within a bounded time."""
    deadline = time.monotonic() + BOUNDED_S
    for key in keys:
        while True:
            try:
                assert await store.get(key) == key.encode()
                break
            except StoreUnavailable:
                assert time.monotonic() < deadline, "the store does not heal"
                await asyncio.sleep(0.02)


async def test_keys_that_move_between_nodes_are_found_all_the_time(tmp_path):
    with redis_cluster(tmp_path) as masters:
        async with opened(config(masters[0].port, url=f"redis+cluster://{HOST}:{masters[0].port}")) as store:
            await store.put(KEY, b"v", 60)
            slot = masters[0].run("CLUSTER", "KEYSLOT", KEY)
            ids = [server.run("CLUSTER", "MYID").decode() for server in masters]
            old = next(i for i, server in enumerate(masters) if server.run("CLUSTER", "COUNTKEYSINSLOT", slot))
            new = (old + 1) % 3
            masters[new].run("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[old])
            masters[old].run("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[new])
            assert await store.get(KEY) == b"v"  # not moved yet
            masters[old].run("MIGRATE", HOST, masters[new].port, KEY, 0, 5000)
            assert await store.get(KEY) == b"v"  # by ASK
            await store.put(KEY, b"v", 600)
            assert await store.renew(KEY, 900)
            for server in (masters[new], masters[old], masters[3 - old - new]):
                server.run("CLUSTER", "SETSLOT", slot, "NODE", ids[new])
            assert await store.get(KEY) == b"v"  # by MOVED
            assert await store.delete(KEY)


async def test_a_sentinel_s_new_master_is_found(tmp_path):
    with redis_sentinel(tmp_path) as (master, replica, sentinel):
        url = f"redis+sentinel://{HOST}:{sentinel.port}/main"
        async with opened(config(sentinel.port, url=url)) as store:
            await store.put(KEY, b"v", 600)
            # WAIT would speak of what its own connection wrote
            await asyncio.to_thread(wait_until, lambda: replica.run("DBSIZE") == 1, "the replica has the value")
            master.kill()
            await healed(store)
            assert await store.get(KEY) == b"v"
            assert replica.info("role") == "master"
