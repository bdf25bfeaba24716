"""Runs what an endpoint was asked for, and tells the answer: whole, or as server-sent events.

A stream's messages are written by the task that runs the request, and written only as fast as the client reads: that is
how the credits of its choices are held back. Whoever goes away has its request cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Coroutine, Mapping
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ....errors import InvalidRequest, KvsluiceError
from ....protos import generation_pb2 as pb
from ...api import Collector
from ...results import Completion
from ..intake import Intake
from .errors import failure
from .shapes import ChunkShape, whole_answer
from .translate import Ask, Prompt

LAST_WORD_S = 5.0  # for the error that ends a stream: its client may not read any more
END_S = 60.0  # for a client to take the end of its answer: the request's own deadline does not count any more

_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies hand every event on
]


class Gone(Exception):
    """The client has closed its connection."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`; cancel it when the client goes. The request's body has been read.

    Raises:
        Gone: it went.
    """
    task, watch = asyncio.create_task(work), asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Answer(Response):
    """The answer to an `Ask`, made while it is sent.

    Args:
        headers: of every reply to the request.
    """

    def __init__(self, ask: Ask, intake: Intake, headers: Mapping[str, str]) -> None:
        self._ask, self._intake, self._reply_headers = ask, intake, dict(headers)
        self.background = None
        model = intake.pool.model
        self._fingerprint = None if model is None else f"fp_{model.fingerprint[:12]}"
        self._collectors = [Collector(request.request_id) for request in ask.requests]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tell = (
            _Stream(self._ask, self._intake, send, self._reply_headers, self._fingerprint) if self._ask.stream else None
        )
        try:
            with contextlib.suppress(Gone):
                await unless_gone(receive, self._run(tell))
                if tell is not None:
                    await _in_time(END_S, tell.end(self._done()), scope)
                else:
                    await self._whole()(scope, receive, send)
        except Exception as exc:
            error = self._ask.renamed(exc) if isinstance(exc, InvalidRequest) else exc
            if tell is None or not tell.begun:
                await failure(error).response(self._reply_headers)(scope, receive, send)
            else:
                await _in_time(LAST_WORD_S, tell.error(error), scope)

    async def _run(self, tell: _Stream | None) -> None:
        jobs = [self._one(i, request, tell) for i, request in enumerate(self._ask.requests)]
        if len(jobs) == 1:
            await jobs[0]
            return
        try:
            async with asyncio.TaskGroup() as group:
                for job in jobs:
                    group.create_task(job)
        except* Exception as several:
            raise next((e for e in several.exceptions if isinstance(e, KvsluiceError)), several.exceptions[0]) from None

    async def _one(self, index: int, request: pb.GenerateRequest, tell: _Stream | None) -> None:
        collector = self._collectors[index]

        async def write(response: pb.GenerateResponse) -> None:
            if tell is None or response.HasField("complete"):
                collector.take(response)
            else:
                await tell.chunk(index, response.chunk)

        counted = None if tell is None else tell.add_prompt
        await self._intake.generate(request, write, self._ask.timeout_s, counted)

    def _done(self) -> list[Completion]:
        return [collector.completion for collector in self._collectors]

    def _whole(self) -> JSONResponse:
        tokenizer = self._intake.tokenizer
        echoes = [echo_text(self._intake, prompt) for prompt in self._ask.echoes]
        body = whole_answer(self._ask, self._done(), echoes, tokenizer.token_bytes, self._fingerprint)
        return JSONResponse(body, headers=self._reply_headers)


async def _in_time(seconds: float, work: Coroutine[Any, Any, None], scope: Scope) -> None:
    """Tell how a stream ends; a client that does not read is cut off."""
    try:
        async with asyncio.timeout(seconds):
            await work
    except TimeoutError:
        scope["state"]["connection"].abort()


class _Stream:
    """Server-sent events. Status and headers go out with the first chunk, so that errors before it have their own."""

    def __init__(
        self, ask: Ask, intake: Intake, send: Send, headers: Mapping[str, str], fingerprint: str | None
    ) -> None:
        self.begun = False
        self._ask, self._intake, self._send = ask, intake, send
        self._reply_headers = [*_EVENT_STREAM, *((k.encode(), v.encode()) for k, v in headers.items())]
        self._shape = ChunkShape(ask, intake.tokenizer.token_bytes, fingerprint)
        self.add_prompt = self._shape.add_prompt
        self._lock = asyncio.Lock()
        self._echoes: dict[int, str] = {}

    async def chunk(self, prompt: int, chunk: pb.Chunk) -> None:
        """Tell what became final of a choice; waits for a client that has not read what went before."""
        data = self._shape.chunk(prompt, chunk, self._echo(prompt))
        if data is not None:
            await self._event(data)

    async def end(self, done: list[Completion]) -> None:
        """Tell that the answer is whole."""
        if self._ask.include_usage:
            await self._event(self._shape.last(done))
        await self._begin()
        await self._body(b"data: [DONE]\n\n", more=False)

    async def error(self, error: Exception) -> None:
        """Tell what became of the rest."""
        await self._body(_event(json.dumps(failure(error).body)), more=False)

    def _echo(self, prompt: int) -> str:
        if not self._ask.echoes:
            return ""
        if prompt not in self._echoes:
            self._echoes[prompt] = echo_text(self._intake, self._ask.echoes[prompt])
        return self._echoes[prompt]

    async def _event(self, data: str) -> None:
        if not self.begun:
            await self._begin()
        await self._body(_event(data))

    async def _begin(self) -> None:
        async with self._lock:
            if not self.begun:
                self.begun = True
                await self._send({"type": "http.response.start", "status": 200, "headers": self._reply_headers})

    async def _body(self, data: bytes, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()


def echo_text(intake: Intake, prompt: Prompt) -> str:
    """A prompt's text."""
    if isinstance(prompt, str):
        return prompt
    decoder = intake.tokenizer.stream()
    return decoder.push(prompt) + decoder.finish()
