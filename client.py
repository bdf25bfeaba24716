"""Python clients of a running service, sync and async.

    with Client("127.0.0.1:8033") as client:
        print(client.generate("Once upon a time", max_tokens=32).text)
        for chunk in client.stream("Once upon a time", recipe="fast"):
            print(chunk.text, end="")

Every failure raises an error of `kvsluice.errors`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any, Unpack

import grpc
import grpc.aio

from .protos import generation_pb2 as pb
from .protos.generation_pb2_grpc import GenerationStub
from .services.api import Collector, Options, Prompt, build_request, parse_info, parse_sessions
from .services.connection import DEFAULT_ADDRESS, Connecting, checked_address, open_channel
from .services.results import (
    Choice,
    Chunk,
    Completion,
    DurabilityReport,
    ModelInfo,
    RecipeReport,
    SessionInfo,
    SessionReport,
    Timing,
    TokenLogprob,
    Usage,
)
from .services.rpc import call_error, is_cancelled
from .services.status import error_from_rpc

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Choice",
    "Chunk",
    "Client",
    "Completion",
    "Connecting",
    "DurabilityReport",
    "ModelInfo",
    "Options",
    "Prompt",
    "RecipeReport",
    "SessionInfo",
    "SessionReport",
    "Stream",
    "Timing",
    "TokenLogprob",
    "Usage",
]


class Stream(Iterator[Chunk]):
    """Chunks of a running request. `cancel` ends it, from any thread; `completion` holds the result once it is read."""

    def __init__(self, call: Any, request_id: str, address: str = "") -> None:
        self._call = call
        self._address = address
        self._collector = Collector(request_id)

    @property
    def request_id(self) -> str:
        return self._collector.request_id

    @property
    def completion(self) -> Completion:
        return self._collector.completion

    def cancel(self) -> None:
        """End the request; iteration then raises `RequestCancelled`."""
        self._call.cancel()

    def __next__(self) -> Chunk:
        try:
            chunk = self._collector.take(next(self._call))
            if chunk is None:
                # the status is part of the result
                next(self._call, None)
                raise StopIteration
            return chunk
        except grpc.RpcError as exc:
            raise error_from_rpc(exc, self._address) from exc


class AsyncStream(AsyncIterator[Chunk]):
    """Chunks of a running request. `cancel` ends it; `completion` holds the result once it is read."""

    def __init__(self, call: Any, request_id: str, address: str = "") -> None:
        self._call = call
        self._address = address
        self._collector = Collector(request_id)

    @property
    def request_id(self) -> str:
        return self._collector.request_id

    @property
    def completion(self) -> Completion:
        return self._collector.completion

    def cancel(self) -> None:
        """End the request; iteration then raises `RequestCancelled`."""
        self._call.cancel()

    async def __anext__(self) -> Chunk:
        try:
            response = await self._call.read()
            if response is grpc.aio.EOF:
                raise StopAsyncIteration
            chunk = self._collector.take(response)
            if chunk is None:
                await self._call.read()
                raise StopAsyncIteration
            return chunk
        except grpc.RpcError as exc:
            raise error_from_rpc(exc, self._address) from exc
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            # the call was cancelled, not the task that reads it
            raise await call_error(self._call) from None


class Client:
    """A connection to a service. Safe to share between threads.

    Args:
        address: host:port of the generate API.
        timeout_s: deadline of requests that bring none; None = the server's.
        connecting: key and TLS, as `Connecting` says.

    Raises:
        InvalidRequest: the address has no port, or the key is none.
        ConfigError: a file of TLS cannot be used.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, timeout_s: float | None = None, **connecting: Unpack[Connecting]
    ) -> None:
        self._timeout_s = timeout_s
        self._address = checked_address(address)
        self._channel = open_channel(address, connecting, is_async=False)
        self._stub = GenerationStub(self._channel)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """Start a request and return its chunks as they come."""
        request = build_request(prompt, options)
        call = self._stub.Generate(request, timeout=options.get("timeout_s", self._timeout_s))
        return Stream(call, request.request_id, self._address)

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Run a request to its end."""
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        return stream.completion

    def cancel(self, request_id: str) -> bool:
        """End a request by its id. Returns whether it was running."""
        try:
            return bool(self._stub.Cancel(pb.CancelRequest(request_id=request_id), timeout=self._timeout_s).found)
        except grpc.RpcError as exc:
            raise error_from_rpc(exc, self._address) from exc

    def sessions(self, tenant: str = "") -> list[SessionInfo]:
        """Conversations that can be continued, those used last first; of another tenant for an admin's key alone."""
        try:
            request = pb.ListSessionsRequest(tenant=tenant)
            return parse_sessions(self._stub.ListSessions(request, timeout=self._timeout_s))
        except grpc.RpcError as exc:
            raise error_from_rpc(exc, self._address) from exc

    def delete_session(self, session_id: str, tenant: str = "") -> bool:
        """Delete a conversation, of another tenant for an admin's key alone. Returns whether it was there."""
        request = pb.DeleteSessionRequest(session_id=session_id, tenant=tenant)
        try:
            return bool(self._stub.DeleteSession(request, timeout=self._timeout_s).found)
        except grpc.RpcError as exc:
            raise error_from_rpc(exc, self._address) from exc

    def model_info(self) -> ModelInfo:
        """What is served."""
        try:
            return parse_info(self._stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=self._timeout_s))
        except grpc.RpcError as exc:
            raise error_from_rpc(exc, self._address) from exc

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class AsyncClient:
    """As `Client`, for asyncio. Belongs to the event loop that it is first used in."""

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, timeout_s: float | None = None, **connecting: Unpack[Connecting]
    ) -> None:
        self._timeout_s = timeout_s
        self._address = checked_address(address)
        self._channel = open_channel(address, connecting, is_async=True)
        self._stub = GenerationStub(self._channel)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncStream:
        """Start a request and return its chunks as they come."""
        request = build_request(prompt, options)
        call = self._stub.Generate(request, timeout=options.get("timeout_s", self._timeout_s))
        return AsyncStream(call, request.request_id, self._address)

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Run a request to its end."""
        stream = self.stream(prompt, **options)
        async for _ in stream:
            pass
        return stream.completion

    async def cancel(self, request_id: str) -> bool:
        """End a request by its id. Returns whether it was running."""
        try:
            reply = await self._stub.Cancel(pb.CancelRequest(request_id=request_id), timeout=self._timeout_s)
        except grpc.RpcError as exc:
            raise error_from_rpc(exc, self._address) from exc
        return bool(reply.found)

    async def sessions(self, tenant: str = "") -> list[SessionInfo]:
        """Conversations that can be continued, those used last first; of another tenant for an admin's key alone."""
        try:
            request = pb.ListSessionsRequest(tenant=tenant)
            return parse_sessions(await self._stub.ListSessions(request, timeout=self._timeout_s))
        except grpc.RpcError as exc:
            raise error_from_rpc(exc, self._address) from exc

    async def delete_session(self, session_id: str, tenant: str = "") -> bool:
        """Delete a conversation, of another tenant for an admin's key alone. Returns whether it was there."""
        request = pb.DeleteSessionRequest(session_id=session_id, tenant=tenant)
        try:
            return bool((await self._stub.DeleteSession(request, timeout=self._timeout_s)).found)
        except grpc.RpcError as exc:
            raise error_from_rpc(exc, self._address) from exc

    async def model_info(self) -> ModelInfo:
        """What is served."""
        try:
            return parse_info(await self._stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=self._timeout_s))
        except grpc.RpcError as exc:
            raise error_from_rpc(exc, self._address) from exc

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()
