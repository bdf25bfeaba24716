"""Parts of a running service are killed: streams go on once a new worker is there, and the next request works.

The tests share one service and run in order; the last one drains it.
"""

from __future__ import annotations

import signal
import threading

import pytest

from kvsluice.client import Client
from kvsluice.errors import WorkerLost
from kvsluice.services.processes import wait_gone

LONG_PROMPT = [(7 * i) % 40_000 + 100 for i in range(4000)]
DEADLINE_S = 90.0


@pytest.fixture
def client(victim):
    with Client(victim.address, timeout_s=DEADLINE_S) as client:
        yield client


def works(client: Client) -> bool:
    done = client.generate("Once upon a time", max_tokens=4, ignore_eos=True)
    return len(done.token_ids) == 4


def test_prefill_killed_while_it_computes(victim, client):
    stream = client.stream(LONG_PROMPT, max_tokens=8)
    victim.wait_busy("ray::PrefillWorker", 0.5)
    victim.kill("ray::PrefillWorker")
    assert sum(len(chunk.token_ids) for chunk in stream) == 8
    assert stream.completion.durability.migrations >= 1
    victim.wait_said("kvsluice: the new prefill-0 serves")
    assert victim.service.log.read_text().count("kvsluice: prefill-0 died; a new one is started") == 1


def test_decode_killed_while_it_streams(victim, client):
    options = {"max_tokens": 60, "ignore_eos": True, "temperature": 0.0}
    whole = [client.generate(f"Story {i}:", **options).token_ids for i in range(2)]
    streams = [client.stream(f"Story {i}:", **options) for i in range(2)]
    for stream in streams:
        for _ in range(3):
            next(stream)
    victim.kill("ray::DecodeWorker")
    for stream, want in zip(streams, whole, strict=True):
        for _ in stream:
            pass
        assert stream.completion.token_ids == want


def test_gateway_killed(victim, client):
    stream = client.stream("A story:", max_tokens=400, ignore_eos=True)
    next(stream)
    old = victim.kill("ray::Gateway")
    with pytest.raises(WorkerLost):
        for _ in stream:
            pass
    assert wait_gone([old], 10.0) == []
    # it comes back at the same address; until then connections are refused
    for _ in range(200):
        try:
            assert works(client)
            return
        except WorkerLost:
            threading.Event().wait(0.2)
    pytest.fail("the gateway did not come back")


def test_sigterm_lets_running_requests_finish_and_leaves_nothing_behind(victim, client):
    tree = victim.processes()
    assert len(tree) > 5
    stream = client.stream("Once upon a time", max_tokens=25, ignore_eos=True)
    next(stream)
    victim.service.process.send_signal(signal.SIGTERM)
    for _ in stream:
        pass
    assert stream.completion.usage.completion_tokens == 25
    assert victim.service.process.wait(60) == 0
    assert wait_gone(tree, 5.0) == []
    assert "stopped" in victim.service.log_tail()
