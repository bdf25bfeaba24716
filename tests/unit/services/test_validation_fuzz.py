"""Whatever a message holds, it is a checked request, or an error of the caller's; nothing else comes of it."""

from __future__ import annotations

import math

import pytest
from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsluice.errors import InvalidRequest, UnknownModel
from kvsluice.protos import generation_pb2 as pb
from kvsluice.services.validation import ServedModel, check_prompt, check_request

MODEL = ServedModel("m", 256, 512, 64, "exact", True, has_store=True, has_sessions=True)
TEXT = st.one_of(st.text(max_size=20), st.sampled_from(["", "\0", "a:b", "x\n", "exact", "tokens", "user", "9" * 200]))
EDGES = [0, -1, 1, 2**31 - 1, -(2**31), 2**32, 2**62, -(2**63), 2**63 - 1]


def value_of(field: Field) -> st.SearchStrategy:
    kind = field.cpp_type
    if kind == Field.CPPTYPE_MESSAGE:
        return message_of(field.message_type)
    if kind == Field.CPPTYPE_STRING:
        return TEXT
    if kind == Field.CPPTYPE_BOOL:
        return st.booleans()
    if kind == Field.CPPTYPE_DOUBLE:
        return st.one_of(st.floats(), st.sampled_from([math.nan, math.inf, -0.0, 1e-300, 0.5, 1.0]))
    low, high = {
        Field.CPPTYPE_INT32: (-(2**31), 2**31 - 1), Field.CPPTYPE_UINT32: (0, 2**32 - 1),
        Field.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    }[kind]  # fmt: skip
    return st.one_of(st.integers(1, 8), st.sampled_from([edge for edge in EDGES if low <= edge <= high]))


@st.composite
def message_of(draw, descriptor):
    """Keyword arguments of a message, of some of its fields."""
    fields = {}
    names = draw(st.sets(st.sampled_from([field.name for field in descriptor.fields]), max_size=6))
    for field in descriptor.fields:
        if field.name not in names:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields
            fields[field.name] = draw(st.dictionaries(value_of(key), value_of(value), max_size=3))
        elif field.is_repeated:
            fields[field.name] = draw(st.lists(value_of(field), max_size=4))
        else:
            fields[field.name] = draw(value_of(field))
    return fields


def check(request: pb.GenerateRequest) -> None:
    try:
        checked = check_request(request, MODEL, lambda: 7)
        sampling = check_prompt(checked, len(checked.token_ids or (1, 2)), MODEL)
    except (InvalidRequest, UnknownModel) as exc:
        assert len(exc.message) < 2000
        return
    assert 1 <= sampling.max_tokens <= MODEL.max_model_len
    assert 1 <= sampling.n <= 128
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert math.isfinite(getattr(sampling, name))
    assert all(math.isfinite(bias) for bias in sampling.logit_bias.values())


@settings(max_examples=200, deadline=None)
@given(message_of(pb.GenerateRequest.DESCRIPTOR))
def test_any_fields(fields):
    inputs = [name for name in ("prompt", "token_ids", "chat") if name in fields]
    for name in inputs[1:]:
        del fields[name]
    check(pb.GenerateRequest(**fields))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(data):
    try:
        request = pb.GenerateRequest.FromString(data)
    except DecodeError:
        return
    check(request)


@given(message_of(pb.GenerateRequest.DESCRIPTOR), st.data())
def test_a_sound_message_with_a_flipped_byte(fields, data):
    inputs = [name for name in ("prompt", "token_ids", "chat") if name in fields]
    for name in inputs[1:]:
        del fields[name]
    wire = bytearray(pb.GenerateRequest(**fields).SerializeToString())
    if not wire:
        return
    wire[data.draw(st.integers(0, len(wire) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        request = pb.GenerateRequest.FromString(bytes(wire))
    except DecodeError:
        return
    check(request)


@pytest.mark.parametrize("depth", [101, 5000])
def test_a_deep_message_is_refused_while_it_is_parsed(depth):
    # the public messages nest nowhere without end: what does is skipped as an unknown group, up to a depth
    wire = b"\x83\x06" * depth + b"\x84\x06" * depth
    with pytest.raises(DecodeError):
        pb.GenerateRequest.FromString(wire)
