"""gRPC servers and channels as every process of the system makes them: bounds, keepalive, errors."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from ..errors import ConfigError, InternalError, InvalidRequest, KvsluiceError
from .security import Caller, FleetSecurity, Guard, current_caller
from .status import ERROR_METADATA_KEY, error_from_rpc, error_info, status_code
from .telemetry import current_request_id, where
from .tls import TlsFiles, channel_credentials, server_credentials
from .tracing import accept

log = logging.getLogger("kvsluice.rpc")

_OWN_METHODS = "/kvsluice."


def _common_options(max_message_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        # what a process sends is bounded where it is made; the other side alone says what it takes
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def server_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """Options of a server; a port is never shared with another process."""
    return [
        *_common_options(max_message_bytes),
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ]


def channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """Options of a channel; reconnects quickly, because a restarted worker is a common case."""
    return [
        *_common_options(max_message_bytes),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
    ]


def make_channel(address: str, max_message_bytes: int, security: FleetSecurity | None = None) -> Any:
    """A channel to another process of the system, which shows it the fleet's token.

    Raises:
        ConfigError: a file of TLS cannot be used.
    """
    security, options = security or FleetSecurity(), channel_options(max_message_bytes)
    if security.tls is None:
        channel = grpc.aio.insecure_channel(address, options=options)
    else:
        credentials, more = channel_credentials(security.tls)
        channel = grpc.aio.secure_channel(address, credentials, options=[*options, *more])
    return with_metadata(channel, security.metadata)


def make_server(max_message_bytes: int, guard: Guard) -> grpc.aio.Server:
    """A server that lets in whom the guard does, and whose own methods end with errors of the tree alone."""
    return grpc.aio.server(interceptors=[GuardingInterceptor(guard)], options=server_options(max_message_bytes))


def with_metadata(channel: Any, metadata: tuple[tuple[str, str], ...]) -> Any:
    """A channel, of asyncio or not, whose every call carries these entries besides its own. Stubs take it as any other;
    call credentials of gRPC's own would need TLS."""
    return _CarryingChannel(channel, metadata) if metadata else channel


class _CarryingChannel:
    def __init__(self, channel: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._channel, self._metadata = channel, metadata

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def _carry(self, call: Any) -> Any:
        def carrying(*args: Any, metadata: Any = None, **kwargs: Any) -> Any:
            return call(*args, metadata=(*(metadata or ()), *self._metadata), **kwargs)

        return carrying

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._carry(self._channel.unary_unary(*args, **kwargs))

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._carry(self._channel.unary_stream(*args, **kwargs))

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._carry(self._channel.stream_unary(*args, **kwargs))

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._carry(self._channel.stream_stream(*args, **kwargs))

    async def __aenter__(self) -> _CarryingChannel:
        await self._channel.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._channel.__aexit__(*exc_info)


def join_address(host: str, port: int) -> str:
    """host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind(server: grpc.aio.Server, host: str, port: int, tls: TlsFiles | None = None) -> int:
    """Listen on exactly `host`. Returns the port.

    Args:
        tls: its files; None = plaintext.

    Raises:
        ConfigError: it cannot listen, or a file of TLS cannot be used.
    """
    credentials = None if tls is None else server_credentials(tls)
    try:
        if credentials is None:
            bound = int(server.add_insecure_port(join_address(host, port)))
        else:
            bound = int(server.add_secure_port(join_address(host, port), credentials))
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise ConfigError(f"host, port: cannot listen on {host} port {port}: {_why_not(host, port)}")
    return bound


def _why_not(host: str, port: int) -> str:
    """Why nothing can listen there; gRPC itself does not say."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as exc:
        return "it is already in use" if exc.errno == errno.EADDRINUSE else exc.strerror or type(exc).__name__
    return "the address does not fit"


async def call_error(call: Any) -> KvsluiceError:
    """The typed error that a call ended with, once it has ended."""
    code, trailers, details = await call.code(), await call.trailing_metadata(), await call.details()
    return error_from_rpc(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers, details))


def is_cancelled() -> bool:
    """Whether the current task itself was cancelled. A call whose connection broke raises `CancelledError`, too."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def read_all(call: Any, take: Callable[[Any], None]) -> None:
    """Hand every message of a call to `take`. Raises the typed error that the call ends with, if it does."""
    try:
        async for message in call:
            take(message)
    except (grpc.RpcError, asyncio.InvalidStateError) as exc:
        log.debug("a call ended: %s", type(exc).__name__)
    except asyncio.CancelledError:
        if is_cancelled():
            raise
    if await call.code() is not grpc.StatusCode.OK:
        raise await call_error(call)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: KvsluiceError) -> None:
    """End a call with a typed error. Never returns."""
    info = error_info(error, current_request_id.get())
    await context.abort(
        status_code(error), error.message, trailing_metadata=((ERROR_METADATA_KEY, info.SerializeToString()),)
    )


Handler = Callable[[Any, Any], Awaitable[Any]]


def _guarded(inner: Handler, parse: Callable[[bytes], Any] | None, method: str, caller: Caller) -> Handler:
    async def handler(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        current_caller.set(caller)
        accept(context.invocation_metadata())
        try:
            if parse is not None:
                try:
                    request = parse(request)
                except DecodeError as exc:
                    raise InvalidRequest(
                        "message", "cannot be parsed", "a protobuf message whose strings are valid UTF-8"
                    ) from exc
            return await inner(request, context)
        except KvsluiceError as exc:
            await abort(context, exc)
        except (grpc.aio.AbortError, grpc.aio.UsageError):
            raise
        except Exception as exc:
            log.error("unexpected error in %s: %s", method, where(exc))
            await abort(context, InternalError("internal error"))

    return handler


def _refusal(error: KvsluiceError) -> Handler:
    async def handler(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await abort(context, error)

    return handler


class GuardingInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Asks the guard about every call, before its message is parsed. Maps what handlers raise to a status and an
    `ErrorInfo`; anything foreign is INTERNAL with a closed message.

    Handlers are coroutines that write through the context: an async generator would be left suspended when its call
    is cancelled during a write, and clean up only when it is collected.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        try:
            caller = self._guard.authorize(method, _authorization(handler_call_details.invocation_metadata))
        except KvsluiceError as exc:
            return _rebuilt(handler, _refusal(exc), parses=False)
        if not method.startswith(_OWN_METHODS):
            return handler
        parse = None if handler.request_streaming else handler.request_deserializer
        inner = getattr(handler, _kind(handler))
        return _rebuilt(handler, _guarded(inner, parse, method, caller), parses=handler.request_streaming)


def _authorization(metadata: Any) -> str | None:
    """The one entry of that name; two of them are none."""
    found = [value for key, value in metadata or () if key == "authorization"]
    return found[0] if len(found) == 1 and isinstance(found[0], str) else None


def _kind(handler: grpc.RpcMethodHandler[Any, Any]) -> str:
    return ("stream" if handler.request_streaming else "unary") + (
        "_stream" if handler.response_streaming else "_unary"
    )


def _rebuilt(handler: grpc.RpcMethodHandler[Any, Any], behavior: Handler, parses: bool) -> Any:
    """A handler of the same kind with another behaviour.

    Args:
        parses: gRPC itself parses what comes.
    """
    return getattr(grpc, f"{_kind(handler)}_rpc_method_handler")(
        behavior,
        request_deserializer=handler.request_deserializer if parses else None,
        response_serializer=handler.response_serializer,
    )
