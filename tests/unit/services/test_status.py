"""Errors on their way through gRPC, and the client's requests."""

from __future__ import annotations

import grpc
import pytest

from kvsluice import errors
from kvsluice.errors import InvalidRequest, KvsluiceError
from kvsluice.protos import generation_pb2 as pb
from kvsluice.services.api import build_request
from kvsluice.services.status import (
    ERROR_METADATA_KEY,
    ERROR_TYPES,
    build_error,
    error_from_rpc,
    error_info,
    status_code,
)


class Failed(grpc.RpcError):
    def __init__(self, code, details="", trailers=()):
        self._parts = code, details, trailers

    def code(self):
        return self._parts[0]

    def details(self):
        return self._parts[1]

    def trailing_metadata(self):
        return self._parts[2]


def example(cls: type[KvsluiceError]) -> KvsluiceError:
    if issubclass(cls, InvalidRequest):
        return cls("a.b", "is bad", "good ones")
    return cls("what happened")


@pytest.mark.parametrize("cls", ERROR_TYPES.values(), ids=ERROR_TYPES)
def test_every_error_survives_the_wire(cls):
    error = example(cls)
    info = error_info(error, "r1")
    assert (info.request_id, info.retryable) == ("r1", cls.retryable)
    trailers = ((ERROR_METADATA_KEY, info.SerializeToString()),)
    again = error_from_rpc(Failed(status_code(error), error.message, trailers))
    assert type(again) is cls
    assert again.message == error.message
    if isinstance(error, InvalidRequest):
        assert (again.field, again.problem, again.allowed) == ("a.b", "is bad", "good ones")


def test_the_tree_is_whole():
    named = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert named == set(ERROR_TYPES)


@pytest.mark.parametrize(
    ("code", "details", "cls"),
    [
        ("UNAVAILABLE", "connection refused", errors.WorkerLost),
        ("DEADLINE_EXCEEDED", "", errors.DeadlineExceeded),
        ("CANCELLED", "", errors.RequestCancelled),
        ("RESOURCE_EXHAUSTED", "SERVER: Received message larger than max (9 vs. 4)", InvalidRequest),
        ("RESOURCE_EXHAUSTED", "", errors.Overloaded),
        ("UNKNOWN", "/secret", errors.InternalError),
        ("INTERNAL", "Received RST_STREAM with error code 2", errors.WorkerLost),
    ],
)
def test_failures_that_grpc_reports_itself_are_typed(code, details, cls):
    error = error_from_rpc(Failed(getattr(grpc.StatusCode, code), details))
    assert type(error) is cls
    assert "secret" not in error.message


@pytest.mark.parametrize(
    ("details", "said"),
    [
        ("failed to connect to all addresses; last error: …", 'cannot reach h:1; is "kvsluice serve" running?'),
        ("errors resolving h:1: [address lookup failed]", 'cannot reach h:1; is "kvsluice serve" running?'),
        ("Socket closed", "the connection to h:1 was lost"),
    ],
)
def test_a_client_is_told_whom_it_cannot_reach(details, said):
    assert error_from_rpc(Failed(grpc.StatusCode.UNAVAILABLE, details), "h:1").message == said


def test_a_message_that_is_too_large_names_the_limit_and_its_flag():
    details = "SERVER: Received message larger than max (20971530 vs. 16777216)"
    error = error_from_rpc(Failed(grpc.StatusCode.RESOURCE_EXHAUSTED, details))
    assert "20971530 bytes" in error.message
    assert "16777216" in error.allowed
    assert "--max-message-bytes" in error.allowed


def test_an_error_of_a_newer_version_is_internal():
    assert type(build_error("QuantumFault", "x")) is errors.InternalError


def test_requests_are_built_from_prompts_of_each_kind():
    assert build_request("hi", {}).prompt == "hi"
    assert list(build_request([1, 2], {}).token_ids.ids) == [1, 2]
    assert build_request([], {}).WhichOneof("input") == "token_ids"
    chat = build_request([{"role": "user", "content": "hi"}], {})
    assert chat.chat.messages[0].content == "hi"
    assert build_request("hi", {}).request_id != build_request("hi", {}).request_id


def test_options_land_in_their_fields():
    request = build_request(
        "hi",
        {
            "n": 2,
            "stop": "x",
            "logit_bias": {5: 1.5},
            "recipe": "fast",
            "slots": {"a": 1},
            "timeout_s": 3,
            "logprobs": 0,
        },
    )
    assert (request.sampling.n, list(request.sampling.stop), dict(request.sampling.logit_bias)) == (2, ["x"], {5: 1.5})
    assert request.recipe == pb.RecipeChoice(name="fast", slots_json='{"a": 1}')
    assert request.sampling.HasField("logprobs")
    assert not request.sampling.HasField("temperature")


@pytest.mark.parametrize("prompt", [b"abc", bytearray(b"a"), iter([65]), None, 5, {65}, [True], [65, "x"], "\ud800"])
def test_a_prompt_of_no_kind_is_refused(prompt):
    with pytest.raises(InvalidRequest) as caught:
        build_request(prompt, {})
    assert caught.value.field == "prompt"


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        *[("stop", value, "sampling.stop") for value in (None, 5, [1], b"x", "\ud800", ["a", "\ud800"])],
        *[("request_id", value, "request_id") for value in (5, None, "\ud800")],
        *[("timeout_s", value, "timeout_s") for value in ("x", float("nan"), float("inf"), 1e308, 10**400, True)],
        ("model", 5, "model"),
        ("recipe", None, "recipe.name"),
        *[("slots", value, "recipe.slots") for value in ({1, 2}, {"a": float("nan")})],
        ("max_tokens", None, "sampling.max_tokens"),
    ],
)
def test_an_option_that_does_not_fit_is_refused_by_its_own_name(name, value, field):
    with pytest.raises(InvalidRequest) as caught:
        build_request("abc", {name: value})
    assert caught.value.field == field


def test_what_an_error_is_called_on_the_far_side_is_a_class_of_the_tree():
    class Inner(errors.StoreUnavailable):
        """One that a single part of the system knows."""

    name = Inner("gone").type_name
    assert name == "StoreUnavailable"
    assert isinstance(build_error(name, "gone"), errors.StoreUnavailable)
    assert {cls("x").type_name for cls in (errors.WorkerLost, errors.Fenced)} == {"WorkerLost", "Fenced"}


def test_an_overload_says_when_to_try_again():
    error = errors.Overloaded("full", 2.5)
    trailers = [(ERROR_METADATA_KEY, error_info(error, "r").SerializeToString())]
    again = error_from_rpc(Failed(status_code(error), error.message, trailers))
    assert isinstance(again, errors.Overloaded)
    assert (again.message, again.retry_after_s) == ("full", 2.5)
