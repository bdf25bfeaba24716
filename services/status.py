"""The error tree on gRPC calls: `ErrorInfo` trailers one way, typed errors the other."""

from __future__ import annotations

import re

import grpc

from .. import errors
from ..errors import InvalidRequest, KvsluiceError
from ..protos import generation_pb2 as pb

ERROR_METADATA_KEY = "kvsluice-error-bin"

# how gRPC says that a connection never came about
_NEVER_CONNECTED = re.compile(r"failed to connect|connection refused|resolv|resolution", re.IGNORECASE)
# how it says that TLS did not come about; the other side's view, a closed socket, cannot be told from a lost connection
_TLS = re.compile(r"handshake failed|hostname verification|certificate", re.IGNORECASE)
_SIZES = re.compile(r"larger than max \((\d+) vs\. (\d+)\)")

_CODES = {code.name: code for code in grpc.StatusCode}

_BY_CODE: dict[grpc.StatusCode, tuple[type[KvsluiceError], str]] = {
    grpc.StatusCode.UNAVAILABLE: (errors.WorkerLost, "the other side was lost or cannot be reached"),
    # our servers give every error of theirs an `ErrorInfo`: without one it is HTTP/2's, about a connection that broke
    grpc.StatusCode.INTERNAL: (errors.WorkerLost, "the connection to the other side broke"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (errors.DeadlineExceeded, "the deadline passed before the request was finished"),
    grpc.StatusCode.CANCELLED: (errors.RequestCancelled, "the request was cancelled"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (errors.Overloaded, "the server has no room for the request"),
    grpc.StatusCode.UNAUTHENTICATED: (errors.Unauthenticated, "the other side does not know who calls"),
    grpc.StatusCode.PERMISSION_DENIED: (errors.PermissionDenied, "the other side does not allow this"),
    grpc.StatusCode.DATA_LOSS: (errors.CorruptFrame, "data were damaged on their way"),
}


def _subclasses(cls: type[KvsluiceError]) -> dict[str, type[KvsluiceError]]:
    found = {cls.__name__: cls}
    for sub in cls.__subclasses__():
        found |= _subclasses(sub)
    return found


ERROR_TYPES = _subclasses(KvsluiceError)
"""Class name -> class, for all of `kvsluice.errors`."""


def status_code(error: KvsluiceError) -> grpc.StatusCode:
    """The gRPC status that an error ends a call with."""
    return _CODES[error.status]


def error_info(error: KvsluiceError, request_id: str = "") -> pb.ErrorInfo:
    """The public form of an error."""
    info = pb.ErrorInfo(type=error.type_name, message=error.message, retryable=error.retryable, request_id=request_id)
    if isinstance(error, InvalidRequest):
        info.field, info.allowed = error.field, error.allowed
    if isinstance(error, errors.Overloaded):
        info.retry_after_s = error.retry_after_s
    return info


def build_error(type_name: str, message: str, field: str = "", allowed: str = "") -> KvsluiceError:
    """Rebuild an error of the tree; a type that this version does not know becomes `InternalError`."""
    cls = ERROR_TYPES.get(type_name, errors.InternalError)
    if issubclass(cls, InvalidRequest):
        problem = message.removeprefix(f"{field}: ").removesuffix(f"; allowed: {allowed}")
        return cls(field, problem, allowed)
    return cls(message)


def error_from_rpc(error: grpc.RpcError, address: str = "") -> KvsluiceError:
    """The typed error behind a failed call: from its `ErrorInfo`, else from what gRPC itself reported.

    Args:
        address: of the service as the client's user gave it; named where it cannot be reached.
    """
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_METADATA_KEY and isinstance(value, bytes):
            info = pb.ErrorInfo.FromString(value)
            error_found = build_error(info.type, info.message, info.field, info.allowed)
            if isinstance(error_found, errors.Overloaded):
                error_found.retry_after_s = info.retry_after_s
            return error_found
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return _too_large(details)
    if code is grpc.StatusCode.UNAVAILABLE and _TLS.search(details):
        return errors.Unauthenticated(
            "TLS: the service's certificate is not trusted, does not hold the name that was connected to, or the "
            "service speaks no TLS; allowed: the authorities that signed it, and one of its names"
        )
    if code is grpc.StatusCode.UNAVAILABLE and address:
        if _NEVER_CONNECTED.search(details):
            return errors.WorkerLost(f'cannot reach {address}; is "kvsluice serve" running?')
        return errors.WorkerLost(f"the connection to {address} was lost")
    cls, message = _BY_CODE.get(code, (errors.InternalError, f"the call failed with status {code.name}"))
    return cls(message)


def _too_large(details: str) -> InvalidRequest:
    found = _SIZES.search(details)
    if found is None:
        return InvalidRequest("message", "is larger than the other side accepts", "a smaller prompt")
    size, limit = found.groups()
    allowed = f"up to {limit} bytes, the --max-message-bytes of the server"
    return InvalidRequest("message", f"the request has {size} bytes", allowed)
