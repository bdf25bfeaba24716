"""The HTTP door against a small server that speaks OpenAI's API, over a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from kvsluice.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    KvsluiceError,
    Overloaded,
    UnknownModel,
    WorkerLost,
)
from kvsluice.loadtest import transport as doors
from kvsluice.loadtest.http_transport import HttpTransport, base_url

TOKENS = 5


class Fake:
    """Answers as asked by the recipe: well, or with one of the faults that servers have."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.left_early = asyncio.Event()
        self.started = asyncio.Event()
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/completions")(self.completions)
        self.app.post("/v1/chat/completions")(self.completions)

    async def models(self) -> dict:
        return {"object": "list", "data": [{"id": "fake", "object": "model"}]}

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        fault = body.get("recipe", "")
        if fault.isdigit():
            error = {"message": f"status {fault}", "type": "some", "param": "max_tokens", "code": None}
            return JSONResponse({"error": error}, int(fault), {"Retry-After": "1.5"})
        if fault == "html":
            return Response("<html>gateway</html>" * 10_000, 502)
        stream = self.hang() if fault == "hang" else self.stream(body, fault)
        return StreamingResponse(stream, media_type="text/event-stream")

    async def stream(self, body: dict, fault: str) -> AsyncIterator[str]:
        is_chat = "messages" in body
        for place in range(body["max_tokens"]):
            said = {"delta": {"content": "x"}} if is_chat else {"text": "x"}
            yield sse({"choices": [{"index": 0, "finish_reason": None, **said}]})
            if fault == "broken" and place == 2:
                yield "data: {not json\n\n"
            if fault == "error" and place == 2:
                yield sse({"error": {"message": "lost", "type": "WorkerLost", "code": 503}})
            if fault == "short" and place == 2:
                return
        yield ": a comment\n\n"
        yield sse({"choices": [{"index": 0, "finish_reason": "length", "text": ""}]})
        usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
        yield sse({"choices": [], "usage": usage | {"prompt_tokens_details": {"cached_tokens": 3}}})
        yield "data: [DONE]\n\n"

    async def hang(self) -> AsyncIterator[str]:
        try:
            yield sse({"choices": [{"index": 0, "text": "x"}]})
            self.started.set()
            await asyncio.Event().wait()
        finally:
            self.left_early.set()


def sse(event: dict) -> str:
    return f"data: {json.dumps(event)}\n\n"


@pytest.fixture
async def fake():
    fake = Fake()
    config = uvicorn.Config(fake.app, "127.0.0.1", 0, log_level="error", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    # it must leave the test's signal handlers alone
    server.install_signal_handlers = lambda: None
    socket = config.bind_socket()
    task = asyncio.create_task(server.serve([socket]))
    fake.address = "{}:{}".format(*socket.getsockname())
    yield fake
    server.should_exit = True
    await task


def asked(recipe: str = "", prompt=(1, 2, 3), session_id: str = "") -> doors.Request:
    return doors.Request(prompt, TOKENS, recipe, session_id, 60.0)


async def take(address: str, request: doors.Request, **more) -> tuple[doors.Answer, list[int]]:
    counts: list[int] = []
    door = HttpTransport(address, doors.Sampling("fake", seed=4), **more)
    try:
        return await door.run(request, counts.append), counts
    finally:
        await door.close()


async def test_a_stream_is_read_as_it_comes_and_its_usage_counts(fake):
    answer, counts = await take(fake.address, asked("fast", session_id="tea"), connecting={"api_key": "key"})
    assert counts == [1] * TOKENS
    assert (answer.input_tokens, answer.output_tokens, answer.cached_tokens) == (7, TOKENS, 3)
    (body,), (headers,) = fake.bodies, fake.headers
    assert body == {
        "model": "fake", "prompt": [1, 2, 3], "max_tokens": TOKENS, "temperature": 0.0, "seed": 4, "stream": True,
        "stream_options": {"include_usage": True}, "ignore_eos": True, "recipe": "fast", "session_id": "tea",
    }  # fmt: skip
    assert headers["authorization"] == "Bearer key"


async def test_chats_and_texts_go_to_their_own_doors(fake):
    messages = ({"role": "user", "content": "Hi"},)
    _, counts = await take(fake.address, asked(prompt=messages))
    assert counts == [1] * TOKENS
    await take(f"http://{fake.address}", asked(prompt="Hi"))
    assert fake.bodies[0]["messages"] == [{"role": "user", "content": "Hi"}]
    assert fake.bodies[1]["prompt"] == "Hi"


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("400", InvalidRequest), ("404", UnknownModel), ("429", Overloaded), ("500", InternalError),
        ("503", WorkerLost), ("504", DeadlineExceeded), ("html", InternalError), ("broken", InternalError),
        ("error", WorkerLost), ("short", WorkerLost),
    ],
)  # fmt: skip
async def test_each_fault_is_the_error_of_the_tree_that_it_stands_for(fake, fault, error):
    with pytest.raises(KvsluiceError) as failed:
        await take(fake.address, asked(fault))
    assert type(failed.value) is error
    if isinstance(failed.value, Overloaded):
        assert failed.value.retry_after_s == 1.5


async def test_a_cancelled_request_ends_at_the_server_as_well(fake):
    task = asyncio.create_task(take(fake.address, asked("hang")))
    await fake.started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(fake.left_early.wait(), 30)


async def test_a_door_that_is_not_there_is_a_lost_worker():
    with pytest.raises(WorkerLost):
        await take("127.0.0.1:1", asked())


@pytest.mark.parametrize(
    "address", ["", "host", "ftp://a:1", "http://a:1/v2", "http://a:1/v1?x", "http://a:99999", "a:b"]
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(InvalidRequest, match=r"--address.*allowed"):
        base_url(address)


def test_addresses_are_urls_with_or_without_the_doors_path(tmp_path):
    assert base_url("a:1") == base_url("http://a:1/") == base_url("http://a:1/v1") == "http://a:1"
    assert base_url("a:1", tls=True) == base_url("https://a:1") == "https://a:1"
    with pytest.raises(InvalidRequest, match="--tls-ca"):
        HttpTransport("a:1", doors.Sampling(), {"tls_ca": str(tmp_path / "none.pem")})


async def test_the_model_is_the_one_that_the_door_lists(fake):
    door = HttpTransport(fake.address, doors.Sampling())
    try:
        assert await door.model_name() == "fake"
    finally:
        await door.close()
