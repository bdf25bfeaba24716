"""What must be as it was before: file descriptors, tasks, and no stored key without an end."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path
from typing import Any

from kvsluice.tests.faults.rig.processes import PATIENCE_S
from kvsluice.tests.faults.rig.redis_server import RedisServer

CHECK_EVERY_S = 0.02


def descriptors(pid: int | str = "self") -> Counter[str]:
    """Open descriptors of a process by kind: socket, pipe, anon_inode, or the path of a file."""
    found: Counter[str] = Counter()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue  # the one that lists the folder
        found[target.partition(":")[0]] += 1
    return found


def num_sockets(pid: int | str = "self") -> int:
    return descriptors(pid)["socket"]


def keys_without_end(server: RedisServer) -> list[str]:
    """Names of keys that would stay for ever."""
    with server.admin() as admin:
        return [key.decode() for key in admin.scan_iter(count=1000) if admin.ttl(key) == -1]


class Baseline:
    """Descriptors of this process and tasks of this event loop at one moment, to compare with later."""

    def __init__(self) -> None:
        self._descriptors = descriptors()
        self._tasks = asyncio.all_tasks()

    def grown(self) -> dict[str, Any]:
        """What there is more of than at first; empty where nothing is."""
        more: dict[str, Any] = dict(descriptors() - self._descriptors)
        tasks = [task.get_coro() for task in asyncio.all_tasks() - self._tasks]
        return more | ({"tasks": tasks} if tasks else {})

    async def check(self) -> None:
        """Assert that nothing has grown; waits for what is just ending."""
        for _ in range(int(PATIENCE_S / CHECK_EVERY_S)):
            if not self.grown():
                return
            await asyncio.sleep(CHECK_EVERY_S)
        assert self.grown() == {}, "something has not been let go of"
