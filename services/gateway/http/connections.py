"""HTTP connections, and what they may cost: uvicorn's own, with bounds that it leaves open."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

LINGER_S = 10.0  # for a client to take the end of an answer, once its connection is to be closed

_FULL = b'{"error": {"message": "too many connections", "type": "server_error", "param": null, "code": "overloaded"}}'
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b" % (len(_FULL), _FULL)
)


class DoorConfig(uvicorn.Config):
    """uvicorn's configuration, and what `BoundedProtocol` needs beside.

    Args:
        max_connections: that may be open.
        head_timeout_s: for a request's line and headers to come in.
    """

    def __init__(self, app: Any, *, max_connections: int, head_timeout_s: float, **settings: Any) -> None:
        super().__init__(app, http=BoundedProtocol, **settings)
        self.max_connections, self.head_timeout_s = max_connections, head_timeout_s


class BoundedProtocol(H11Protocol):
    """A connection. Handlers find it in `scope["state"]["connection"]`."""

    config: DoorConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app_state = {**self.app_state, "connection": self}
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.config.max_connections:
            transport.write(_REFUSAL)
            transport.close()
            self.loop.call_later(LINGER_S, transport.abort)
            return
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        # the server forgets its own timer whenever something comes, such as bits of a body that was answered long ago
        if self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE:
            self._await_head()
        else:
            self._forget_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def timeout_keep_alive_handler(self) -> None:
        """Close; what the client does not take within a while is lost."""
        super().timeout_keep_alive_handler()
        self.loop.call_later(LINGER_S, self.abort)

    def abort(self) -> None:
        """Close at once, whatever has not been sent."""
        self.transport.abort()

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.config.head_timeout_s, self.timeout_keep_alive_handler)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
