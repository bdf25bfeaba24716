"""Kill, stop and continue a process, and wait for what is to come of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_S = 30.0


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
    """What `condition` gives once that is true; polls, and fails after a time that only something broken takes."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain: {what}"
        time.sleep(0.01)


def process_state(pid: int) -> str:
    """One letter of /proc: R and S run, T is stopped, Z is dead and not yet waited for; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


class Child:
    """A process of the test's own, which ends with the test whatever happens.

    Args:
        command: program and arguments.
        log: file that takes both outputs.
    """

    def __init__(self, command: list[str], log: Path) -> None:
        # the kernel ends the child when the thread that starts it here dies, and so when the test's process does
        prefix = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        self.log = log
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                [*prefix, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=log.parent
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def runs(self) -> bool:
        return self._popen.poll() is None

    def pause(self) -> None:
        """Freeze it; returns when it is frozen. Its sockets stay open and answer nothing."""
        self._popen.send_signal(signal.SIGSTOP)
        wait_until(lambda: process_state(self.pid) == "T", "the process stops")

    def resume(self) -> None:
        self._popen.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it as a crash would; returns when it is gone. Works on a frozen one, and twice."""
        if self.runs:
            os.kill(self.pid, signal.SIGKILL)
        self._popen.wait(PATIENCE_S)

    def stop(self) -> None:
        """Ask it to end, and wait for that."""
        if self.runs:
            self._popen.terminate()
        self._popen.wait(PATIENCE_S)
