"""The rig itself: every primitive does what it says, or the tests that use it would show nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import redis

from kvsluice.tests.faults.rig.leaks import Baseline, descriptors, keys_without_end
from kvsluice.tests.faults.rig.network import network
from kvsluice.tests.faults.rig.processes import Child, process_state, wait_until
from kvsluice.tests.faults.rig.proxy import Proxy, Rules
from kvsluice.tests.faults.rig.redis_server import HOST, RedisServer, redis_sentinel, running


@pytest.fixture(scope="module")
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets."""
    listener = socket.create_server((HOST, 0))

    def serve(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            while data := client.recv(65536):
                client.sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()[1]
    listener.close()


@pytest.fixture
def proxy(echo) -> Iterator[Proxy]:
    with Proxy(HOST, echo) as proxy:
        yield proxy


@contextlib.contextmanager
def connected(proxy: Proxy, timeout_s: float = 10.0) -> Iterator[socket.socket]:
    with socket.create_connection((HOST, proxy.port), timeout_s) as client:
        yield client


def receive(client: socket.socket, num_bytes: int) -> bytes:
    """Up to so many bytes; less where the connection ends before."""
    got = b""
    while len(got) < num_bytes and (data := client.recv(65536)):
        got += data
    return got


def test_an_honest_proxy_changes_nothing_and_counts(proxy):
    data = os.urandom(100_000)
    with connected(proxy) as client:
        client.sendall(data)
        assert receive(client, len(data)) == data
        assert (proxy.num_accepted, proxy.num_open) == (1, 1)
    wait_until(lambda: proxy.num_open == 0, "the connection ends")
    # counted once they are passed on: the last ones may have arrived before that
    assert (proxy.request_bytes, proxy.reply_bytes) == (100_000, 100_000)


def test_a_proxy_flips_the_byte_that_it_is_told(proxy):
    proxy.replies = Rules(flip_at=20_000)
    data = bytes(50_000)
    with connected(proxy) as client:
        client.sendall(data)
        got = receive(client, len(data))
    assert [i for i, byte in enumerate(got) if byte] == [20_000]


@pytest.mark.parametrize("after", [0, 1, 5000, 40_000])
def test_a_proxy_closes_after_so_many_bytes(proxy, after):
    proxy.replies = Rules(close_after=after)
    with connected(proxy) as client:
        client.sendall(bytes(50_000))
        got = b""
        with contextlib.suppress(ConnectionResetError):
            while data := client.recv(65536):
                got += data
    assert len(got) <= after
    assert proxy.reply_bytes == after


@pytest.mark.parametrize("after", [0, 1, 5000])
def test_a_proxy_resets_after_so_many_bytes(proxy, after):
    proxy.requests = Rules(reset_after=after)
    with connected(proxy) as client, pytest.raises(ConnectionError):
        while True:
            client.sendall(bytes(1000))
            time.sleep(0.01)
    assert proxy.request_bytes == after


def test_a_proxy_loses_one_direction_and_nobody_is_told(proxy):
    with connected(proxy, timeout_s=0.3) as client:
        client.sendall(b"before")
        assert receive(client, 6) == b"before"
        proxy.replies = Rules(drop=True)
        client.sendall(b"lost")
        with pytest.raises(TimeoutError):
            client.recv(1)
        wait_until(lambda: proxy.request_bytes == 10, "the request arrives all the same")
        proxy.clear()
        client.sendall(b"after")
        assert receive(client, 5) == b"after"


def test_a_proxy_holds_and_lets_go(proxy):
    proxy.requests = Rules(hold=True)
    with connected(proxy, timeout_s=0.3) as client:
        client.sendall(b"held")
        with pytest.raises(TimeoutError):
            client.recv(1)
        proxy.clear()
        client.settimeout(10)
        assert receive(client, 4) == b"held"


def test_a_proxy_spares_later_connections(proxy):
    with connected(proxy, timeout_s=0.3) as first:
        wait_until(lambda: proxy.num_accepted == 1, "the connection is accepted")
        proxy.replies = Rules(drop=True, before=1)
        first.sendall(b"x")
        with pytest.raises(TimeoutError):
            first.recv(1)
        with connected(proxy) as second:
            second.sendall(b"y")
            assert second.recv(1) == b"y"


def test_a_proxy_delays_and_limits(proxy):
    proxy.requests = Rules(delay_s=0.1, jitter_s=0.05)
    proxy.replies = Rules(bytes_per_s=100_000)
    began = time.monotonic()
    with connected(proxy) as client:
        client.sendall(bytes(30_000))
        receive(client, 30_000)
    assert time.monotonic() - began > 0.1 + 0.3


def test_a_proxy_resets_all_at_once(proxy):
    with connected(proxy) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        proxy.reset_all()
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_a_child_is_paused_resumed_and_killed(tmp_path):
    child = Child([sys.executable, "-c", "import time\nwhile True: time.sleep(0.01)"], tmp_path / "log")
    try:
        child.pause()
        assert process_state(child.pid) == "T"
        child.resume()
        wait_until(lambda: process_state(child.pid) in {"R", "S"}, "the process goes on")
        child.pause()
    finally:
        child.kill()
    assert not child.runs
    assert process_state(child.pid) == ""


def test_a_server_keeps_its_port_and_loses_what_it_held(tmp_path):
    with running(RedisServer(tmp_path)) as server:
        server.run("SET", "k", "v", "PX", 60_000)
        server.run("SAVE")
        server.restart(empty=False)
        assert server.run("GET", "k") == b"v"
        server.restart()
        assert server.run("GET", "k") is None
    assert not server.process.runs


def test_a_paused_server_answers_nothing_until_it_goes_on(tmp_path):
    with running(RedisServer(tmp_path)) as server:
        server.pause()
        with (
            redis.Redis(HOST, server.port, socket_timeout=0.2, retry=None) as client,
            pytest.raises(redis.TimeoutError),
        ):
            client.ping()
        server.resume()
        assert server.answers()


def test_a_full_server_refuses_until_it_has_room(tmp_path):
    with running(RedisServer(tmp_path)) as server:
        server.leave_room(100_000)
        with pytest.raises(redis.OutOfMemoryError):
            server.run("SET", "k", bytes(1_000_000), "PX", 60_000)
        server.leave_room(None)
        server.run("SET", "k", bytes(1_000_000), "PX", 60_000)


def test_a_sentinel_names_another_master_when_the_first_is_gone(tmp_path):
    with redis_sentinel(tmp_path) as (master, replica, sentinel):
        master.kill()
        wait_until(
            lambda: sentinel.run("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main")[1] == str(replica.port).encode(),
            "the sentinel names the replica",
        )
        wait_until(lambda: replica.info("role") == "master", "the replica is master")


def test_a_cut_cable_is_silent_and_can_be_mended(tmp_path):
    with network() as net, running(RedisServer(tmp_path, host=net.far, launcher=net.launcher)) as server:
        with redis.Redis(net.far, server.port, socket_timeout=0.3, retry=None) as client:
            client.ping()
            net.cut()
            with pytest.raises(redis.TimeoutError):
                client.ping()
            net.mend()
        wait_until(server.answers, "the server answers again")


def test_keys_without_an_end_are_found(tmp_path):
    with running(RedisServer(tmp_path)) as server:
        server.run("SET", "ends", "v", "PX", 60_000)
        server.run("SET", "stays", "v")
        assert keys_without_end(server) == ["stays"]


async def test_a_baseline_sees_what_is_left_open():
    baseline = Baseline()
    assert baseline.grown() == {}
    left, right = socket.socketpair()
    task = asyncio.create_task(asyncio.sleep(60))
    assert baseline.grown()["socket"] == 2
    assert len(baseline.grown()["tasks"]) == 1
    left.close(), right.close()
    task.cancel()
    await baseline.check()
    assert descriptors()["socket"] == baseline._descriptors["socket"]
