"""Routes of the HTTP API."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from ....compression.recipe import PRESETS, recipe_names
from ....errors import InvalidRequest, KvsluiceError, UnknownModel, WorkerLost
from ...config import ServeConfig
from ...security import DELETE_SESSION, GENERATE, GET_MODEL_INFO, LIST_SESSIONS, METRICS, Guard, current_caller
from ...tracing import accept
from ..intake import Intake
from . import shapes, translate
from .answers import Answer
from .bodies import BodyReader
from .errors import SessionNotFound, failure
from .schemas import AnyBody, ChatBody, CompletionBody, parse_body
from .translate import Ask

log = logging.getLogger("kvsluice.http")

BIG_BODY_BYTES = 256 * 1024  # parsing more would hold other streams up


class Routes:
    """What the routes share.

    Args:
        guard: says who may call what. Routes are the methods of gRPC's that do the same.
    """

    def __init__(self, intake: Intake, config: ServeConfig, guard: Guard) -> None:
        self._intake, self._name, self._guard = intake, config.model_name, guard
        self._bodies = BodyReader(config.max_message_bytes, config.http_read_timeout_s)
        self._created = int(time.time())
        self._recipes = tuple(dict.fromkeys((*PRESETS, *recipe_names())))

    def app(self) -> FastAPI:
        """The application. It describes itself nowhere: docs/http.md does."""
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        generate, info, reads = self._let_in(GENERATE), self._let_in(GET_MODEL_INFO), self._let_in(METRICS)
        lists, deletes = self._let_in(LIST_SESSIONS), self._let_in(DELETE_SESSION)
        add: Any = app.add_api_route
        add("/health", self.health)
        add("/ready", self.ready)
        add("/metrics", self.metrics, dependencies=[reads])
        add("/v1/models", self.models, dependencies=[info])
        add("/v1/models/{name:path}", self.model, dependencies=[info])
        add("/v1/completions", self.completions, methods=["POST"], dependencies=[generate])
        add("/v1/chat/completions", self.chat, methods=["POST"], dependencies=[generate])
        add("/v1/sessions", self.sessions, dependencies=[lists])
        add("/v1/sessions/{session_id}", self.delete_session, methods=["DELETE"], dependencies=[deletes])
        for kind in (KvsluiceError, HTTPException, Exception):
            app.add_exception_handler(kind, _failed)
        return app

    def _let_in(self, method: str) -> Any:
        async def check(request: Request) -> None:
            request.state.request_id = request.headers.get("x-request-id") or uuid.uuid4().hex
            # two of them are none
            shown = request.headers.getlist("authorization")
            current_caller.set(self._guard.authorize(method, shown[0] if len(shown) == 1 else None))
            accept(request.headers.items())

        return Depends(check)

    async def health(self) -> Response:
        """Liveness: the process answers."""
        return PlainTextResponse("ok\n")

    async def ready(self) -> Response:
        """Readiness: a request would be served now."""
        ready = self._intake.ready
        return PlainTextResponse("ready\n" if ready else "not ready\n", 200 if ready else 503)

    async def metrics(self) -> Response:
        """The gateway's figures, for Prometheus."""
        return Response(generate_latest(self._intake.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> Response:
        return JSONResponse(shapes.models(self._name, self._recipes, self._created))

    async def model(self, name: str) -> Response:
        served, recipe = translate.split_model(name, self._name)
        if served != self._name or (recipe and recipe not in self._recipes):
            raise UnknownModel(f"model: {name[:64]!r} is not served here; allowed: {self._name}")
        return JSONResponse(shapes.model(name, self._created))

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, CompletionBody, translate.completion)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatBody, translate.chat)

    async def sessions(self, tenant: str = "") -> Response:
        """Of the key's own tenant, or for an admin of another one."""
        return JSONResponse(shapes.sessions(await self._intake.list_sessions(tenant)))

    async def delete_session(self, session_id: str, tenant: str = "") -> Response:
        """Of the key's own tenant, or for an admin of another one."""
        if not await self._intake.delete_session(session_id, tenant):
            raise SessionNotFound
        return JSONResponse({"id": session_id, "object": "session.deleted", "deleted": True})

    async def _answer(
        self, request: Request, kind: type[AnyBody], asked: Callable[[AnyBody, str, str], Ask]
    ) -> Response:
        if self._intake.draining:
            raise WorkerLost("the service is shutting down")
        request_id = request.state.request_id
        try:
            async with self._bodies.read(request) as raw:
                if len(raw) > BIG_BODY_BYTES:
                    body = await asyncio.to_thread(parse_body, kind, raw)
                else:
                    body = parse_body(kind, raw)
                del raw
            ask = asked(body, self._name, request_id)
        except InvalidRequest as exc:
            raise translate.renamed(exc, {}) from None
        return Answer(ask, self._intake, _headers(request_id))


async def _failed(request: Request, error: Exception) -> Response:
    return failure(error).response(_headers(getattr(request.state, "request_id", "")))


def _headers(request_id: str) -> dict[str, str]:
    fits = 0 < len(request_id) <= 128 and request_id.isascii() and request_id.isprintable()
    return {"x-request-id": request_id} if fits else {}


class Boundary:
    """Around the application: what it lets out does not reach the server's log, which would repeat prompts.

    Args:
        max_header_bytes: of a request's line and headers. The server bounds those that come in many pieces only.
    """

    def __init__(self, app: ASGIApp, max_header_bytes: int) -> None:
        self._app, self._max_header_bytes = app, max_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = ended = False

        async def sending(message: Any) -> None:
            nonlocal started, ended
            started, ended = True, message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        try:
            self._check_head(scope)
            await self._app(scope, receive, sending)
        except ClientDisconnect:
            pass
        except Exception as exc:
            # the framework lets foreign errors go on after it has answered them
            if not started:
                await failure(exc).response({})(scope, receive, send)
            elif not ended:
                failure(exc)
                scope["state"]["connection"].abort()

    def _check_head(self, scope: Scope) -> None:
        size = len(scope["raw_path"]) + len(scope["query_string"])
        if size + sum(len(name) + len(value) for name, value in scope["headers"]) > self._max_header_bytes:
            allowed = f"up to {self._max_header_bytes} bytes, the --http-max-header-bytes of the server"
            raise HTTPException(431, f"headers: are too large; allowed: {allowed}", {"connection": "close"})
