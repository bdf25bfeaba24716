"""Threads and loops of a process: an engine on its own thread, a service's event loop on another, worker hosts."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import grpc.aio

from ..protos import worker_pb2 as wpb
from .rpc import bind, join_address, make_server
from .security import FleetSecurity
from .telemetry import where

log = logging.getLogger("kvsluice.lifecycle")

T = TypeVar("T")

RETRY_PAUSE_S = 3.0


class EngineThread:
    """Calls an engine from one thread only. Sleeps while there is nothing to do.

    Args:
        step: one step of the engine; returns whether another one may have work.
        setup: runs first on the thread, for settings that belong to it.
        on_crash: called on the thread with an exception that `step` let out, after which the thread ends.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[], bool],
        setup: Callable[[], None] | None = None,
        on_crash: Callable[[BaseException], None] | None = None,
    ) -> None:
        self._step = step
        self._setup = setup
        self._on_crash = on_crash
        self._commands: deque[Callable[[], None]] = deque()
        self._condition = threading.Condition()
        self._woken = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after its current step."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def post(self, command: Callable[[], None]) -> None:
        """Run a command on the thread before its next step; commands keep their order."""
        with self._condition:
            self._commands.append(command)
            self._condition.notify()

    def wake(self) -> None:
        """Have the thread look for work again."""
        with self._condition:
            self._woken = True
            self._condition.notify()

    async def call(self, command: Callable[[], T]) -> T:
        """Run a command on the thread and return what it returns or raises."""
        done: Future[T] = Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                done.set_result(command())
            except Exception as exc:
                done.set_exception(exc)

        self.post(run)
        return await asyncio.wrap_future(done)

    def _run(self) -> None:
        try:
            if self._setup is not None:
                self._setup()
            busy = False
            while (commands := self._next(busy)) is not None:
                for command in commands:
                    command()
                busy = self._step()
        except BaseException as exc:
            log.error("the engine thread crashed: %s", where(exc))
            if self._on_crash is not None:
                self._on_crash(exc)

    def _next(self, busy: bool) -> list[Callable[[], None]] | None:
        """The commands to run before the next step, once there is a reason for one; None when the thread shall end."""
        with self._condition:
            while not (busy or self._commands or self._woken or self._stopping):
                self._condition.wait()
            if self._stopping:
                return None
            self._woken = False
            commands = list(self._commands)
            self._commands.clear()
            return commands


async def persist(job: Callable[[], Awaitable[T]], error: type[Exception], for_s: float, pause_s: float = 0.2) -> T:
    """Run a job until it ends otherwise than with `error`, but start it no later than `for_s` from now."""
    clock = asyncio.get_running_loop().time
    deadline_s = clock() + for_s
    while True:
        try:
            return await job()
        except error:
            if clock() + pause_s > deadline_s:
                raise
        await asyncio.sleep(pause_s)


def end_process(exc: BaseException) -> None:
    """A worker whose engine is broken makes room for a fresh one."""
    log.error("the worker ends: %s", where(exc))
    os._exit(1)


def end_later() -> None:
    """End this process with status 1, whatever it does then, once the driver had time to ask what is wrong."""
    timer = threading.Timer(RETRY_PAUSE_S, os._exit, (1,))
    timer.daemon = True
    timer.start()


class LoopThread:
    """An event loop on a thread of its own, for processes whose main thread belongs to someone else."""

    def __init__(self, name: str) -> None:
        self._loop: AbstractEventLoop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, job: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run a coroutine on the loop and wait for its result."""
        return asyncio.run_coroutine_threadsafe(job, self._loop).result(timeout_s)

    def spawn(self, job: Coroutine[Any, Any, None]) -> None:
        """Have a coroutine run on the loop, beside what else does."""
        asyncio.run_coroutine_threadsafe(job, self._loop)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)
        if not self._thread.is_alive():
            self._loop.close()


class WorkerService(Protocol):
    """One role of a worker process."""

    def add_to(self, server: grpc.aio.Server) -> None: ...
    async def start(self) -> None: ...
    async def stop(self) -> None: ...


class AccountableService(WorkerService, Protocol):
    """One that says what it has to do."""

    def account(self) -> wpb.WorkerInfo:
        """What it answers to `Info`."""
        ...


class WorkerHost:
    """A worker's gRPC server with the services of its roles.

    Args:
        security: whom it lets in; None = everybody, on loopback.
    """

    def __init__(
        self, services: Sequence[WorkerService], max_message_bytes: int, security: FleetSecurity | None = None
    ) -> None:
        self._services = tuple(services)
        self._max_message_bytes = max_message_bytes
        self._security = security or FleetSecurity()
        self._server: grpc.aio.Server | None = None

    async def start(self, host: str, port: int = 0) -> str:
        """Listen on `host`. Returns the address, host:port.

        Raises:
            ConfigError: it cannot listen there, or would let everybody in who reaches it.
        """
        self._security.check_host(host)
        # made here, because it belongs to the loop that it is made in
        self._server = make_server(self._max_message_bytes, self._security.guard)
        for service in self._services:
            service.add_to(self._server)
        bound = bind(self._server, host, port, self._security.tls)
        # where the port was taken this is called once more, and services start only once
        for service in self._services:
            await service.start()
        await self._server.start()
        return join_address(host, bound)

    async def stop(self, grace_s: float = 0.0) -> None:
        if self._server is not None:
            await self._server.stop(grace_s)
        for service in self._services:
            await service.stop()
