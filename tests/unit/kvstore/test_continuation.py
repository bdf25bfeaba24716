"""Continuations: what is encoded comes back, and nothing else is taken for one."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsluice.errors import CorruptFrame
from kvsluice.kvstore.continuation import (
    MAGIC,
    Continuation,
    ContinuedChoice,
    RowsEntry,
    decode_continuation,
    encode_continuation,
)
from kvsluice.kvstore.envelope import Fault, seal
from kvsluice.kvstore.frame import Kind
from kvsluice.kvstore.identity import FrameIdent, continuation_key, epoch_of, frame_key, manifest_key
from kvsluice.kvstore.manifest import FrameEntry, ManifestLimits
from kvsluice.protos import frame_pb2

IDENT = FrameIdent(request_id="req-1", epoch=3, tenant="acme", model_fingerprint="ab" * 16, recipe_fingerprint="cd")
MESSAGES = {f"corrupt continuation: {fault.value}" for fault in Fault}


def entry(index: int) -> FrameEntry:
    return FrameEntry(frame_key(IDENT, index), 100 + index, 2**64 - 1 - index, Kind.TAIL, (0, 2))


def small() -> Continuation:
    return Continuation(
        ident=IDENT,
        base=manifest_key(replace(IDENT, epoch=2)),
        base_checksum=2**64 - 1,
        version=4,
        choices=(ContinuedChoice((5, 0, 50_000)), ContinuedChoice((7,), "stop")),
        rows=(RowsEntry(0, (100, 101), (entry(0),)), RowsEntry(0, (101, 103), (entry(1), entry(2)))),
    )


def message_of(continuation: Continuation) -> frame_pb2.Continuation:
    data = encode_continuation(continuation)
    (length,) = struct.unpack_from("<I", data, 8)
    return frame_pb2.Continuation.FromString(data[12 : 12 + length])


def refused(data: bytes, **limits: int) -> str:
    with pytest.raises(CorruptFrame) as raised:
        decode_continuation(data, ManifestLimits(**limits))
    assert raised.value.message in MESSAGES
    return raised.value.message.removeprefix("corrupt continuation: ")


U32 = st.integers(0, 2**32 - 1)
CHOICES = st.builds(ContinuedChoice, st.lists(U32, max_size=5).map(tuple), st.sampled_from(["", "stop", "length"]))


@st.composite
def continuations(draw) -> Continuation:
    choices = draw(st.lists(CHOICES, min_size=1, max_size=3))
    rows, index, begin = [], 0, draw(st.integers(0, 1000))
    for choice in range(len(choices)):
        end = begin
        for _ in range(draw(st.integers(0, 3))):
            start, end = end, end + draw(st.integers(1, 40))
            count = draw(st.integers(1, 3))
            rows.append(RowsEntry(choice, (start, end), tuple(entry(index + i) for i in range(count))))
            index += count
    return replace(small(), choices=tuple(choices), rows=tuple(rows), version=draw(st.integers(1, 2**32 - 1)))


@settings(deadline=None, max_examples=100)
@given(continuations())
def test_what_is_encoded_comes_back(continuation):
    data = encode_continuation(continuation)
    assert decode_continuation(data) == continuation
    assert encode_continuation(decode_continuation(data)) == data


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_a_continuation_or_corrupt(noise, sealed):
    try:
        decode_continuation(seal(MAGIC, noise) if sealed else noise)
    except CorruptFrame as exc:
        assert exc.message in MESSAGES


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_message_bytes_mutated_under_a_good_checksum(data):
    raw = bytearray(message_of(small()).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode_continuation(seal(MAGIC, bytes(raw)))
    except CorruptFrame as exc:
        assert exc.message in MESSAGES


def test_every_flipped_bit_and_every_truncation_is_caught():
    sound = encode_continuation(small())
    for i in range(len(sound)):
        refused(sound[:i])
        for bit in range(8):
            refused(sound[:i] + bytes([sound[i] ^ (1 << bit)]) + sound[i + 1 :])


def altered(**fields: object) -> bytes:
    message = message_of(small())
    for name, value in fields.items():
        setattr(message, name, value)
    return seal(MAGIC, message.SerializeToString(deterministic=True))


def with_rows(*rows: tuple[int, int, int, int]) -> bytes:
    """Rows of choice, begin, end and how many frames."""
    message, index = message_of(small()), 0
    template = message.rows[0].frames[0]
    del message.rows[:]
    for choice, begin, end, count in rows:
        added = message.rows.add(choice=choice, token_begin=begin, token_end=end)
        for _ in range(count):
            added.frames.add().CopyFrom(template)
            added.frames[-1].key = frame_key(IDENT, index)
            index += 1
    return seal(MAGIC, message.SerializeToString(deterministic=True))


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (altered(format_version=2), Fault.VERSION),
        (altered(request_id=""), Fault.IDENTITY),
        (altered(base=""), Fault.BASE),
        (altered(base=frame_key(IDENT, 0)), Fault.BASE),
        (altered(version=0), Fault.BASE),
        (with_rows((2, 0, 1, 1)), Fault.ROWS),
        (with_rows((0, 0, 4, 1), (0, 5, 6, 1)), Fault.ROWS),
        (with_rows((0, 0, 4, 1), (0, 3, 6, 1)), Fault.ROWS),
        (with_rows((0, 4, 4, 1)), Fault.ROWS),
        (with_rows((0, 0, 4, 0)), Fault.ROWS),
        (with_rows((1, 0, 4, 1), (0, 0, 4, 1)), Fault.ROWS),
        (with_rows((0, 0, 4, 1), (1, 1, 4, 1)), Fault.ROWS),
    ],
)
def test_contradictions_are_refused(data: bytes, fault: Fault):
    assert refused(data) == fault.value


def test_limits_hold():
    data = encode_continuation(small())
    assert refused(data, max_choices=1) == Fault.CHOICES.value
    assert refused(data, max_emitted=3) == Fault.EMITTED.value
    assert refused(data, max_frames=2) == Fault.FRAMES.value
    assert refused(data, max_bytes=64) == Fault.TOO_LONG.value
    with pytest.raises(ValueError, match="cannot be encoded"):
        encode_continuation(replace(small(), choices=()))


def test_names_hold_their_epoch():
    assert epoch_of(continuation_key(IDENT, 7)) == epoch_of(frame_key(IDENT, 5)) == epoch_of(manifest_key(IDENT)) == 3
    names = {continuation_key(replace(IDENT, epoch=e), v) for e in (1, 2) for v in (1, 2)}
    assert len(names) == 4
