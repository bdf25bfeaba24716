"""What is said of parts that die and come back."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Future

import pytest

from kvsluice.services.processes import remove_folder
from kvsluice.services.worker_watch import WorkerWatch


class Bench:
    """A watch over a real process, with answers and a clock of the test's own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        self.said: list[str] = []
        self.answers: list[Future[dict[str, str]]] = []
        self.now = 100.0
        status = {"pid": str(self.process.pid)}
        self.watch = WorkerWatch("prefill-0", status, self.ask, self.said.append, lambda: self.now)

    def ask(self) -> Future[dict[str, str]]:
        self.answers.append(Future())
        return self.answers[-1]

    def look(self) -> list[str]:
        self.said.clear()
        self.watch.look()
        return self.said


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.process.kill()
    bench.process.communicate()


def test_nothing_is_said_or_asked_while_it_runs(bench):
    assert bench.look() == []
    assert bench.answers == []


def test_a_death_and_its_successor_are_said_once_each(bench):
    bench.process.kill()
    bench.process.wait()
    assert bench.look() == ["prefill-0 died; a new one is started"]
    assert bench.look() == []
    bench.answers[0].set_exception(RuntimeError("being restarted"))
    assert bench.look() == []
    bench.look()
    bench.answers[1].set_result({"pid": str(bench.process.pid)})
    assert bench.look() == []
    bench.look()
    bench.now += 12.3
    bench.answers[2].set_result({"pid": str(os.getpid()), "address": "a:1"})
    assert bench.look() == ["the new prefill-0 serves, 12 s later"]
    assert bench.look() == []
    assert len(bench.answers) == 3


def test_a_successor_that_cannot_start_says_why(bench):
    bench.process.kill()
    bench.process.wait()
    bench.look()
    bench.answers[0].set_result({"pid": str(os.getpid()), "error_type": "BrokenCheckpoint", "message": "no weights"})
    assert bench.look() == ["the new prefill-0 cannot start: no weights"]


def test_a_folder_goes_although_something_still_writes_to_it(tmp_path, monkeypatch):
    folder = tmp_path / "kvsluice-x"
    folder.mkdir()
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    real, writes = os.rmdir, iter([True, True])

    def rmdir(path, **options):
        if next(writes, False):
            (folder / "late").touch()
        real(path, **options)

    monkeypatch.setattr("os.rmdir", rmdir)
    assert remove_folder(str(folder))
    assert not folder.exists()
