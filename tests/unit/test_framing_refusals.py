"""What an assembler of layers takes, and everything that it refuses."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsluice.compression.interfaces import EncodedLayer, Part
from kvsluice.errors import CorruptFrame, FrameMismatch, PermissionDenied
from kvsluice.kvstore.envelope import Fault
from kvsluice.kvstore.frame import DType, FrameLimits, Kind, decode_frame, encode_frame
from kvsluice.services import framing
from kvsluice.services.framing import FrameIdent, FramePacker, LayerAssembler, layer_tensors
from kvsluice.services.staging import tensor_bytes

IDENT = FrameIdent(request_id="req-1", epoch=3, tenant="acme", model_fingerprint="ab" * 16, recipe_fingerprint="cd")
MESSAGES = {f"corrupt {what}: {fault.value}" for what in ("frame", "layer") for fault in Fault}


def random_bytes(*shape: int) -> torch.Tensor:
    """The same uint8 tensor at every call with one shape."""
    size = torch.Size(shape).numel()
    return torch.frombuffer(bytearray(random.Random(size).randbytes(size)), dtype=torch.uint8).reshape(shape)


def layer(index: int) -> EncodedLayer:
    positions = torch.arange(40, dtype=torch.int32)
    return EncodedLayer(index, {Part.KEYS: {"k": random_bytes(40, 8)}, Part.POSITIONS: {"positions": positions}})


def frames_of(encoded: EncodedLayer, ident: FrameIdent = IDENT, target: int = 64) -> list[bytes]:
    packer = FramePacker(ident, 40, target_payload_bytes=target, pack_bytes=min(target, 64))
    return packer.add(encoded) + packer.flush()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("request_id", "req-2"),
        ("epoch", 2),
        ("epoch", 4),
        ("tenant", "other"),
        ("model_fingerprint", "ee"),
        ("recipe_fingerprint", "ee"),
    ],
)
def test_foreign_frames_are_refused_and_change_nothing(field, value):
    sent, assembler = layer(0), LayerAssembler(IDENT, 1, layer(0).nbytes())
    for foreign in frames_of(layer(0), replace(IDENT, **{field: value})):
        with pytest.raises(PermissionDenied if field == "tenant" else FrameMismatch) as caught:
            assembler.add(foreign)
        assert caught.value.message == f"a frame of another {field.replace('_', ' ')}"
    (got,) = [done for frame in frames_of(sent) for done in assembler.add(frame)]
    assert torch.equal(got.tensors[Part.KEYS]["k"], sent.tensors[Part.KEYS]["k"])


def refuse(frames: list[bytes], fault: Fault, num_layers: int = 2, max_bytes: int = 10**6) -> LayerAssembler:
    """All but the last frame are taken; the last is refused with `fault`."""
    assembler = LayerAssembler(IDENT, num_layers, max_bytes)
    for frame in frames[:-1]:
        assembler.add(frame)
    with pytest.raises(CorruptFrame) as caught:
        assembler.add(frames[-1])
    assert caught.value.message == f"corrupt layer: {fault.value}"
    return assembler


def test_every_frame_that_comes_twice_is_refused():
    frames = frames_of(layer(0))
    assert len(frames) > 5
    for index, frame in enumerate(frames):
        refuse([*frames[: index + 1], frame], Fault.DUPLICATE)
    refuse([*frames, frames[0]], Fault.DUPLICATE)


def resent(frame: bytes, position: int = 0, **fields) -> bytes:
    """A frame with one of its tensors described differently; sound by itself."""
    decoded = decode_frame(frame)
    tensors = list(decoded.tensors)
    tensors[position] = replace(tensors[position], **fields)
    return encode_frame(decoded.ident, decoded.tokens, tensors)


def slices_of(rows: list[tuple[int, int]], total: int = 10) -> list[bytes]:
    """Frames with these ranges of rows of a layer's only tensor."""
    encoded = EncodedLayer(0, {Part.KEYS: {"k": random_bytes(total, 3)}})
    (whole,) = layer_tensors(encoded)
    parts = [whole.cut(begin, end) for begin, end in rows]
    return [encode_frame(IDENT, (0, 40), [part.with_data(tensor_bytes(part.rows))]) for part in parts]


@pytest.mark.parametrize(
    "rows",
    [
        [(0, 5), (4, 6)],
        [(4, 6), (0, 5)],
        [(4, 6), (5, 10)],
        [(4, 6), (4, 5)],
        [(4, 6), (5, 6)],
        [(4, 6), (3, 7)],
        [(0, 2), (4, 6), (2, 5)],
        [(0, 2), (4, 6), (1, 4)],
        [(0, 2), (4, 6), (2, 4), (3, 4)],
    ],
)
def test_overlapping_slices_are_refused(rows):
    refuse(slices_of(rows), Fault.DUPLICATE)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 29), unique=True), st.randoms(use_true_random=False))
