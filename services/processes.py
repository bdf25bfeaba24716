"""The process tree below this process, read from /proc, and what processes leave behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process, told apart from a later one with the same id by its start time (clock ticks since boot)."""

    pid: int
    parent: int
    name: str
    start_ticks: int

    @property
    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        found = _read(self.pid)
        return found is not None and found.start_ticks == self.start_ticks


def _read(pid: int) -> Process | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # the name stands in parentheses and may hold any character
    name, _, rest = stat.partition("(")[2].rpartition(")")
    fields = rest.split()
    if fields[0] in ("Z", "X"):
        return None
    return Process(pid, int(fields[1]), name, int(fields[19]))


def find(pid: int) -> Process | None:
    """The process with this id, if it runs."""
    return _read(pid)


def descendants(pid: int | None = None) -> list[Process]:
    """All processes below a process (default: this one)."""
    processes = [p for entry in os.listdir("/proc") if entry.isdigit() and (p := _read(int(entry))) is not None]
    found: list[Process] = []
    parents = {os.getpid() if pid is None else pid}
    while parents:
        children = [p for p in processes if p.parent in parents]
        found += children
        parents = {p.pid for p in children}
    return found


def kill(processes: Iterable[Process]) -> None:
    """Kill those that still run."""
    for process in processes:
        if process.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


def wait_gone(processes: Iterable[Process], timeout_s: float) -> list[Process]:
    """Wait until they have ended. Returns those that have not within the time."""
    deadline = time.monotonic() + timeout_s
    left = [p for p in processes if p.alive]
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [p for p in left if p.alive]
    return left


def remove_folder(folder: str, tries: int = 20) -> bool:
    """Remove a folder that processes which are just ending may still write to. Returns whether it is gone."""
    for _ in range(tries):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            return True
        time.sleep(0.1)
    return False


def forget_source_tree() -> None:
    """Take the package's own folder off this process's import path: other libraries probe for a top-level `kernels`."""
    root = Path(__file__).resolve().parent.parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != root]
