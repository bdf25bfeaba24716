"""A TCP proxy that does to bytes what bad networks do; what it does may be changed at any time.

It runs in a thread with an event loop of its own, so it goes on while a test's loop is busy or blocked.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

CHUNK_BYTES = 16 * 1024
POLL_S = 0.005


@dataclass(frozen=True)
class Rules:
    """What happens to one direction. Positions count from 0 in each connection.

    Attributes:
        delay_s: before a chunk goes on; chunks of one connection keep their order.
        jitter_s: added to it, drawn evenly from 0 to this.
        bytes_per_s: at most, in each connection.
        close_after: bytes after which both sides see an orderly end.
        reset_after: bytes after which both sides see a reset.
        flip_at: position of a byte all of whose bits change.
        drop: bytes are taken and go nowhere, as if lost for ever; nobody is told.
        hold: bytes are not taken; they go on when the rule ends. So does news of an end.
        before: only connections with a number below this are touched; None = all.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float | None = None
    close_after: int | None = None
    reset_after: int | None = None
    flip_at: int | None = None
    drop: bool = False
    hold: bool = False
    before: int | None = None


CLEAR = Rules()


@dataclass
class _Connection:
    number: int
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter

    def reset(self) -> None:
        """End both sides with RST instead of FIN, which the kernel does for sockets that may not linger."""
        for writer in (self.client, self.server):
            sock = writer.transport.get_extra_info("socket")
            if sock is not None and sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Proxy:
    """Listens on loopback and connects every client to one target.

    Attributes:
        requests, replies: rules of the two directions; may be set from any thread.
        num_accepted: connections so far; also the number of the next one.
        num_open: connections that live.
        request_bytes, reply_bytes: that went on to the other side.
    """

    def __init__(self, host: str, port: int) -> None:
        self.requests = self.replies = CLEAR
        self.num_accepted = self.request_bytes = self.reply_bytes = 0
        self._target = (host, port)
        self._open: dict[int, _Connection] = {}
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self.port = 0

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._accepted, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    @property
    def num_open(self) -> int:
        return len(self._open)

    def clear(self) -> None:
        """Be an honest proxy from now on."""
        self.requests = self.replies = CLEAR

    def partition(self) -> None:
        """Lose everything both ways, silently, in connections that are there and in new ones."""
        self.requests = self.replies = Rules(drop=True)

    def reset_all(self) -> None:
        """Reset every connection that lives."""

        async def reset() -> None:
            for connection in list(self._open.values()):
                connection.reset()

        self._do(reset())

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _end(self) -> None:
        assert self._server is not None
        self._server.close()
        for connection in list(self._open.values()):
            connection.reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        number = self.num_accepted
        self.num_accepted += 1
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        connection = self._open[number] = _Connection(number, writer, far_writer)
        try:
            await asyncio.gather(
                self._pump("requests", connection, reader, far_writer),
                self._pump("replies", connection, far_reader, writer),
            )
        except (OSError, asyncio.CancelledError):
            pass  # one side is gone, or the proxy ends
        finally:
            del self._open[number]
            for side in (writer, far_writer):
                side.transport.abort()

    def _rules(self, direction: str, connection: _Connection) -> Rules:
        rules: Rules = getattr(self, direction)
        return rules if rules.before is None or connection.number < rules.before else CLEAR

    async def _pump(
        self, direction: str, connection: _Connection, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        """Carry one direction of a connection until its end."""
        position = 0
        while True:
            await self._released(direction, connection)
            data = await source.read(CHUNK_BYTES)
            await self._released(direction, connection)
            rules = self._rules(direction, connection)
            if rules.drop:
                if not data:
                    await asyncio.Event().wait()  # the end is lost as well
                continue
            if not data:
                sink.write_eof() if sink.can_write_eof() else sink.close()
                return
            await self._wait(rules, len(data))
            position = await self._pass_on(direction, rules, connection, data, position, sink)

    async def _released(self, direction: str, connection: _Connection) -> None:
        """Wait until nothing is held; rules are set by other threads, which wake nobody."""
        while True:
            if not self._rules(direction, connection).hold:
                return
            await asyncio.sleep(POLL_S)

    @staticmethod
    async def _wait(rules: Rules, num_bytes: int) -> None:
        wait_s = rules.delay_s + random.uniform(0, rules.jitter_s)
        wait_s += num_bytes / rules.bytes_per_s if rules.bytes_per_s else 0.0
        if wait_s:
            await asyncio.sleep(wait_s)

    async def _pass_on(
        self,
        direction: str,
        rules: Rules,
        connection: _Connection,
        data: bytes,
        position: int,
        sink: asyncio.StreamWriter,
    ) -> int:
        """Send what the rules leave of a chunk; returns the position after it."""
        if rules.flip_at is not None and position <= rules.flip_at < position + len(data):
            offset = rules.flip_at - position
            data = data[:offset] + bytes([data[offset] ^ 0xFF]) + data[offset + 1 :]
        ends = [end for end in (rules.close_after, rules.reset_after) if end is not None]
        end = min(ends, default=position + len(data))
        sink.write(data[: max(end - position, 0)])
        sent = min(len(data), max(end - position, 0))
        if direction == "requests":
            self.request_bytes += sent
        else:
            self.reply_bytes += sent
        await sink.drain()
        if ends and position + len(data) >= end:
            if rules.reset_after == end:
                # what was sent before must arrive, which a reset at once would prevent
                await asyncio.sleep(POLL_S)
                connection.reset()
            raise ConnectionResetError
        return position + len(data)