def test_any_cut_in_any_order_is_put_together(cuts, rng):
    bounds = [0, *sorted(cuts), 30]
    rows = list(pairwise(bounds))
    rng.shuffle(rows)
    assembler = LayerAssembler(IDENT, 1, 90)
    (encoded,) = [done for frame in slices_of(rows, total=30) for done in assembler.add(frame)]
    assert torch.equal(encoded.tensors[Part.KEYS]["k"], random_bytes(30, 3))


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"kind": Kind.VALUES},
        {"total": 11},
        {"layer_tensors": 2},
        {"dtype": DType.INT8},
        {"shape": (3, 1, 3)},
    ],
)
def test_slices_that_contradict_each_other_are_refused(change):
    first, second = slices_of([(0, 3), (3, 6)])
    refuse([first, resent(second, **change)], Fault.INCONSISTENT)


def test_two_tensors_of_one_name_are_refused():
    first, second = slices_of([(0, 3), (3, 6)])
    refuse([resent(first, layer_tensors=2), resent(second, layer_tensors=2, index=1)], Fault.INCONSISTENT)


def test_frames_that_speak_of_other_prompts_are_refused():
    first, second = slices_of([(0, 3), (3, 6)])
    decoded = decode_frame(second)
    refuse([first, encode_frame(IDENT, (0, 41), decoded.tensors)], Fault.INCONSISTENT)


def test_layers_the_model_does_not_have_are_refused():
    refuse([frames_of(layer(2))[0]], Fault.LAYER_RANGE, num_layers=2)


def test_memory_is_bounded_by_what_was_announced():
    encoded = layer(0)
    frames = frames_of(encoded)
    enough = LayerAssembler(IDENT, 1, encoded.nbytes())
    assert [done.layer for frame in frames for done in enough.add(frame)] == [0]
    assembler = LayerAssembler(IDENT, 1, encoded.nbytes() - 1)
    with pytest.raises(CorruptFrame, match=Fault.ANNOUNCED_BOUND.value):
        for frame in frames:
            assembler.add(frame)


def test_complete_layers_count_against_the_announced_bound():
    frames = [*frames_of(layer(0)), *frames_of(layer(1))]
    assembler = LayerAssembler(IDENT, 2, layer(0).nbytes() + 20)
    with pytest.raises(CorruptFrame, match=Fault.ANNOUNCED_BOUND.value):
        for frame in frames:
            assembler.add(frame)
    assert assembler.missing() == [1]


def test_a_claimed_total_is_refused_before_it_is_allocated():
    (frame,) = slices_of([(0, 3)])
    refuse([resent(frame, total=2**28)], Fault.ANNOUNCED_BOUND, max_bytes=2**20)


def test_slices_scattered_without_end_are_refused(monkeypatch):
    monkeypatch.setattr(framing, "MAX_OPEN_RANGES", 3)
    refuse(slices_of([(0, 1), (2, 3), (4, 5), (6, 7)]), Fault.SCATTERED)


def test_an_assembler_has_the_receiver_s_limits():
    (frame,) = slices_of([(0, 3)])
    with pytest.raises(CorruptFrame):
        LayerAssembler(IDENT, 1, 100, FrameLimits(max_payload_bytes=8)).add(frame)


def test_missing_names_the_layers_that_are_not_whole():
    assembler = LayerAssembler(IDENT, 4, 10**6)
    for frame in frames_of(layer(2)):
        assembler.add(frame)
    for frame in frames_of(layer(1))[:-1]:
        assembler.add(frame)
    assert assembler.missing() == [0, 1, 3]


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_with_a_public_message(noise):
    with pytest.raises(CorruptFrame) as caught:
        LayerAssembler(IDENT, 1, 100).add(noise)
    assert caught.value.message in MESSAGES


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20), st.integers(1, 40), st.integers(0, 3)), max_size=8))
def test_sound_frames_that_lie_about_layers_never_pass_the_bound(claims):
    """Whatever sound slices come, tensors take no more memory than announced and no layer is complete by a lie."""
    assembler = LayerAssembler(IDENT, 1, 100)
    (frame,) = slices_of([(0, 1)])
    for begin, rows, total, index in claims:
        (item,) = decode_frame(frame).tensors
        claim = replace(
            item, shape=(rows, 3), begin=begin, total=total, index=index, name=f"n{index}", layer_tensors=4,
            data=memoryview(bytes(3 * rows)),
        )  # fmt: skip
        try:
            data = encode_frame(IDENT, (0, 40), [claim])
        except ValueError:
            continue
        try:
            done = assembler.add(data)
        except CorruptFrame as error:
            assert error.message in MESSAGES
            continue
        assert all(encoded.nbytes() <= 100 for encoded in done)
