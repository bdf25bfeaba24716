"""Services of which everything is known: queues, as doors of a load test."""

from __future__ import annotations

import asyncio

import numpy as np

from kvsluice.errors import Overloaded
from kvsluice.loadtest.transport import Answer, OnTokens, Request


class Queue:
    """Requests one after another, first come, first served, as an M/M/1 queue when service times are exponential.

    Args:
        mean_s: of the time that a request takes, drawn from an exponential distribution; its tokens come evenly.
        fixed: it takes just that time.
        room: requests that may wait; further ones are shed.
    """

    def __init__(self, mean_s: float, *, fixed: bool = False, room: int | None = None, seed: int = 1) -> None:
        self._mean_s, self._fixed, self._room = mean_s, fixed, room
        self._random = np.random.default_rng(seed)
        self._turn = asyncio.Lock()
        self._waiting = 0
        self.requests: list[Request] = []
        self.open = self.most_open = 0
        self.cancelled = 0

    async def run(self, request: Request, on_tokens: OnTokens) -> Answer:
        self.requests.append(request)
        if self._room is not None and self._waiting > self._room:
            raise Overloaded("no room")
        self._waiting += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            async with self._turn:
                takes_s = self._mean_s if self._fixed else float(self._random.exponential(self._mean_s))
                for _ in range(request.max_tokens):
                    await asyncio.sleep(takes_s / request.max_tokens)
                    on_tokens(1)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self._waiting -= 1
            self.open -= 1
        ids = tuple(range(7000, 7000 + request.max_tokens))
        return Answer(len(request.prompt), request.max_tokens, 0, ids)

    async def close(self) -> None:
        pass


class Stalling(Queue):
    """Answers at once, but for one stall of the whole service."""

    def __init__(self, begin_s: float, end_s: float) -> None:
        super().__init__(0.0)
        self._begin_s, self._end_s = begin_s, end_s

    async def run(self, request: Request, on_tokens: OnTokens) -> Answer:
        now_s = asyncio.get_running_loop().time()
        if self._begin_s <= now_s < self._end_s:
            await asyncio.sleep(self._end_s - now_s)
        on_tokens(request.max_tokens)
        return Answer(1, request.max_tokens, 0)
