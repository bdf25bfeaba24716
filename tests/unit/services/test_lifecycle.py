"""Engine threads, loop threads, processes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from kvsluice.services.lifecycle import EngineThread, LoopThread
from kvsluice.services.processes import descendants, kill, wait_gone


class CountingEngine:
    """Has `work` steps to do."""

    def __init__(self) -> None:
        self.work = 0
        self.steps = 0
        self.threads: set[str] = set()
        self.idle = threading.Event()

    def step(self) -> bool:
        self.steps += 1
        self.threads.add(threading.current_thread().name)
        self.work = max(0, self.work - 1)
        if self.work == 0:
            self.idle.set()
        return self.work > 0

    def add(self, work: int) -> int:
        self.idle.clear()
        self.threads.add(threading.current_thread().name)
        self.work += work
        return self.work


@pytest.fixture
def running():
    engine = CountingEngine()
    thread = EngineThread("engine", engine.step)
    thread.start()
    yield engine, thread
    thread.stop()


async def test_the_engine_is_called_from_one_thread_and_sleeps_when_idle(running):
    engine, thread = running
    assert await thread.call(lambda: engine.add(5)) == 5
    await asyncio.to_thread(engine.idle.wait, 10)
    steps = engine.steps
    assert steps == 5
    await asyncio.sleep(0.05)
    assert engine.steps == steps, "an idle engine is not stepped"
    thread.wake()
    await thread.call(lambda: None)
    await thread.call(lambda: None)  # the step between two commands is over
    assert engine.steps > steps
    assert engine.threads == {"engine"}


async def test_commands_keep_their_order_and_bring_back_errors(running):
    engine, thread = running
    seen: list[int] = []
    for i in range(50):
        thread.post(lambda i=i: seen.append(i))

    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await thread.call(fail)
    assert seen == list(range(50))
    assert await thread.call(lambda: engine.add(1)) == 1  # the thread lives on


def test_a_crash_is_told():
    crashed = threading.Event()

    def step() -> bool:
        raise RuntimeError("boom")

    thread = EngineThread("engine", step, on_crash=lambda exc: crashed.set())
    thread.start()
    thread.wake()
    assert crashed.wait(10)
    thread.stop()


def test_settings_are_made_on_the_thread_itself():
    names: list[str] = []
    thread = EngineThread("engine", lambda: False, lambda: names.append(threading.current_thread().name))
    thread.start()
    thread.stop()
    assert names == ["engine"]


def test_a_loop_thread_runs_coroutines():
    loop = LoopThread("loop")

    async def where() -> str:
        await asyncio.sleep(0)
        return threading.current_thread().name

    assert loop.run(where(), 10) == "loop"
    loop.stop()


def test_descendants_are_found_and_killed():
    child = "import time; print(1, flush=True); time.sleep(60)"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    parent.stdout.readline()
    tree = [p for p in descendants() if p.pid == parent.pid or p.parent == parent.pid]
    assert len(tree) == 2
    kill(tree)
    parent.wait()
    parent.stdout.close()
    assert wait_gone(tree, 10.0) == []
