"""Clients that only count, so that they cost little beside what they measure: over HTTP, gRPC, or a worker's stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import grpc

from kvsluice.protos import generation_pb2 as pb
from kvsluice.protos import generation_pb2_grpc, worker_pb2_grpc
from kvsluice.protos import worker_pb2 as wpb

STREAMS_A_CHANNEL = 100  # what HTTP/2 servers let a connection have by default
PROMPT_IDS = [11, 12, 13]


@dataclass
class Told:
    """What came of one stream.

    Attributes:
        text: of the answer; of a worker's stream there is none.
        tokens: that were counted.
        whole: the stream ended as it has to.
        times: when tokens came, seconds of the machine's monotonic clock; those of one read came together.
    """

    request_id: str
    text: str = ""
    tokens: int = 0
    whole: bool = False
    times: list[float] = field(default_factory=list)


Begun = Callable[[], None]
"""Called when a stream's first token has come, and not before."""


async def over_http(address: str, request_id: str, num_tokens: int, begun: Begun) -> Told:
    """One completion, streamed."""
    host, _, port = address.rpartition(":")
    body = {"model": "paced", "prompt": PROMPT_IDS, "max_tokens": num_tokens, "stream": True, "ignore_eos": True}
    raw = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
    told, data, seen = Told(request_id), bytearray(), 0
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: {request_id}\r\nContent-Length: {len(raw)}"
        writer.write(f"{head}\r\n\r\n".encode() + raw)
        while b"data: [DONE]" not in data[-64:]:
            part = await reader.read(1 << 16)
            if not part:
                break
            data += part
            count = part.count(b'"index"')
            told.times += [time.monotonic()] * count
            if count and not seen:
                begun()
            seen += count
    finally:
        writer.close()
    for line in bytes(data).split(b"\n"):
        if not line.startswith(b"data: {"):
            told.whole |= line.strip() == b"data: [DONE]"
            continue
        event = json.loads(line[6:])
        told.text += "".join(choice["text"] for choice in event.get("choices", ()))
        if event.get("usage"):
            told.tokens = event["usage"]["completion_tokens"]
    return told


class GrpcCalls:
    """Streams over gRPC, a hundred a connection."""

    def __init__(self, address: str, num_streams: int) -> None:
        # channels of one process would share a connection otherwise
        options = [("grpc.use_local_subchannel_pool", 1)]
        count = -(-num_streams // STREAMS_A_CHANNEL)
        self._channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(count)]
        self._next = 0

    async def close(self) -> None:
        """Close the connections."""
        for channel in self._channels:
            await channel.close()

    async def ask(self, request_id: str, num_tokens: int, begun: Begun) -> Told:
        """One request, streamed."""
        channel = self._channels[self._next % len(self._channels)]
        self._next += 1
        told = Told(request_id)
        request = pb.GenerateRequest(request_id=request_id, token_ids=pb.TokenIds(ids=PROMPT_IDS))
        request.sampling.max_tokens, request.sampling.ignore_eos = num_tokens, True
        async for response in generation_pb2_grpc.GenerationStub(channel).Generate(request):
            if response.HasField("complete"):
                told.whole = True
                continue
            if not told.tokens:
                begun()
            count = len(response.chunk.token_ids)
            told.tokens += count
            told.text += response.chunk.text
            told.times += [time.monotonic()] * count
        return told


class WorkerStream:
    """Sequences on a decode worker's own stream, as a gateway opens them: what there is before any gateway."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._told: dict[str, tuple[Told, Begun, asyncio.Event]] = {}
        self._call: Any = None
        self._writing = asyncio.Lock()
        self._reading: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Attach to the worker."""
        self._call = worker_pb2_grpc.DecodeWorkerStub(self._channel).Attach()
        await self._call.initial_metadata()
        self._reading = asyncio.create_task(self._read())

    async def close(self) -> None:
        """Leave it."""
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading
        await self._channel.close()

    async def ask(self, request_id: str, num_tokens: int, begun: Begun) -> Told:
        """One sequence; its first token would be prefill's, and does not come."""
        ended = asyncio.Event()
        told = Told(request_id)
        self._told[request_id] = (told, begun, ended)
        sampling = wpb.Sampling(max_tokens=num_tokens, n=1)
        message = wpb.Open(request_id=request_id, epoch=1, credits=num_tokens, sampling=sampling)
        async with self._writing:  # gRPC takes one message at a time
            await self._call.write(wpb.ToDecode(open=message))
        await ended.wait()
        return told

    async def _read(self) -> None:
        async for message in self._call:
            now = time.monotonic()
            if message.WhichOneof("message") == "tokens":
                for entry in message.tokens.entries:
                    told, begun, _ = self._told[entry.request_id]
                    if not told.tokens:
                        begun()
                    told.tokens += len(entry.tokens)
                    told.times += [now] * len(entry.tokens)
            elif message.WhichOneof("message") == "finished":
                told, _, ended = self._told.pop(message.finished.request_id)
                told.whole = True
                ended.set()


Ask = Callable[[str, int, Begun], Any]


@contextlib.asynccontextmanager
async def asking(door: str, addresses: dict[str, str], num_streams: int) -> AsyncIterator[Ask]:
    """How a stream is asked for through a door: worker, grpc or http."""
    async with AsyncExitStack() as stack:
        if door == "http":
            yield lambda request_id, tokens, begun: over_http(addresses["http"], request_id, tokens, begun)
        elif door == "grpc":
            calls = GrpcCalls(addresses["grpc"], num_streams)
            stack.push_async_callback(calls.close)
            yield calls.ask
        else:
            stream = WorkerStream(addresses["worker"])
            await stream.open()
            stack.push_async_callback(stream.close)
            yield stream.ask
