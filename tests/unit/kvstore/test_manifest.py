"""Manifests: what is encoded comes back, nothing else is taken for one, and a sequence is whole or refused."""

from __future__ import annotations

import math
import struct
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsluice.errors import CorruptFrame
from kvsluice.kvstore.envelope import Fault, seal
from kvsluice.kvstore.frame import DType, Kind, TensorSlice, decode_frame, encode_frame
from kvsluice.kvstore.identity import FrameIdent, frame_key
from kvsluice.kvstore.manifest import (
    MAGIC,
    ChoiceState,
    EmittedToken,
    FrameEntry,
    Manifest,
    ManifestLimits,
    decode_manifest,
    encode_manifest,
    frame_entry,
    verify,
)
from kvsluice.protos import frame_pb2

IDENT = FrameIdent(request_id="req-1", epoch=3, tenant="acme", model_fingerprint="ab" * 16, recipe_fingerprint="cd")
MESSAGES = {f"corrupt manifest: {fault.value}" for fault in Fault}


def entry(index: int, **fields) -> FrameEntry:
    start = {"size_bytes": 100 + index, "checksum": 2**64 - 1 - index, "kind": Kind.KEYS, "layers": (index, index + 1)}
    return FrameEntry(frame_key(IDENT, index), **{**start, **fields})


def small_manifest() -> Manifest:
    emitted = (EmittedToken(7, -0.5, ((7, -0.5), (9, -2.0))), EmittedToken(0, None))
    return Manifest(
        ident=IDENT,
        recipe_json='{"budget": 1}',
        prompt_ids=(1, 0, 50_000),
        choices=(ChoiceState(emitted, "length"), ChoiceState(())),
        seed=2**64 - 1,
        frames=(entry(0), entry(1, kind=Kind.PACKED, layers=(1, 30))),
    )


def message_of(manifest: Manifest) -> frame_pb2.Manifest:
    data = encode_manifest(manifest)
    (length,) = struct.unpack_from("<I", data, 8)
    return frame_pb2.Manifest.FromString(data[12 : 12 + length])


def decoded_or_corrupt(data: bytes) -> Manifest | None:
    """Decode in bounded memory; None for CorruptFrame, whose message must be of the closed set."""
    tracemalloc.start()
    try:
        return decode_manifest(data)
    except CorruptFrame as error:
        assert error.message in MESSAGES
        return None
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 256 * 1024


U32 = st.integers(0, 2**32 - 1)
FLOAT32 = st.floats(width=32, allow_nan=False)
TOKENS = st.builds(EmittedToken, U32, st.none() | FLOAT32, st.lists(st.tuples(U32, FLOAT32), max_size=3).map(tuple))
CHOICES = st.builds(ChoiceState, st.lists(TOKENS, max_size=4).map(tuple), st.sampled_from(["", "stop", "length"]))
ENTRIES = st.builds(
    entry,
    st.integers(0, 999),
    size_bytes=st.integers(1, 2**22),
    checksum=st.integers(0, 2**64 - 1),
    kind=st.sampled_from(Kind),
    layers=st.tuples(st.integers(0, 99), st.integers(100, 2**32 - 1)),
)
MANIFESTS = st.builds(
    Manifest,
    ident=st.just(IDENT),
    recipe_json=st.text(max_size=50),
    prompt_ids=st.lists(U32, min_size=1, max_size=50).map(tuple),
    choices=st.lists(CHOICES, min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 2**64 - 1),
    frames=st.lists(ENTRIES, min_size=1, max_size=5, unique_by=lambda e: e.key).map(tuple),
)


