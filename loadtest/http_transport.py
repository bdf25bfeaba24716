"""The OpenAI door: /v1/completions, and /v1/chat/completions for chats, streamed as server-sent events."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx

from ..client import Connecting
from ..errors import (
    DeadlineExceeded,
    DuplicateRequest,
    InternalError,
    InvalidRequest,
    KvsluiceError,
    Overloaded,
    RequestCancelled,
    SessionMismatch,
    UnknownModel,
    WorkerLost,
)
from .transport import Answer, OnTokens, Request, Sampling

CONNECT_TIMEOUT_S = 10.0
MAX_ERROR_BYTES = 64 * 1024


def base_url(address: str, tls: bool = False) -> str:
    """The address of a door as a URL without a path.

    Args:
        tls: whether an address that does not say so means https.

    Raises:
        InvalidRequest: it is neither host:port nor http(s)://host:port, with or without /v1.
    """
    url = address if "://" in address else f"http{'s' if tls else ''}://{address}"
    try:
        parts = urlsplit(url)
        is_bare = parts.path.rstrip("/") in ("", "/v1") and not parts.query and not parts.fragment
        if parts.scheme in ("http", "https") and parts.hostname and parts.port and is_bare:
            return f"{parts.scheme}://{parts.netloc}"
    except ValueError:
        pass
    raise InvalidRequest("--address", f"got {address[:128]!r}", "host:port or http(s)://host:port")


def _verified(connecting: Connecting) -> ssl.SSLContext:
    """Whom a connection over TLS trusts, and what it shows."""
    try:
        context = ssl.create_default_context(cafile=connecting.get("tls_ca") or None)
        cert = connecting.get("tls_cert")
        if cert:
            context.load_cert_chain(cert, connecting.get("tls_key"))
    except (OSError, ValueError) as exc:
        raise InvalidRequest("--tls-ca", f"TLS cannot be set up: {exc}", "PEM files of certificates and a key") from exc
    return context


class HttpTransport:
    """Requests over HTTP/1.1, one connection each while it runs.

    Args:
        address: host:port or a URL, with or without /v1.
        connecting: key and TLS.

    Raises:
        InvalidRequest: one of them cannot be used.
    """

    def __init__(self, address: str, sampling: Sampling, connecting: Connecting | None = None) -> None:
        self._sampling, self._model = sampling, sampling.model
        given: Connecting = connecting or {}
        key, is_tls = given.get("api_key"), any(given.get(name) for name in ("tls", "tls_ca", "tls_cert"))
        url = base_url(address, is_tls)
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            verify=_verified(given) if url.startswith("https") else False,
            # the driver ends what takes too long; how many are open is its business, too
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            # straight to the address given: no proxy of the environment, no redirect
            trust_env=False,
        )

    async def model_name(self) -> str:
        """The first model that the door lists.

        Raises:
            KvsluiceError: it does not answer, or lists none.
        """
        try:
            response = await self._client.get("/v1/models", timeout=30.0)
            if response.status_code != httpx.codes.OK:
                raise _refused(response.status_code, response.text, response.headers)
            return str(response.json()["data"][0]["id"])
        except httpx.HTTPError as exc:
            raise WorkerLost(f"cannot reach {self._client.base_url}: {type(exc).__name__}") from exc
        except (ValueError, LookupError, TypeError) as exc:
            raise InternalError(f"{self._client.base_url} does not list models as OpenAI's API does") from exc

    def use_model(self, name: str) -> None:
        """Name this model in every request from now on: OpenAI's API wants one."""
        self._model = name

    async def run(self, request: Request, on_tokens: OnTokens) -> Answer:
        is_chat = not isinstance(request.prompt, str) and isinstance(request.prompt[0], Mapping)
        path = "/v1/chat/completions" if is_chat else "/v1/completions"
        body = self._body(request, "messages" if is_chat else "prompt")
        usage: dict[str, Any] = {}
        try:
            async with self._client.stream("POST", path, json=body) as response:
                if response.status_code != httpx.codes.OK:
                    raise _refused(response.status_code, await _start_of(response), response.headers)
                async for event in _events(response):
                    for choice in event.get("choices") or ():
                        if choice.get("text") or (choice.get("delta") or {}).get("content"):
                            on_tokens(1)
                    usage = event.get("usage") or usage
        except httpx.HTTPError as exc:
            raise WorkerLost(f"the connection to {self._client.base_url} failed: {type(exc).__name__}") from exc
        except (AttributeError, TypeError) as exc:
            raise InternalError("an event of the stream is not as OpenAI's API has it") from exc
        return _answer(usage)

    def _body(self, request: Request, field: str) -> dict[str, Any]:
        sampling = self._sampling
        prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
        body = {
            "model": self._model,
            field: prompt,
            "max_tokens": request.max_tokens,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            **sampling.extra,
        }
        # what others than this service may not know goes along only where it says something
        if sampling.ignore_eos:
            body["ignore_eos"] = True
        if request.recipe:
            body["recipe"] = request.recipe
        if request.session_id:
            body["session_id"] = request.session_id
        return body

    async def close(self) -> None:
        await self._client.aclose()


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The stream's events up to `[DONE]`.

    Raises:
        KvsluiceError: an event is an error, or the stream ends before its end.
    """
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except (ValueError, RecursionError) as exc:
            raise InternalError("an event of the stream is not JSON") from exc
        if not isinstance(event, dict):
            raise InternalError("an event of the stream is no JSON object")
        if event.get("error"):
            error = event["error"]
            code = error.get("code") if isinstance(error, dict) else None
            raise _refused(code if isinstance(code, int) else 500, data, {})
        yield event
    raise WorkerLost("the stream ended before its end was told")


async def _start_of(response: httpx.Response) -> str:
    found = b""
    async for part in response.aiter_bytes():
        found += part
        if len(found) >= MAX_ERROR_BYTES:
            break
    return found[:MAX_ERROR_BYTES].decode(errors="replace")


def _answer(usage: Mapping[str, Any]) -> Answer:
    details = usage.get("prompt_tokens_details") or {}
    try:
        return Answer(
            int(usage["prompt_tokens"]), int(usage["completion_tokens"]), int(details.get("cached_tokens") or 0)
        )
    except (LookupError, TypeError, ValueError, AttributeError) as exc:
        raise InternalError("the stream did not say what it used (stream_options.include_usage)") from exc


_BY_STATUS: Mapping[int, type[KvsluiceError]] = {
    404: UnknownModel,
    408: DeadlineExceeded,
    409: SessionMismatch,
    499: RequestCancelled,
    503: WorkerLost,
    504: DeadlineExceeded,
}


def _refused(status: int, body: str, headers: Mapping[str, str]) -> KvsluiceError:
    """The error of the tree that an OpenAI error body stands for."""
    message, name, field = f"HTTP status {status}", "", "request"
    try:
        error = json.loads(body)["error"]
        message, name = str(error["message"])[:1000], str(error.get("type") or "")
        field = str(error.get("param") or field)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    if status == 429:
        return Overloaded(message, _seconds(headers.get("retry-after", "")))
    if status in (400, 413, 422):
        return InvalidRequest(field, message, "what the message says")
    if name == DuplicateRequest.__name__:
        return DuplicateRequest(message)
    return _BY_STATUS.get(status, InternalError)(message)


def _seconds(text: str) -> float:
    try:
        return max(0.0, float(text))
    except ValueError:
        return 0.0
