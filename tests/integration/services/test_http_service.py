"""The official client of OpenAI's against the service as users start it, beside gRPC's."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from kvsluice.client import Client

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}
SEEDED: dict[str, Any] = {"temperature": 0.9, "seed": 7, "max_tokens": 12, "n": 3}
MESSAGES: list[Any] = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture
def grpc_client(service):
    with Client(service.address, timeout_s=120.0) as client:
        yield client


@pytest.fixture
def client(service):
    with openai.OpenAI(base_url=service.http_url, api_key="none", max_retries=0, timeout=120.0) as client:
        yield client


def test_both_doors_give_the_same_tokens(client, grpc_client):
    model = grpc_client.model_info().model
    for sampling in (GREEDY, SEEDED):
        wanted = grpc_client.generate(MESSAGES, recipe="exact", logprobs=2, **sampling)
        for name, extra in ((model, {"recipe": "exact"}), (f"{model}:exact", {})):
            told = client.chat.completions.create(
                model=name, messages=MESSAGES, logprobs=True, top_logprobs=2, extra_body=extra, **sampling
            )
            assert [choice.message.content for choice in told.choices] == [choice.text for choice in wanted.choices]
            assert told.usage.prompt_tokens == wanted.usage.prompt_tokens
            for choice, other in zip(told.choices, wanted.choices, strict=True):
                ours = [
                    (t.token, t.logprob, [(o.token, o.logprob) for o in t.top_logprobs])
                    for t in choice.logprobs.content
                ]
                assert ours == [(t.token, t.logprob, [(o.token, o.logprob) for o in t.top]) for t in other.logprobs]
                assert choice.finish_reason == other.finish_reason


def test_streams_are_the_whole_answer_in_pieces(client, grpc_client):
    model = grpc_client.model_info().model
    whole: Any = client.completions.create(model=model, prompt="def fibonacci(n):", logprobs=1, **GREEDY)
    texts, tokens, usage = [], [], None
    options = {"include_usage": True}
    stream: Any = client.completions.create(
        model=model, prompt="def fibonacci(n):", logprobs=1, stream=True, stream_options=options, **GREEDY
    )
    for chunk in stream:
        for choice in chunk.choices:
            texts.append(choice.text)
            tokens += choice.logprobs.tokens
            assert choice.logprobs.text_offset[0] == sum(map(len, tokens[: -len(choice.logprobs.tokens)]))
        usage = chunk.usage
    assert len(texts) > 1
    assert ("".join(texts), tokens) == (whole.choices[0].text, whole.choices[0].logprobs.tokens)
    assert usage == whole.usage


def test_stop_strings_and_limits(client, grpc_client):
    model = grpc_client.model_info().model
    whole: Any = client.completions.create(model=model, prompt="1, 2, 3, 4,", stop=["8"], temperature=0, max_tokens=40)
    assert whole.choices[0].text == " 5, 6, 7, "
    assert whole.choices[0].finish_reason == "stop"
    assert client.completions.create(model=model, prompt="1, 2, 3, 4,").usage.completion_tokens == 16
    with pytest.raises(openai.BadRequestError, match="max_tokens") as caught:
        client.completions.create(model=model, prompt="a", max_tokens=10**6)
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError, match="tools: is not supported"):
        client.chat.completions.create(model=model, messages=MESSAGES, tools=[{"type": "function"}])  # type: ignore[list-item]
    with pytest.raises(openai.NotFoundError, match="allowed"):
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)


def test_who_goes_away_leaves_nothing_running(service, client, grpc_client):
    model = grpc_client.model_info().model
    stream = client.completions.create(
        model=model, prompt="Once", max_tokens=4000, stream=True, extra_headers={"x-request-id": "left"},
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    next(iter(stream))
    stream.close()
    for _ in range(10_000):  # until the gateway has noticed; the id can be used again then
        try:
            client.completions.create(model=model, prompt="a", max_tokens=1, extra_headers={"x-request-id": "left"})
            break
        except openai.ConflictError:
            pass
    figures = httpx.get(service.http_url.replace("/v1", "/metrics")).text
    assert f'kvsluice_num_requests_running{{model_name="{model}"}} 0.0' in figures