@settings(deadline=None, max_examples=100)
@given(MANIFESTS)
def test_what_is_encoded_comes_back(manifest):
    data = encode_manifest(manifest)
    assert decode_manifest(data) == manifest
    assert encode_manifest(decode_manifest(data)) == data


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_a_manifest_or_corrupt(noise, sealed):
    decoded_or_corrupt(seal(MAGIC, noise) if sealed else noise)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_message_bytes_mutated_under_a_good_checksum(data):
    raw = bytearray(message_of(small_manifest()).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    decoded_or_corrupt(seal(MAGIC, bytes(raw)))


def test_every_flipped_bit_and_every_truncation_is_caught():
    sound = encode_manifest(small_manifest())
    for offset in range(len(sound)):
        assert decoded_or_corrupt(sound[:offset]) is None
        for bit in range(8):
            broken = bytearray(sound)
            broken[offset] ^= 1 << bit
            with pytest.raises(CorruptFrame):
                decode_manifest(broken)


LIES = [
    (Fault.VERSION, lambda m: setattr(m, "format_version", 2)),
    (Fault.IDENTITY, lambda m: setattr(m, "recipe_fingerprint", "")),
    (Fault.RECIPE, lambda m: setattr(m, "recipe_json", "x" * (64 * 1024 + 1))),
    (Fault.PROMPT, lambda m: m.ClearField("prompt_ids")),
    (Fault.CHOICES, lambda m: m.ClearField("choices")),
    (Fault.CHOICES, lambda m: setattr(m.choices[1], "index", 0)),
    (Fault.CHOICES, lambda m: m.choices.extend(frame_pb2.ChoiceState(index=i) for i in range(2, 129))),
    (Fault.EMITTED, lambda m: m.choices[0].emitted[1].top_logprobs.extend([frame_pb2.TokenLogprob()] * 65)),
    (Fault.FINISH, lambda m: setattr(m.choices[0], "finish_reason", "error")),
    (Fault.LOGPROB, lambda m: setattr(m.choices[0].emitted[1], "logprob", math.nan)),
    (Fault.LOGPROB, lambda m: setattr(m.choices[0].emitted[0].top_logprobs[1], "logprob", math.nan)),
    (Fault.FRAMES, lambda m: m.ClearField("frames")),
    (Fault.ENTRY, lambda m: m.frames.append(m.frames[0])),
    (Fault.ENTRY, lambda m: setattr(m.frames[0], "key", "kvsluice:head:" + "0" * 64)),
    (Fault.ENTRY, lambda m: setattr(m.frames[0], "key", m.frames[0].key + "\n")),
    (Fault.ENTRY, lambda m: setattr(m.frames[0], "size", 0)),
    (Fault.ENTRY, lambda m: setattr(m.frames[0], "size", 2**40)),
    (Fault.ENTRY, lambda m: setattr(m.frames[0], "kind", 0)),
    (Fault.ENTRY, lambda m: setattr(m.frames[0], "kind", -7)),
    (Fault.ENTRY, lambda m: setattr(m.frames[0], "layer_end", 0)),
]


@pytest.mark.parametrize(("fault", "change"), LIES, ids=[f"{i}-{fault.name}" for i, (fault, _) in enumerate(LIES)])
def test_each_lie_under_a_good_checksum_is_named(fault, change):
    message = message_of(small_manifest())
    change(message)
    with pytest.raises(CorruptFrame) as caught:
        decode_manifest(seal(MAGIC, message.SerializeToString()))
    assert caught.value.message == f"corrupt manifest: {fault.value}"


def test_a_body_behind_the_message_is_refused():
    raw = message_of(small_manifest()).SerializeToString()
    with pytest.raises(CorruptFrame, match=Fault.LENGTH.value):
        decode_manifest(seal(MAGIC, raw, b"\0"))


def test_limits_count_for_both_sides():
    manifest = small_manifest()
    for limits in (
        ManifestLimits(max_prompt_ids=2),
        ManifestLimits(max_choices=1),
        ManifestLimits(max_emitted=1),
        ManifestLimits(max_frames=1),
        ManifestLimits(max_bytes=100),
    ):
        with pytest.raises(ValueError, match=r"cannot be encoded"):
            encode_manifest(manifest, limits)
        with pytest.raises(CorruptFrame):
            decode_manifest(encode_manifest(manifest), limits)


def test_a_frame_s_entry_says_what_its_bytes_are():
    part = TensorSlice(4, Kind.TAIL, "k", DType.INT8, (2,), 0, 2, 0, 1, memoryview(b"ab"))
    data = encode_frame(IDENT, (0, 2), [part])
    checksum = int.from_bytes(data[-8:], "little")
    expected = FrameEntry(frame_key(IDENT, 9), len(data), checksum, Kind.TAIL, (4, 5))
    assert frame_entry(frame_key(IDENT, 9), decode_frame(data)) == expected


def test_a_sequence_is_whole_in_any_order():
    manifest = replace(small_manifest(), frames=tuple(entry(i) for i in range(5)))
    verify(manifest, manifest.frames)
    verify(manifest, reversed(manifest.frames))


@pytest.mark.parametrize(
    ("fault", "received"),
    [
        (Fault.MISSING, []),
        *((Fault.MISSING, [entry(j) for j in range(3) if j != i]) for i in range(3)),
        (Fault.UNNAMED, [entry(i) for i in range(4)]),
        (Fault.UNNAMED, [entry(0), entry(0), entry(1), entry(2)]),
        (Fault.DIFFERENT, [entry(0), entry(1, checksum=0), entry(2)]),
        (Fault.DIFFERENT, [entry(0), entry(1, size_bytes=1), entry(2)]),
        (Fault.DIFFERENT, [entry(0), entry(1, layers=(0, 2)), entry(2)]),
    ],
)
def test_a_sequence_with_other_frames_is_refused(fault, received):
    manifest = replace(small_manifest(), frames=tuple(entry(i) for i in range(3)))
    with pytest.raises(CorruptFrame, match=fault.value):
        verify(manifest, received)
