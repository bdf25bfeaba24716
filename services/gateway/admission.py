"""The bounded queue in front of the workers."""

from __future__ import annotations

from asyncio import CancelledError, Future, get_running_loop
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ...errors import Overloaded


class Admission:
    """Lets a bounded number of choices run and a bounded number of requests wait, first come, first served.

    Args:
        max_running: choices that may run together; a request with more runs alone.
        max_waiting: requests that may wait.
    """

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._free = max_running
        self._queue: deque[tuple[int, Future[None]]] = deque()
        self.num_running = 0

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @asynccontextmanager
    async def slot(self, num_choices: int) -> AsyncIterator[None]:
        """Hold room for a request. Raises `Overloaded` at once when the queue is full."""
        need = min(num_choices, self._max_running)
        if self._queue or need > self._free:
            await self._wait(need)
        else:
            self._free -= need
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1
            self._free += need
            self._admit()

    async def _wait(self, need: int) -> None:
        if len(self._queue) >= self._max_waiting:
            raise Overloaded(f"the queue is full ({self._max_waiting} requests wait already)")
        turn: Future[None] = get_running_loop().create_future()
        entry = (need, turn)
        self._queue.append(entry)
        try:
            await turn
        except CancelledError:
            if turn.cancelled():
                if entry in self._queue:
                    self._queue.remove(entry)
            else:
                # admitted and cancelled in the same turn of the loop
                self._free += need
            self._admit()
            raise

    def _admit(self) -> None:
        while self._queue and self._queue[0][0] <= self._free:
            need, turn = self._queue.popleft()
            if not turn.cancelled():
                self._free -= need
                turn.set_result(None)
