"""Decode workers of a running service are killed, frozen and cut off from their store in the middle of answers.

Every stream ends with exactly the tokens of a run without a fault.
"""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvsluice.client import Client
from kvsluice.tests.faults.rig.leaks import keys_without_end
from kvsluice.tests.faults.rig.processes import wait_until

PROMPT = [(7 * i) % 40_000 + 100 for i in range(600)]
SAMPLING = [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}]


@pytest.fixture
def client(fleet):
    with Client(fleet.address, timeout_s=120.0) as client:
        yield client


def interrupted(client, at: int, do, **options):
    """A finished request in the middle of which something was done."""
    stream = client.stream(PROMPT, ignore_eos=True, **options)
    came, done = 0, False
    for chunk in stream:
        came += len(chunk.token_ids)
        if came >= at and not done:
            done = True
            do()
    assert done
    return stream.completion


def test_a_frozen_worker_loses_its_lease_and_writes_nothing_more(fleet, client):
    options = {"max_tokens": 70, "durability": "tokens", "temperature": 0.0}
    whole = client.generate(PROMPT, ignore_eos=True, **options)
    frozen = []

    def freeze() -> None:
        frozen.append(fleet.busiest("decode"))
        os.kill(frozen[0].pid, signal.SIGSTOP)

    done = interrupted(client, 30, freeze, **options)
    assert done.token_ids == whole.token_ids
    assert done.durability.migrations == 1
    os.kill(frozen[0].pid, signal.SIGCONT)
    # it finds its stream closed and its request taken over, and serves again
    fleet.await_whole()
    assert client.generate(PROMPT, ignore_eos=True, **options).token_ids == whole.token_ids
    assert keys_without_end(fleet.redis) == []


def test_streams_under_load_all_go_on(fleet, client):
    prompts = [PROMPT[i : i + 200] for i in range(6)]
    options = [
        {"max_tokens": 40, "durability": level, "ignore_eos": True, **SAMPLING[i % 2]}
        for i, level in enumerate(["none", "handoff", "tokens", "tokens", "tokens", "none"])
    ]
    with ThreadPoolExecutor(6) as threads:
        whole = list(threads.map(lambda p, o: client.generate(p, **o), prompts, options))
        fleet.await_whole()
        begun = threading.Barrier(7)

        def run(prompt, option):
            stream = client.stream(prompt, **option)
            next(stream)
            begun.wait(60)
            for _ in stream:
                pass
            return stream.completion

        running = [threads.submit(run, p, o) for p, o in zip(prompts, options, strict=True)]
        begun.wait(60)
        os.kill(fleet.busiest("decode").pid, signal.SIGKILL)
        done = [one.result(120) for one in running]
    assert [one.token_ids for one in done] == [one.token_ids for one in whole]
    assert sum(one.durability.migrations for one in done) >= 1


def test_a_store_that_is_gone_with_the_worker_loses_nothing(fleet, client):
    options = {"max_tokens": 80, "durability": "tokens", "temperature": 0.0}
    whole = client.generate(PROMPT, ignore_eos=True, **options)
    fleet.await_whole()

    def break_both() -> None:
        fleet.redis.kill()
        os.kill(fleet.busiest("decode").pid, signal.SIGKILL)

    done = interrupted(client, 20, break_both, **options)
    assert done.token_ids == whole.token_ids
    assert done.durability.recomputed_prompt_tokens == len(PROMPT)
    fleet.redis.restart(empty=True)
    wait_until(lambda: works_durably(client), "requests are kept again", 60.0)


def works_durably(client) -> bool:
    return client.generate(PROMPT[:50], max_tokens=20, ignore_eos=True, durability="tokens").durability.kept
