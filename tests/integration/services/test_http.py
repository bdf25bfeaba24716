"""The OpenAI API over scripted workers: what a client is told, and when."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from kvsluice.kvstore.memory import MemoryStore

HELLO = {"model": "chars", "prompt": "abc", "max_tokens": 100}
CHAT = {"model": "chars", "messages": [{"role": "user", "content": "abc"}]}

SAMPLING = {
    "max_tokens": [0, -1, 512, 2**62, 2**70],
    "temperature": [-0.1, 2.1, math.nan, math.inf, 1e-300],
    "top_p": [0.0, 1.01, math.nan],
    "top_k": [-1, 257],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0.0, 11.0],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, math.inf],
    "seed": [-1, 2**63],
    "min_tokens": [-1, 512],
    "logprobs": [-1, 21],
    "n": [0, 129, 2**62],
    "stop": ["", ["x"] * 17, ["\0"]],
    "stop_token_ids": [[256], [-1]],
    "logit_bias": [{"300": 1}, {"1": 101}],
    "prompt": ["", [], [256], [-1], "x" * 512, "a\0b"],
    "recipe": ["kivi9000"],
    "slots": [{"colour": {"kind": "red"}}],
    "session_id": ["s"],
    "session_turn": [1],
    "durability": ["tokens", "always"],
}


def connect(fleet) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://{fleet.gateway.http_address}", timeout=20.0)


@pytest.fixture
async def http(fleet) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(fleet) as client:
        yield client


@pytest.fixture
async def client(fleet) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"http://{fleet.gateway.http_address}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=20.0) as client:
        yield client


async def test_every_bad_value_is_refused_by_its_name_before_any_compute(fleet, http):
    wrong = {}
    for name, values in SAMPLING.items():
        for value in values:
            raw = json.dumps(HELLO | {name: value}).encode()  # NaN and Infinity as they stand
            reply = await http.post("/v1/completions", content=raw)
            error = reply.json().get("error", {})
            if reply.status_code != 400 or not str(error.get("param")).startswith(name):
                wrong[name, str(value)[:20]] = (reply.status_code, error)
    # what a session needs is named first
    assert {key: error["param"] for key, (_, error) in wrong.items()} == {}
    assert fleet.script.opens == []
    assert (await http.post("/v1/completions", json=HELLO)).json()["choices"][0]["text"] == "Hello, worl"


async def test_both_endpoints_answer_whole_and_streamed(client):
    chat: Any = client.chat.completions
    whole = await chat.create(**CHAT, n=2, logprobs=True, top_logprobs=1, seed=3)
    assert [choice.message.content for choice in whole.choices] == ["Hello, worl"] * 2
    assert whole.choices[1].logprobs.content[0].bytes == [ord("H")]
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (9, 24)
    assert whole.usage.prompt_tokens_details.cached_tokens == 0
    assert whole.model_extra["kvsluice"][0]["recipe"]["effective"] == "exact"

    texts, last = {0: "", 1: ""}, None
    async for chunk in await chat.create(**CHAT, n=2, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            assert (choice.delta.role == "assistant") == (texts[choice.index] == "")
            texts[choice.index] += choice.delta.content
        last = chunk
    assert texts == {0: "Hello, worl", 1: "Hello, worl"}
    assert (last.choices, last.usage.total_tokens) == ([], 33)

    completions: Any = client.completions
    whole = await completions.create(**HELLO | {"prompt": ["abc", "de"]}, echo=True, logprobs=None)
    assert [(c.index, c.text) for c in whole.choices] == [(0, "abcHello, worl"), (1, "deHello, worl")]
    assert whole.usage.prompt_tokens == 5
    streamed = [c async for c in await completions.create(**HELLO | {"prompt": [65, 66]}, echo=True, stream=True)]
    assert "".join(chunk.choices[0].text for chunk in streamed) == "ABHello, worl"
    assert streamed[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in streamed)
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        (c.usage.prompt_tokens, c.usage.completion_tokens)
        async for c in await completions.create(**HELLO, stream=True, stream_options=options)
    ]
    assert counts == sorted(counts)
    assert {prompt for prompt, _ in counts} == {3}
    assert counts[0][1] < counts[-1][1] == 12


async def test_models_sessions_and_figures(fleet, client, http):
    await client.completions.create(**HELLO)  # type: ignore[call-overload]
    names = [model.id async for model in client.models.list()]
    assert names[0] == "chars"
    assert "chars:fast" in names
    assert (await client.models.retrieve("chars:fast")).id == "chars:fast"
    for name in ("chars:none", "gpt-5"):
        with pytest.raises(openai.NotFoundError, match="allowed: chars"):
            await client.models.retrieve(name)
        with pytest.raises(openai.APIStatusError):
            await client.completions.create(model=name, prompt="abc")
    figures = await http.get("/metrics")
    assert figures.headers["content-type"].startswith("text/plain")
    assert 'kvsluice_request_success_total{finished_reason="stop",model_name="chars"} 1.0' in figures.text
    sessions = await http.get("/v1/sessions")  # there is no store
    assert (sessions.status_code, sessions.json()["error"]["code"]) == (503, "store_unavailable")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v2", 404, "unknown_url"),
        ("GET", "/docs", 404, "unknown_url"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("POST", "/v1/completions", 400, "invalid_value"),
    ],
)
async def test_errors_outside_a_request_look_alike(http, method, path, status, code):
    reply = await http.request(method, path, content=b"{")
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)


async def test_an_error_in_the_middle_of_a_stream_ends_it(fleet, client):
    fleet.script.gate = asyncio.Event().wait
    stream = await client.completions.create(**HELLO, stream=True, extra_headers={"x-request-id": "broken"})
    with pytest.raises(openai.APIError, match="the request was cancelled"):
        async for _ in stream:  # the first token is prefill's
            assert fleet.gateway.intake.cancel("broken")
    assert fleet.gateway.num_requests == 0


async def test_an_error_before_the_first_token_has_its_own_status(fleet, client):
    fleet.script.prefill = lambda request: asyncio.Event().wait()
    with pytest.raises(openai.APIStatusError) as caught:
        await client.completions.create(**HELLO, stream=True, extra_body={"timeout_s": 0.2})
    assert caught.value.status_code == 504
    assert caught.value.code == "deadline_exceeded"


async def test_who_goes_away_is_cancelled_wherever_the_request_is(make_fleet, until):
    fleet = await make_fleet(max_num_seqs=1)
    block = asyncio.Event()

    async def post(body: dict[str, Any]) -> None:
        async with connect(fleet) as http:
            await http.post("/v1/completions", json=HELLO | body)

    async def leave(task: asyncio.Task[None]) -> None:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    fleet.script.prefill = lambda request: block.wait()
    for body in ({}, {"stream": True}):
        fleet.script.prefills.clear()
        prefilling = asyncio.create_task(post(body))
        await until(lambda: fleet.script.prefills)
        queued = asyncio.create_task(post(body))
        await until(lambda: fleet.gateway.intake.admission.num_waiting == 1)
        await leave(queued)
        await until(lambda: fleet.gateway.num_requests == 1)
        await leave(prefilling)
        await until(lambda: fleet.gateway.num_requests == 0)
    reached = asyncio.Event()

    async def gate() -> None:
        reached.set()
        await block.wait()

    fleet.script.prefill, fleet.script.gate = None, gate
    fleet.script.cancels.clear()
    decoding = asyncio.create_task(post({"stream": True}))
    await reached.wait()
    await leave(decoding)
    await until(lambda: fleet.script.cancels and fleet.gateway.num_requests == 0)


async def test_overload_is_told_at_once_with_when_to_come_back(make_fleet, until):
    fleet = await make_fleet(max_num_seqs=1, max_queue=0)
    block = asyncio.Event()
    fleet.script.prefill = lambda request: block.wait()
    async with connect(fleet) as http:
        running = asyncio.create_task(http.post("/v1/completions", json=HELLO))
        await until(lambda: fleet.script.prefills)
        refused = await http.post("/v1/chat/completions", json=CHAT | {"stream": True})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(refused.headers["retry-after"]) >= 1
        block.set()
        assert (await running).status_code == 200


async def test_while_the_service_drains_it_is_alive_and_not_ready(fleet, http, until):
    block = asyncio.Event()
    fleet.script.gate = block.wait
    async with http.stream("POST", "/v1/completions", json=HELLO | {"stream": True}) as running:
        lines = running.aiter_lines()
        assert "H" in await anext(lines)
        draining = asyncio.create_task(fleet.gateway.drain(20))
        await until(lambda: fleet.gateway.intake.draining)
        assert (await http.get("/ready")).status_code == 503
        assert (await http.get("/health")).status_code == 200
        refused = await http.post("/v1/completions", json=HELLO)
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "server_error")
        block.set()
        assert [line async for line in lines][-2] == "data: [DONE]"
    assert await draining


async def test_several_prompts_fail_together_and_leave_nothing_behind(make_fleet, until):
    fleet = await make_fleet(max_num_seqs=1, max_queue=1)
    fleet.script.prefill = lambda request: asyncio.Event().wait()
    async with connect(fleet) as http:
        refused = await http.post("/v1/completions", json=HELLO | {"prompt": ["a", "b", "c"]})
    assert refused.status_code == 429
    assert fleet.gateway.num_requests == 0


async def test_an_unexpected_error_is_closed(fleet, http, caplog, monkeypatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("canary")

    monkeypatch.setattr(fleet.gateway.intake, "admission", None)
    monkeypatch.setattr(fleet.gateway.intake.tokenizer, "encode", broken)
    reply = await http.post("/v1/completions", json=HELLO | {"stream": True})
    assert (reply.status_code, reply.json()["error"]["message"]) == (500, "internal error")
    assert "AttributeError at" in caplog.text
    monkeypatch.setattr(fleet.gateway.intake, "list_sessions", broken)
    reply = await http.get("/v1/sessions")
    assert (reply.status_code, reply.json()["error"]["message"]) == (500, "internal error")
    assert "RuntimeError at" in caplog.text
    assert "canary" not in caplog.text


async def test_a_conversation_goes_on_is_listed_and_deleted(make_real_fleet):
    fleet = await make_real_fleet(store=MemoryStore(1 << 30), http=True, http_port=0)
    first, second = [(37 * i) % 250 + 3 for i in range(90)], [7, 8, 9]
    more = {"model": "tiny", "max_tokens": 8, "ignore_eos": True, "temperature": 0, "session_id": "tea"}
    async with connect(fleet) as http:
        turns = []
        for turn, prompt in enumerate((first, second), 1):
            reply = (await http.post("/v1/completions", json=more | {"prompt": prompt, "session_turn": turn})).json()
            turns.append((reply["choices"][0]["text"], reply["usage"], reply["kvsluice"][0]["session"]["turn"]))
        wrong = await http.post("/v1/completions", json=more | {"prompt": second, "session_turn": 2})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (409, "session_mismatch")
        (listed,) = (await http.get("/v1/sessions")).json()["data"]
        assert (listed["id"], listed["turns"], listed["tokens"]) == ("tea", 2, 90 + 8 + 3 + 8)
        assert (await http.delete("/v1/sessions/tea")).json() == {
            "id": "tea", "object": "session.deleted", "deleted": True
        }  # fmt: skip
        assert (await http.delete("/v1/sessions/tea")).status_code == 404
        assert (await http.get("/v1/sessions")).json()["data"] == []
    options = {"max_tokens": 8, "ignore_eos": True, "temperature": 0.0, "session_id": "other"}
    wanted = [await fleet.client.generate(prompt, **options) for prompt in (first, second)]
    assert [(text, turn) for text, _, turn in turns] == [(done.text, done.session.turn) for done in wanted]
    assert turns[1][1]["prompt_tokens_details"]["cached_tokens"] == wanted[1].usage.cached_tokens > 0
