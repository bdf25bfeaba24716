"""The bounded queue in front of the workers."""

from __future__ import annotations

import math
import time
from asyncio import CancelledError, Future, get_running_loop
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from ...errors import Overloaded

RATE_OVER = 64  # ends that the rate is taken over


class Admission:
    """Lets a bounded number of choices run and a bounded number of requests wait, first come, first served. Whoever
    would wait longer than it may is sent away at once.

    Args:
        max_running: choices that may run together; a request with more runs alone.
        max_waiting: requests that may wait.
        clock: monotonic seconds.
    """

    def __init__(self, max_running: int, max_waiting: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_running = max_running
        self._clock = clock
        self._ends: deque[tuple[float, int]] = deque(maxlen=RATE_OVER)  # when how many choices ended
        self._max_waiting = max_waiting
        self._free = max_running
        self._queue: deque[tuple[int, Future[None]]] = deque()
        self.num_running = 0

    def resize(self, max_running: int) -> None:
        """Another number of choices may run together from now on; those that run go on."""
        self._free += max_running - self._max_running
        self._max_running = max_running
        self._admit()

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    def wait_s(self, num_choices: int) -> float:
        """How long a request that comes now would wait, by the rate at which the last ones ended; 0 where that is not
        known."""
        need = min(num_choices, self._max_running)
        ahead = sum(waiting for waiting, _ in self._queue) + need - self._free
        if ahead <= 0 or len(self._ends) < 2:
            return 0.0
        span_s = self._clock() - self._ends[0][0]
        return ahead * span_s / sum(count for _, count in self._ends) if span_s > 0 else 0.0

    @asynccontextmanager
    async def slot(self, num_choices: int, remaining_s: float = math.inf) -> AsyncIterator[None]:
        """Hold room for a request.

        Args:
            remaining_s: until its deadline.

        Raises:
            Overloaded: at once, when the queue is full, or so long that the deadline would pass in it.
        """
        need = min(num_choices, self._max_running)
        if self._queue or need > self._free:
            self._check_queue(num_choices, remaining_s)
            await self._wait(need)
        else:
            self._free -= need
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1
            self._free += need
            self._ends.append((self._clock(), need))
            self._admit()

    def _check_queue(self, num_choices: int, remaining_s: float) -> None:
        wait_s = self.wait_s(num_choices)
        if len(self._queue) >= self._max_waiting:
            raise Overloaded(f"the queue is full ({self._max_waiting} requests wait already)", wait_s, "queue_full")
        if wait_s > remaining_s:
            problem = f"some {wait_s:.3g} s of work wait, and the deadline is in {remaining_s:.3g} s"
            raise Overloaded(problem, wait_s, "deadline")

    async def _wait(self, need: int) -> None:
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
