"""Bodies of requests, read within bounds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from ....errors import Overloaded

MANY = 16  # bodies of the largest size that may be in memory together, before they are requests
DISCARD_S = 2.0


class BodyReader:
    """Reads bodies; what all of them hold together is bounded.

    Args:
        max_bytes: of one body.
        timeout_s: for one to come in.
    """

    def __init__(self, max_bytes: int, timeout_s: float) -> None:
        self._max_bytes, self._timeout_s = max_bytes, timeout_s
        self._held_bytes = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """A request's body, which counts until the block has made something of it.

        Raises:
            HTTPException: 413 where it is too large, 408 where it does not come.
            Overloaded: too many others come in. ClientDisconnect.
        """
        announced = request.headers.get("content-length", "0")
        if int(announced) > self._max_bytes:
            raise await self._too_large(request)
        parts: list[bytes] = []
        num_bytes = 0
        try:
            async with self._in_time():
                async for part in request.stream():
                    num_bytes += len(part)
                    self._held_bytes += len(part)
                    if num_bytes > self._max_bytes:
                        raise await self._too_large(request)
                    if self._held_bytes > MANY * self._max_bytes:
                        raise Overloaded("too many large requests come in at once")
                    parts.append(part)
            whole = b"".join(parts)
            parts.clear()
            yield whole
        finally:
            self._held_bytes -= num_bytes

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except TimeoutError:
            detail = f"the body did not come within {self._timeout_s:g} s, the --http-read-timeout-s of the server"
            raise HTTPException(408, detail, {"connection": "close"}) from None

    async def _too_large(self, request: Request) -> HTTPException:
        if "expect" not in request.headers:
            # a client that is still writing would see its connection break, and not the answer
            with contextlib.suppress(TimeoutError, ClientDisconnect, RuntimeError):
                async with asyncio.timeout(DISCARD_S):
                    async for _ in request.stream():
                        pass
        detail = f"body: is too large; allowed: up to {self._max_bytes} bytes, the --max-message-bytes of the server"
        return HTTPException(413, detail, {"connection": "close"})
