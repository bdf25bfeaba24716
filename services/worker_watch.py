"""What the terminal is told of parts that die: that they did, and when their successors serve."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from .processes import find

Status = Mapping[str, str]


class WorkerWatch:
    """Follows one actor over its restarts.

    Args:
        name: the actor's, for the lines.
        status: of the one that runs; its `pid` is looked at.
        ask: asks for the status of whoever runs then.
        say: prints a line.
        now: a clock in seconds.
    """

    def __init__(
        self,
        name: str,
        status: Status,
        ask: Callable[[], Future[Status]],
        say: Callable[[str], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._ask = ask
        self._say = say
        self._now = now
        self._pid = status["pid"]
        self._process = find(int(self._pid))
        self._died_s: float | None = None
        self._answer: Future[Status] | None = None

    def look(self) -> None:
        """Say what has changed since the last look. Never waits."""
        if self._died_s is None:
            if self._process is not None and self._process.alive:
                return
            self._died_s = self._now()
            self._say(f"{self._name} died; a new one is started")
        status = self._successor()
        if status is None:
            return
        if "error_type" in status:
            self._say(f"the new {self._name} cannot start: {status['message']}")
        else:
            self._say(f"the new {self._name} serves, {self._now() - self._died_s:.0f} s later")
        self._pid, self._process, self._died_s = status["pid"], find(int(status["pid"])), None

    def _successor(self) -> Status | None:
        """The status of another process than the one that died, once there is one."""
        if self._answer is None:
            self._answer = self._ask()
        if not self._answer.done():
            return None
        answer, self._answer = self._answer, None
        if answer.exception() is not None or answer.result()["pid"] == self._pid:
            return None
        return answer.result()
