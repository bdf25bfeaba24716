"""What bodies of OpenAI's API become: messages of the internal API, or refusals by the names that clients know."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsluice.errors import InvalidRequest, KvsluiceError, Overloaded, UnknownModel, WorkerLost
from kvsluice.protos import generation_pb2 as pb
from kvsluice.services.gateway.http.errors import failure
from kvsluice.services.gateway.http.schemas import ChatBody, CompletionBody, parse_body
from kvsluice.services.gateway.http.shapes import ChunkShape, completion_logprobs
from kvsluice.services.gateway.http.translate import Ask, chat, completion, renamed, split_model

USER = {"role": "user", "content": "hi"}


def asked(body: dict[str, Any], served: str = "m") -> Ask:
    """A chat where there are messages, else a completion."""
    raw = json.dumps({"model": "m"} | body).encode()
    try:
        if "messages" in body:
            return chat(parse_body(ChatBody, raw), served, "id")
        return completion(parse_body(CompletionBody, raw), served, "id")
    except InvalidRequest as exc:
        raise renamed(exc, {}) from exc


def request_of(body: dict[str, Any]) -> pb.GenerateRequest:
    (request,) = asked(body).requests
    return request


@pytest.mark.parametrize(
    ("body", "field", "value"),
    [
        ({"prompt": "hi"}, "prompt", "hi"),
        ({"prompt": "hi"}, "sampling.max_tokens", 16),
        ({"prompt": "hi", "max_tokens": 3}, "sampling.max_tokens", 3),
        ({"prompt": [1, 2]}, "token_ids.ids", [1, 2]),
        ({"prompt": ["hi"]}, "prompt", "hi"),
        ({"prompt": [[1, 2]]}, "token_ids.ids", [1, 2]),
        ({"prompt": "hi", "logprobs": 0}, "sampling.logprobs", 0),
        ({"prompt": "hi", "temperature": 1, "top_p": 0.5}, "sampling.temperature", 1.0),
        ({"prompt": "hi", "stop": "a"}, "sampling.stop", ["a"]),
        ({"prompt": "hi", "stop": ["a", "b"]}, "sampling.stop", ["a", "b"]),
        ({"prompt": "hi", "logit_bias": {"7": -100}}, "sampling.logit_bias", {7: -100.0}),
        ({"prompt": "hi", "seed": 5, "n": 2, "top_k": 4}, "sampling.seed", 5),
        ({"prompt": "hi", "model": "m:fast"}, "recipe.name", "fast"),
        ({"prompt": "hi", "model": "m:fast"}, "model", "m"),
        ({"prompt": "hi", "model": "m:fast", "recipe": "fast"}, "recipe.name", "fast"),
        (
            {"prompt": "hi", "slots": {"sharing": {"kind": "none"}}},
            "recipe.slots_json",
            '{"sharing": {"kind": "none"}}',
        ),
        ({"prompt": "hi", "session_id": "s", "session_turn": 2}, "session_turn", 2),
        ({"prompt": "hi", "durability": "tokens"}, "durability", "tokens"),
        ({"prompt": "hi", "user": "u", "metadata": {"a": "b"}, "suffix": None, "best_of": 1}, "prompt", "hi"),
        ({"messages": [USER], "max_completion_tokens": 3}, "sampling.max_tokens", 3),
        ({"messages": [USER], "max_tokens": 3}, "sampling.max_tokens", 3),
        ({"messages": [USER], "max_tokens": 3, "max_completion_tokens": 3}, "sampling.max_tokens", 3),
        ({"messages": [USER], "logprobs": True}, "sampling.logprobs", 0),
        ({"messages": [USER], "logprobs": True, "top_logprobs": 5}, "sampling.logprobs", 5),
        ({"messages": [USER], "tools": [], "tool_choice": "none", "response_format": {"type": "text"}}, "model", "m"),
    ],
)
def test_a_field_becomes_what_the_validator_knows(body, field, value):
    found: Any = request_of(body)
    for name in field.split("."):
        found = getattr(found, name)
    assert (dict(found) if isinstance(value, dict) else list(found) if isinstance(value, list) else found) == value


def test_a_chat_without_limits_leaves_them_to_the_server():
    request = request_of({"messages": [USER], "logprobs": False})
    assert not request.sampling.HasField("max_tokens")
    assert not request.sampling.HasField("logprobs")


def test_parts_of_text_are_one_text_and_developers_are_the_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    said_before = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "annotations": []}
    messages = [{"role": "developer", "content": parts}, said_before]
    request = request_of({"messages": messages})
    assert [(m.role, m.content) for m in request.chat.messages] == [("system", "ab"), ("assistant", "x")]


def test_several_prompts_are_several_requests_of_one_answer():
    ask = asked({"prompt": ["a", "b"], "n": 2, "stream": True, "stream_options": {"include_usage": True}})
    assert [request.request_id for request in ask.requests] == ["id-0", "id-1"]
    assert (ask.id, ask.num_choices, ask.stream, ask.include_usage) == ("cmpl-id", 2, True, True)
    shape = ChunkShape(ask, lambda token: b"", None)
    chunk = shape.chunk(1, pb.Chunk(index=1, text="x"), "")
    assert chunk is not None
    assert json.loads(chunk)["choices"][0]["index"] == 3


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, None),  # the validator's to say
        ({"prompt": []}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"prompt": ["a", "b"], "session_id": "s"}, "prompt"),
        ({"prompt": [2**70]}, "prompt"),
        ({"prompt": "a", "model": 5}, "model"),
        ({"prompt": "a", "n": "2"}, "n"),
        ({"prompt": "a", "n": True}, "n"),
        ({"prompt": "a", "n": 2**70}, "n"),
        ({"prompt": "a", "stop": 5}, "stop"),
        ({"prompt": "a", "stop": [5]}, "stop"),
        ({"prompt": "a", "logit_bias": {"a": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {str(2**70): 1}}, "logit_bias"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature"),
        ({"prompt": "a", "temperature": float("inf")}, "temperature"),
        ({"prompt": "a", "slots": {"a": float("nan")}}, "slots"),
        ({"prompt": "a", "stop_token_ids": [2**70]}, "stop_token_ids"),
        ({"prompt": "a", "timeout_s": 0}, "timeout_s"),
        ({"prompt": "a", "timeout_s": 1e9}, "timeout_s"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"prompt": "a", "model": "m:fast", "recipe": "exact"}, "recipe"),
        ({"prompt": "a", "temprature": 1}, "temprature"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [USER | {"tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [USER], "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"messages": [USER], "top_logprobs": 2}, "top_logprobs"),
        ({"messages": [USER], "logprobs": 1}, "logprobs"),
        ({"messages": [USER], "tools": [{"type": "function"}]}, "tools"),
        ({"messages": [USER], "tool_choice": "required"}, "tool_choice"),
        ({"messages": [USER], "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [USER], "audio": {}}, "audio"),
        ({"messages": [USER], "modalities": ["text", "audio"]}, "modalities"),
        ({"messages": [USER], "store": True}, "store"),
        ({"messages": [USER], "store": 0}, "store"),
        ({"messages": [USER], "prompt": "a"}, "prompt"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(body, param):
    if param is None:
        assert request_of(body).WhichOneof("input") == "prompt"
        return
    with pytest.raises(InvalidRequest) as caught:
        asked(body)
    assert caught.value.field == param
    assert caught.value.allowed


@pytest.mark.parametrize(
    "raw",
    [b"", b"nul", b"5", b"[]", b'{"model": "\xff"}', b'{"model": "\\ud800"}', b"[" * 99_999, b'{"a":' * 99_999],
)  # fmt: skip
def test_what_is_no_json_object_is_told_so(raw):
    with pytest.raises(InvalidRequest, match="body"):
        parse_body(ChatBody, raw)


def test_a_refusal_repeats_nothing_that_a_body_holds():
    for body in ({"model": ["canary"]}, {"model": "m", "n": "canary"}, {"model": "m", "messages": ["canary"]}):
        with pytest.raises(InvalidRequest) as caught:
            parse_body(ChatBody, json.dumps(body).encode())
        assert "canary" not in caught.value.message


TEXT = st.text('a\0\n"é😀', max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
FIELDS = sorted({*CompletionBody.model_fields, *ChatBody.model_fields, *ChatBody.NEUTRAL, "suffix", "other"})


@given(
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), st.sampled_from([{"prompt": "a"}, {"messages": [USER]}])
)
def test_any_body_is_a_request_or_a_refusal(fields, base):
    try:
        ask = asked(base | fields)
    except InvalidRequest as exc:
        assert exc.field
    else:
        assert all(request.ByteSize() for request in ask.requests)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_body_or_a_refusal(raw):
    for kind in (CompletionBody, ChatBody):
        try:
            parse_body(kind, raw)
        except InvalidRequest as exc:
            assert exc.field


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("m", ("m", "")),
        ("m:fast", ("m", "fast")),
        ("m:", ("m", "")),
        ("n:fast", ("n:fast", "")),
        ("mm:fast", ("mm:fast", "")),
        ("", ("", "")),
    ],
)
def test_a_recipe_is_named_behind_the_model(model, parts):
    assert split_model(model, "m") == parts
    assert split_model("a:b:fast", "a:b") == ("a:b", "fast")
    assert split_model("a:b", "a:b") == ("a:b", "")


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ("sampling.top_p", "top_p"),
        ("chat.messages[3].role", "messages[3].role"),
        ("chat", "messages"),
        ("token_ids", "prompt"),
        ("recipe", "recipe"),
        ("recipe.name", "recipe"),
        ("recipe.slots_json", "slots"),
        ("recipe.slots", "slots"),
        ("recipe.key_codec.rank", "slots.key_codec.rank"),
        ("session_id", "session_id"),
        ("sampling.logprobs", "top_logprobs"),
        ("sampling.max_tokens", "max_completion_tokens"),
    ],
)
def test_errors_name_fields_as_clients_know_them(inner, outer):
    ask = asked({"messages": [USER], "max_completion_tokens": 5})
    error = ask.renamed(InvalidRequest(inner, "is wrong", "right"))
    assert (error.field, error.message) == (outer, f"{outer}: is wrong; allowed: right")


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "param"),
    [
        (InvalidRequest("n", "got 0", "1"), 400, "invalid_request_error", "invalid_value", "n"),
        (UnknownModel("model: x"), 404, "invalid_request_error", "model_not_found", "model"),
        (WorkerLost("gone"), 503, "server_error", "service_unavailable", None),
        (KvsluiceError("odd"), 500, "server_error", "kvsluice_error", None),
        (RuntimeError("canary"), 500, "server_error", "internal_error", None),
    ],
)
def test_errors_look_as_openais(error, status, kind, code, param):
    told = failure(error)
    assert told.status == status
    assert "canary" not in told.body["error"].pop("message")
    assert told.body == {"error": {"type": kind, "param": param, "code": code}}


def test_overload_says_when_to_come_back():
    told = failure(Overloaded("full", retry_after_s=2.3))
    assert told.status == 429
    assert told.headers == {"x-should-retry": "true", "retry-after": "3", "retry-after-ms": "2300"}


def test_offsets_of_a_streams_tokens_go_on_where_the_last_chunk_ended():
    ask = asked({"prompt": "a", "logprobs": 1, "stream": True})
    shape = ChunkShape(ask, lambda token: b"", None)
    tokens = [pb.TokenLogprobs(token_id=i, token=text, logprob=float("-inf")) for i, text in enumerate(["ab", "", "c"])]
    chunks = [shape.chunk(0, pb.Chunk(logprobs=tokens), "") for _ in range(2)]
    told = [json.loads(chunk or "")["choices"][0]["logprobs"] for chunk in chunks]
    assert [one["text_offset"] for one in told] == [[0, 2, 2], [3, 5, 5]]
    assert told[0]["token_logprobs"] == [-9999.0] * 3
    assert completion_logprobs(tokens, 0) == told[0]
