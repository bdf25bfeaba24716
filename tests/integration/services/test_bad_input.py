"""Bad requests over the wire: each a typed error that names field and allowed values, before any compute."""

from __future__ import annotations

import math

import grpc
import pytest

from kvsluice.errors import InvalidRecipe, InvalidRequest, UnknownModel
from kvsluice.protos import generation_pb2 as pb
from kvsluice.protos import generation_pb2_grpc

HUGE = 2**62

SAMPLING = {
    "max_tokens": [0, -1, 512, HUGE],
    "temperature": [-0.1, 2.1, math.nan, math.inf, -math.inf, 1e-300],
    "top_p": [0.0, -0.5, 1.01, math.nan, math.inf],
    "top_k": [-1, 257, HUGE],
    "min_p": [-0.1, 1.1, math.nan],
    "repetition_penalty": [0.0, -1.0, 11.0, math.nan, math.inf],
    "presence_penalty": [-2.1, 2.1, math.nan],
    "frequency_penalty": [-2.1, 2.1, math.inf],
    "seed": [-1, -HUGE],
    "min_tokens": [-1, 512, HUGE],
    "logprobs": [-1, 21, HUGE],
    "n": [0, -1, 129, HUGE],
}


def with_sampling(name: str, value: float) -> pb.GenerateRequest:
    request = pb.GenerateRequest(prompt="abc")
    setattr(request.sampling, name, value)
    return request


def chat(*messages: tuple[str, str]) -> pb.GenerateRequest:
    request = pb.GenerateRequest()
    request.chat.SetInParent()
    for role, content in messages:
        request.chat.messages.add(role=role, content=content)
    return request


def ids(*values: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=values))


def biased(bias: dict[int, float]) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="abc", sampling=pb.SamplingParams(logit_bias=bias))


def stopped(*stops: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="abc", sampling=pb.SamplingParams(stop=stops))


def recipe(name: str = "", slots_json: str = "") -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="abc", recipe=pb.RecipeChoice(name=name, slots_json=slots_json))


CASES = {
    "no prompt": (pb.GenerateRequest(), "prompt"),
    "empty prompt": (pb.GenerateRequest(prompt=""), "prompt"),
    "NUL in the prompt": (pb.GenerateRequest(prompt="a\0b"), "prompt"),
    "over-long prompt": (pb.GenerateRequest(prompt="x" * 512), "prompt"),
    "prompt far over": (pb.GenerateRequest(prompt="x" * 70_000), "prompt"),
    "prompt and answer": (
        pb.GenerateRequest(prompt="x" * 500, sampling=pb.SamplingParams(max_tokens=13)),
        "sampling.max_tokens",
    ),
    "no ids": (ids(), "token_ids"),
    "negative id": (ids(5, -1), "token_ids"),
    "id past the vocabulary": (ids(5, 256), "token_ids"),
    "huge id": (ids(2**63 - 1), "token_ids"),
    "too many ids": (ids(*[5] * 512), "token_ids"),
    "no messages": (chat(), "chat"),
    "bad role": (chat(("tool", "x")), "chat.messages[0].role"),
    "empty message": (chat(("user", "x"), ("assistant", "")), "chat.messages[1].content"),
    "NUL in a message": (chat(("user", "\0")), "chat.messages[0].content"),
    "too many messages": (chat(*[("user", "x")] * 1025), "chat"),
    "long id": (pb.GenerateRequest(prompt="abc", request_id="x" * 129), "request_id"),
    "odd id": (pb.GenerateRequest(prompt="abc", request_id="a b\n"), "request_id"),
    "empty stop": (stopped(""), "sampling.stop"),
    "long stop": (stopped("x" * 257), "sampling.stop"),
    "many stops": (stopped(*"abcdefghijklmnopq"), "sampling.stop"),
    "stop id past the vocabulary": (
        pb.GenerateRequest(prompt="abc", sampling=pb.SamplingParams(stop_token_ids=[256])),
        "sampling.stop_token_ids",
    ),
    "many stop ids": (
        pb.GenerateRequest(prompt="abc", sampling=pb.SamplingParams(stop_token_ids=range(129))),
        "sampling.stop_token_ids",
    ),
    "bias on no id": (biased({300: 1.0}), "sampling.logit_bias"),
    "negative bias id": (biased({-1: 1.0}), "sampling.logit_bias"),
    "huge bias": (biased({1: 101.0}), "sampling.logit_bias"),
    "NaN bias": (biased({1: math.nan}), "sampling.logit_bias"),
    "min over max": (
        pb.GenerateRequest(prompt="abc", sampling=pb.SamplingParams(min_tokens=5, max_tokens=4)),
        "sampling.min_tokens",
    ),
    "unknown recipe": (recipe("kivi9000"), "recipe"),
    "long recipe name": (recipe("x" * 65), "recipe.name"),
    "slots that are not JSON": (recipe("exact", "{"), "recipe.slots"),
    "slots that are no object": (recipe("exact", "[1]"), "recipe.slots"),
    "deep slots": (recipe("exact", "[" * 5000), "recipe.slots"),
    "long slots": (recipe("exact", '{"a": "' + "x" * 20_000 + '"}'), "recipe.slots_json"),
    "unknown slot": (recipe("exact", '{"colour": {"kind": "red"}}'), "recipe"),
    "unknown filling": (recipe("exact", '{"key_codec": {"kind": "zip"}}'), "recipe.key_codec.kind"),
    "bad number in a slot": (recipe("exact", '{"value_codec": {"kind": "affine", "bits": 3}}'), "recipe"),
    "slots that contradict": (recipe("exact", '{"retrieval": {"kind": "chunks"}, "budget": {"kind": "uniform"}}'), ""),
    "layer the model has not": (
        recipe("exact", '{"propagation": {"kind": "tsp", "layer": 9, "rate": 0.5, "window": 8}}'),
        "recipe.propagation.layer",
    ),
    "rank past the model's": (
        recipe("exact", '{"key_codec": {"kind": "lowrank", "rank": 64}}'),
        "recipe.key_codec.rank",
    ),
    "tools": (pb.GenerateRequest(prompt="abc", tools="[]"), "tools"),
    "response_format": (pb.GenerateRequest(prompt="abc", response_format="json"), "response_format"),
    "prompt_logprobs": (pb.GenerateRequest(prompt="abc", prompt_logprobs=0), "prompt_logprobs"),
    "session_id": (pb.GenerateRequest(prompt="abc", session_id="s"), "session_id"),
} | {
    f"{name}={value:g}": (with_sampling(name, value), f"sampling.{name}")
    for name, values in SAMPLING.items()
    for value in values
}


