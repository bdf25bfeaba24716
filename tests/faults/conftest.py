"""A service of its own for tests that kill its parts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvsluice.evals.service_process import ServiceProcess, running_service
from kvsluice.services.processes import Process, descendants


@dataclass
class Victim:
    """A running service whose processes a test may look at and kill."""

    service: ServiceProcess

    @property
    def address(self) -> str:
        return self.service.address

    def processes(self) -> list[Process]:
        return descendants(self.service.process.pid)

    def find(self, name: str) -> Process:
        """The one actor or daemon whose command line holds `name`."""
        found = [p for p in self.processes() if name in command_line(p)]
        assert len(found) == 1, f"{len(found)} processes are called {name}"
        return found[0]

    def kill(self, name: str) -> Process:
        process = self.find(name)
        os.kill(process.pid, signal.SIGKILL)
        return process

    def wait_said(self, text: str) -> None:
        """Wait until the service has printed a text."""
        wait_for(lambda: text in self.service.log.read_text(), 30.0)

    def wait_busy(self, name: str, seconds: float) -> None:
        """Wait until a process has computed for so long from now on."""
        process = self.find(name)
        begin = cpu_seconds(process)
        wait_for(lambda: cpu_seconds(process) > begin + seconds, 60.0)


def command_line(process: Process) -> str:
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def cpu_seconds(process: Process) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for(condition: Callable[[], object], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not come about"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    with running_service("--model", "smollm2-135m", "--grace-s", "20", "--log-level", "info") as service:
        yield Victim(service)
