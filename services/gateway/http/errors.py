"""Errors as OpenAI's API tells them: a status, headers, and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ....errors import InternalError, InvalidRequest, KvsluiceError, Overloaded
from ...telemetry import where

log = logging.getLogger("kvsluice.http")

_CODES = {
    "UnknownModel": "model_not_found",
    "Overloaded": "rate_limit_exceeded",
    "WorkerLost": "service_unavailable",
    "InvalidRequest": "invalid_value",
    "Unauthenticated": "invalid_api_key",
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_PARAMS = {"UnknownModel": "model"}
_HTTP_CODES = {
    404: "unknown_url",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    431: "headers_too_large",
}
_WORD = re.compile(r"(?<!^)(?=[A-Z])")


class SessionNotFound(HTTPException):
    """There is no session that could be deleted."""

    def __init__(self) -> None:
        super().__init__(404, "there is no such session")


@dataclass(frozen=True)
class Failure:
    """What a client is told.

    Attributes:
        body: the JSON object.
    """

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)

    def response(self, headers: Mapping[str, str]) -> JSONResponse:
        return JSONResponse(self.body, self.status, {**headers, **self.headers})


def failure(error: Exception) -> Failure:
    """What a client is told of an error: the tree's, the framework's, or a foreign one, which is logged and closed."""
    if isinstance(error, HTTPException):
        code = _HTTP_CODES.get(error.status_code, "invalid_request")
        if isinstance(error, SessionNotFound):
            code = "session_not_found"
        return Failure(error.status_code, _body(error.detail, error.status_code, None, code), dict(error.headers or {}))
    if not isinstance(error, KvsluiceError):
        log.error("unexpected error: %s", where(error))
        error = InternalError("internal error")
    # what clients of OpenAI look at before they try again
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    if isinstance(error, Overloaded):
        wait_s = max(error.retry_after_s, 0.0)
        headers |= {"retry-after": str(max(1, math.ceil(wait_s))), "retry-after-ms": str(max(1, round(wait_s * 1e3)))}
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    name = error.type_name
    param = error.field if isinstance(error, InvalidRequest) else _PARAMS.get(name)
    code = _CODES.get(name) or _WORD.sub("_", name).lower()
    return Failure(error.http_status, _body(error.message, error.http_status, param, code), headers)


def _body(message: str, status: int, param: str | None, code: str) -> dict[str, Any]:
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
