"""Decode workers of a running service are killed, frozen and cut off from their store in the middle of answers.

Every stream ends with exactly the tokens of a run without a fault. The tests share one service over a real redis-server
and run in order.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvsluice.client import Client
from kvsluice.evals.service_process import running_service
from kvsluice.tests.faults.conftest import Victim, command_line, cpu_seconds, wait_for
from kvsluice.tests.faults.rig.redis_server import RedisServer, running

LEASE_S = 3.0
PROMPT = [(7 * i) % 40_000 + 100 for i in range(600)]
SAMPLING = [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}]


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    with running(RedisServer(tmp_path_factory.mktemp("redis"))) as server:
        yield server


@pytest.fixture(scope="module")
def victim(redis):
    arguments = ["--model", "smollm2-135m", "--decode-workers", "2", "--worker-lease-s", str(LEASE_S)]
    arguments += ["--store-url", f"redis://127.0.0.1:{redis.port}", "--log-level", "info", "--torch-threads", "1"]
    with running_service(*arguments, "--default-recipe", "sluice-full") as service:
        yield Victim(service)


@pytest.fixture
def client(victim):
    with Client(victim.address, timeout_s=120.0) as client:
        yield client


def decodes(victim):
    return [p for p in victim.processes() if "ray::DecodeWorker" in command_line(p)]


def busiest(victim):
    """The decode worker that computes."""
    before = {process: cpu_seconds(process) for process in decodes(victim)}
    time.sleep(0.3)
    return max(before, key=lambda process: cpu_seconds(process) - before[process])


def until_two(victim) -> None:
    """Wait until both decode workers are in rotation."""
    wait_for(lambda: len(decodes(victim)) == 2, 60.0)
    log = victim.service.log
    wait_for(lambda: log.read_text().count("decode worker decode-") % 2 == 0, 60.0)


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


def test_a_frozen_worker_loses_its_lease_and_writes_nothing_more(victim, client, redis):
    options = {"max_tokens": 70, "durability": "tokens", "temperature": 0.0}
    whole = client.generate(PROMPT, ignore_eos=True, **options)
    until_two(victim)
    frozen = []

    def freeze() -> None:
        frozen.append(busiest(victim))
        os.kill(frozen[0].pid, signal.SIGSTOP)

    done = interrupted(client, 30, freeze, **options)
    assert done.token_ids == whole.token_ids
    assert done.durability.migrations == 1
    os.kill(frozen[0].pid, signal.SIGCONT)
    # it finds its stream closed and its request taken over, and serves again
    until_two(victim)
    assert client.generate(PROMPT, ignore_eos=True, **options).token_ids == whole.token_ids
    # a key may go between the two commands: -2, and what lives without an end: -1
    assert -1 not in {redis.run("PTTL", key) for key in redis.run("KEYS", "*")}


def test_streams_under_load_all_go_on(victim, client):
    prompts = [PROMPT[i : i + 200] for i in range(6)]
    options = [
        {"max_tokens": 40, "durability": level, "ignore_eos": True, **SAMPLING[i % 2]}
        for i, level in enumerate(["none", "handoff", "tokens", "tokens", "tokens", "none"])
    ]
    with ThreadPoolExecutor(6) as threads:
        whole = list(threads.map(lambda p, o: client.generate(p, **o), prompts, options))
        until_two(victim)
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
        os.kill(busiest(victim).pid, signal.SIGKILL)
        done = [one.result(120) for one in running]
    assert [one.token_ids for one in done] == [one.token_ids for one in whole]
    assert sum(one.durability.migrations for one in done) >= 1


def test_a_store_that_is_gone_with_the_worker_loses_nothing(victim, client, redis):
    options = {"max_tokens": 80, "durability": "tokens", "temperature": 0.0}
    whole = client.generate(PROMPT, ignore_eos=True, **options)
    until_two(victim)

    def break_both() -> None:
        redis.kill()
        os.kill(busiest(victim).pid, signal.SIGKILL)

    done = interrupted(client, 20, break_both, **options)
    assert done.token_ids == whole.token_ids
    assert done.durability.recomputed_prompt_tokens == len(PROMPT)
    redis.restart(empty=True)
    wait_for(lambda: works_durably(client), 60.0)


def works_durably(client) -> bool:
    return client.generate(PROMPT[:50], max_tokens=20, ignore_eos=True, durability="tokens").durability.kept