async def refused(fleet, request) -> tuple[grpc.StatusCode, pb.ErrorInfo]:
    async with grpc.aio.insecure_channel(fleet.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generation_pb2_grpc.GenerationStub(channel).Generate(request, timeout=10).read()
    trailers = dict(caught.value.trailing_metadata())
    return caught.value.code(), pb.ErrorInfo.FromString(trailers["kvsluice-error-bin"])


async def test_the_table_names_every_numeric_field_of_sampling():
    numeric = {
        field.name
        for field in pb.SamplingParams.DESCRIPTOR.fields
        if not field.is_repeated and field.type != field.TYPE_BOOL
    }
    assert numeric == set(SAMPLING)


async def test_every_bad_request_is_refused_before_any_compute(fleet):
    wrong = {}
    for name, (request, field) in CASES.items():
        code, info = await refused(fleet, request)
        sound = code is grpc.StatusCode.INVALID_ARGUMENT and info.allowed and not info.retryable
        if not sound or not info.field.startswith(field) or info.type not in ("InvalidRequest", "InvalidRecipe"):
            wrong[name] = (code, info)
    assert wrong == {}
    assert fleet.script.opens == []
    assert fleet.script.prefills == []
    assert (await fleet.client.generate("abc")).text == "Hello, worl"


async def test_what_is_allowed_passes(fleet):
    edges = {
        "temperature": [0.0, -0.0, 2.0],
        "top_p": [1.0, 1e-9],
        "top_k": [0, 256],
        "seed": [0, 2**63 - 1],
        "logprobs": [0, 20],
        "max_tokens": [1, 509],
        "repetition_penalty": [10.0],
    }
    for name, values in edges.items():
        for value in values:
            await fleet.client.generate("abc", **{name: value})


async def test_a_wrong_model_is_not_found(fleet):
    with pytest.raises(UnknownModel, match="chars"):
        await fleet.client.generate("abc", model="gpt-5")
    assert (await fleet.client.generate("abc", model="chars")).text


async def test_an_unparsable_message_is_the_callers_fault(fleet):
    async with grpc.aio.insecure_channel(fleet.address) as channel:
        call = channel.unary_stream("/kvsluice.v1.Generation/Generate")
        for body in (b"\x1a\x03\xff\xfe\xfd", b"\xff\xff\xff", b"\x32\x7fxx"):  # invalid UTF-8, junk, cut off
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(body).read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (await fleet.client.generate("abc")).text


async def test_an_oversized_message_is_refused_and_the_server_lives(make_fleet):
    fleet = await make_fleet(max_message_bytes=65536)
    with pytest.raises(InvalidRequest, match="message"):
        await fleet.client.generate("x" * 70_000)
    async with grpc.aio.insecure_channel(fleet.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            call = generation_pb2_grpc.GenerationStub(channel).Generate(pb.GenerateRequest(prompt="x" * 70_000))
            await call.read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await fleet.client.generate("abc")).text


async def test_bad_input_needs_no_worker(fleet):
    await fleet.client.generate("abc")
    await fleet.kill_worker("prefill-0")
    await fleet.kill_worker("decode-0")
    with pytest.raises(InvalidRequest, match="top_p"):
        await fleet.client.generate("abc", top_p=3.0)
    with pytest.raises(InvalidRecipe):
        await fleet.client.generate("abc", recipe="nope")


async def test_the_client_refuses_what_does_not_fit_a_field(fleet):
    for options in ({"seed": 2**64}, {"top_k": 1.5}, {"colour": 1}, {"logit_bias": {"a": 1}}):
        with pytest.raises(InvalidRequest):
            await fleet.client.generate("abc", **options)
    with pytest.raises(InvalidRequest):
        await fleet.client.generate([{"role": "user"}])
