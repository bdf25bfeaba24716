"""What workers tell of an attempt, on its way to whoever runs it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from ...errors import KvsluiceError
from ...protos import worker_pb2 as wpb

Event = wpb.Opened | wpb.Resumed | wpb.TokenEntry | wpb.Finished | wpb.FirstTokens | wpb.Shipped


class Inbox:
    """What workers report of one attempt. Its length is bounded by the credits that the attempt has given."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._error: KvsluiceError | None = None
        self._arrived, self._failed = asyncio.Event(), asyncio.Event()

    def post(self, event: Event) -> None:
        if self._error is None:
            self._events.append(event)
            self._arrived.set()

    def fail(self, error: KvsluiceError) -> None:
        """Nothing comes any more but this error; the first one counts."""
        if self._error is None:
            self._error = error
            self._arrived.set()
            self._failed.set()

    async def take(self) -> list[Event]:
        """All events that have arrived, at least one. Raises what `fail` was given once those before it are taken."""
        await self._arrived.wait()
        if not self._events:
            assert self._error is not None
            raise self._error
        events, self._events = self._events, []
        if self._error is None:
            self._arrived.clear()
        return events

    async def unless_failed(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for something else, or raise what `fail` is given meanwhile."""
        tasks = asyncio.create_task(work), asyncio.create_task(self._failed.wait())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
            elif self._error is not None:
                raise self._error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
