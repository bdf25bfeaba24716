"""The HTTP server on the gateway's event loop: listens, and ends with the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
from asyncio import Task
from collections.abc import Iterator

import uvicorn

from ....errors import ConfigError
from ...config import ServeConfig
from ...rpc import join_address
from ...security import Guard, check_door, client_tls
from ...tls import server_context
from ..intake import Intake
from .app import Boundary, Routes
from .connections import BoundedProtocol, DoorConfig

log = logging.getLogger("kvsluice.http")

BACKLOG = 2048
SEND_BUFFER_BYTES = 64 * 1024  # of the kernel, a connection: left to itself it takes megabytes that nobody reads
OTHER_FILES = 512  # beside HTTP connections: gRPC's, workers', the store's
CLOSE_S = 1  # for open connections to end by themselves


class _Server(uvicorn.Server):
    """uvicorn's server inside a process that is someone else's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpDoor:
    """Serves the OpenAI API.

    Args:
        guard: says who may call what.
    """

    def __init__(self, intake: Intake, config: ServeConfig, guard: Guard) -> None:
        self._config = config
        tls = client_tls(config)
        app = Boundary(Routes(intake, config, guard).app(), config.http_max_header_bytes)
        self._server = _Server(
            DoorConfig(
                app,
                max_connections=config.http_max_connections,
                head_timeout_s=config.http_read_timeout_s,
                h11_max_incomplete_event_size=config.http_max_header_bytes,
                timeout_keep_alive=config.http_keep_alive_s,
                timeout_graceful_shutdown=CLOSE_S,
                backlog=BACKLOG,
                ssl_context_factory=None if tls is None else lambda *_: server_context(tls),
                lifespan="off",
                ws="none",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
            )
        )
        self._task: Task[None] | None = None

    async def start(self) -> str:
        """Listen. Returns the address, host:port. Raises `ConfigError` where it cannot listen."""
        host = self._config.http_host or self._config.host
        check_door(self._config, host, "http_host")
        allow_files(self._config.http_max_connections)
        self._server.config.load()
        listener = _listen(host, self._config.http_port)
        port = listener.getsockname()[1]
        self._task = asyncio.create_task(self._server.serve([listener]), name="http")
        return join_address(host, port)

    async def stop(self) -> None:
        """Close every connection and stop listening. Requests have ended, or are cut off."""
        if self._task is None:
            return
        self._server.should_exit = True
        await self._task
        for connection in list(self._server.server_state.connections):
            assert isinstance(connection, BoundedProtocol)
            connection.abort()


def allow_files(num_connections: int) -> None:
    """Let this process open as many files as its connections take, as far as the system lets it: the limit that
    processes begin with is often 1,024."""
    wanted = num_connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        if allowed < wanted:
            log.warning("http_max_connections: %d, and only %d files may be open", num_connections, allowed)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket on exactly `host`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as exc:
        why = "it is already in use" if exc.errno == errno.EADDRINUSE else os.strerror(exc.errno or 0)
        raise ConfigError(f"http_host, http_port: cannot listen on {host} port {port}: {why}") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # connections inherit it
    return listener
