"""Layers to frames and back: nothing lost, nothing foreign taken, nothing held that was not announced."""

from __future__ import annotations

import random
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsluice.compression.interfaces import EncodedLayer, Part
from kvsluice.kvstore.frame import DEFAULT_LIMITS, Kind, decode_frame
from kvsluice.services import framing
from kvsluice.services.framing import FrameIdent, FrameMeter, FramePacker, LayerAssembler, layer_frames, layer_tensors
from kvsluice.services.staging import PlainCopies, tensor_bytes

IDENT = FrameIdent(request_id="req-1", epoch=3, tenant="acme", model_fingerprint="ab" * 16, recipe_fingerprint="cd")
DTYPES = [torch.uint8, torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn]


def random_tensor(shape, dtype, seed) -> torch.Tensor:
    """Random bits; NaNs included."""
    size = torch.empty(shape, dtype=dtype).nbytes
    raw = random.Random(seed).randbytes(size)
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor_bytes(tensor))


def assert_same(got: EncodedLayer, sent: EncodedLayer) -> None:
    """Equal bit for bit, in the same order, each tensor with memory of its own."""
    assert got.layer == sent.layer
    flat = [(p, n, t) for p, group in got.tensors.items() for n, t in group.items()]
    assert [(p, n) for p, n, _ in flat] == [(p, n) for p, group in sent.tensors.items() for n in group]
    for part, name, tensor in flat:
        wanted = sent.tensors[part][name]
        assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape)
        assert tensor.is_contiguous()
        assert bits(tensor) == bits(wanted)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def layer(index: int, rows: int = 40, width: int = 8) -> EncodedLayer:
    """A layer as a recipe may make it, about rows * (2 * width + 7) bytes."""
    return EncodedLayer(
        index,
        {
            Part.KEYS: {
                "codes": random_tensor((rows, 2, width // 2), torch.uint8, index),
                "scale": random_tensor((rows, 1), torch.bfloat16, index + 1),
            },
            Part.VALUES: {"rows": random_tensor((rows, width), torch.int8, index + 2)},
            Part.OUTLIERS: {"rows": random_tensor((0, 2, width), torch.float16, index)},
            Part.POSITIONS: {"positions": torch.arange(rows, dtype=torch.int32)},
        },
    )


def assemble(frames, num_layers, max_bytes) -> dict[int, EncodedLayer]:
    assembler = LayerAssembler(IDENT, num_layers, max_bytes)
    got = {}
    for frame in frames:
        for encoded in assembler.add(frame):
            assert encoded.layer not in got
            assert encoded.layer not in assembler.missing()
            got[encoded.layer] = encoded
    assert assembler.missing() == sorted(set(range(num_layers)) - set(got))
    return got


@st.composite
def encoded_layers(draw, num_layers: int) -> list[EncodedLayer]:
    shapes = st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple)
    groups = draw(
        st.dictionaries(
            st.sampled_from(Part),
            st.dictionaries(
                st.text(min_size=1, max_size=5), st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=3
            ),
            min_size=1,
            max_size=4,
        )
    )
    seed = draw(st.integers(0, 99))
    return [
        EncodedLayer(
            index,
            {
                part: {name: random_tensor(shape, dtype, seed + index) for name, (shape, dtype) in group.items()}
                for part, group in groups.items()
            },
        )
        for index in range(num_layers)
    ]


@settings(deadline=None, max_examples=150)
@given(st.data(), st.integers(1, 4), st.sampled_from([(16, 16), (64, 16), (64, 64), (400, 100), (10**6, 10**5)]))
def test_layers_come_back_whatever_the_split_and_the_order(data, num_layers, sizes):
    layers = data.draw(encoded_layers(num_layers))
    target, pack = sizes
    packer = FramePacker(IDENT, 7, target_payload_bytes=target, pack_bytes=pack)
    frames = [frame for encoded in layers for frame in packer.add(encoded)] + packer.flush()
    data.draw(st.randoms(use_true_random=False)).shuffle(frames)
    got = assemble(frames, num_layers, sum(encoded.nbytes() for encoded in layers))
    for sent in layers:
        assert_same(got[sent.layer], sent)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_layers=st.integers(1, 6), sizes=st.sampled_from([(64, 64), (512, 100), (1 << 20, 1 << 18)]))
def test_bytes_are_counted_as_frames_would_have_them(data, num_layers, sizes):
    layers = data.draw(encoded_layers(num_layers))
    packer, meter = (
        kind(IDENT, 7, target_payload_bytes=sizes[0], pack_bytes=sizes[1]) for kind in (FramePacker, FrameMeter)
    )
    for encoded in layers:
        assert meter.measure(encoded) == sum(map(len, packer.add(encoded)))
    assert meter.measure_rest() == sum(map(len, packer.flush()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (0, 4), (4, 0), (2, 3, 1, 5), (70_001, 3)])
def test_every_dtype_and_odd_shape(dtype, shape):
    sent = EncodedLayer(0, {Part.TAIL: {"t": random_tensor(shape, dtype, 5)}})
    assert_same(assemble(layer_frames(sent, IDENT, 9), 1, sent.nbytes())[0], sent)


def test_tensors_that_do_not_lie_dense_are_sent_row_major():
    strided = torch.arange(24, dtype=torch.int32).reshape(4, 6).t()[::2]
    sent = EncodedLayer(0, {Part.KEYS: {"t": strided}})
    assert_same(assemble(layer_frames(sent, IDENT, 9), 1, sent.nbytes())[0], sent)


def test_the_same_layers_give_the_same_bytes():
    once, again = ([f for i in range(3) for f in layer_frames(layer(i), IDENT, 40)] for _ in range(2))
    assert once == again


def test_frames_of_one_layer_leave_one_by_one_with_the_layer():
    packer = FramePacker(IDENT, 40, target_payload_bytes=512, pack_bytes=256)
    for index in range(3):
        frames = [decode_frame(frame) for frame in packer.add(layer(index))]
        assert {frame.layers for frame in frames} == {(index, index + 1)}
        kinds = [frame.kind for frame in frames]
        assert kinds[:2] == [Kind.KEYS, Kind.VALUES]
        assert kinds[-1] is Kind.PACKED, "outliers and positions are small and share a frame"
        assert all(sum(t.data.nbytes for t in frame.tensors) <= 512 for frame in frames)
    assert packer.flush() == []


def test_short_prompts_pack_layers_but_the_first_never_waits():
    packer = FramePacker(IDENT, 4, pack_bytes=1000)
    layers = [layer(index, rows=10) for index in range(12)]
    assert layers[0].nbytes() < 300
    left = [packer.add(encoded) for encoded in layers]
    rest = packer.flush()
    assert [len(frames) for frames in left[:2]] == [1, 0]
    assert decode_frame(left[0][0]).layers == (0, 1)
    assert 0 < sum(map(len, left[1:])) < 6
    assert len(rest) <= 1
    sent = [decode_frame(frame) for frames in [*left, rest] for frame in frames]
    assert [frame.layers[0] for frame in sent] == sorted(frame.layers[0] for frame in sent)
    assert {frame.kind for frame in sent} == {Kind.PACKED}


def test_a_waiting_layer_is_not_overtaken_by_a_large_one():
    packer = FramePacker(IDENT, 4, pack_bytes=1000)
    packer.add(layer(0, rows=2))
    assert packer.add(layer(1, rows=2)) == []
    frames = [decode_frame(frame) for frame in packer.add(layer(2, rows=2000))]
    assert frames[0].layers == (1, 2)
    assert {frame.layers for frame in frames[1:]} == {(2, 3)}


def test_many_tiny_tensors_leave_before_a_frame_has_too_many():
    packer = FramePacker(IDENT, 1)
    for index in range(400):
        tensors = {f"t{i}": torch.zeros(1, dtype=torch.uint8) for i in range(5)}
        for frame in packer.add(EncodedLayer(index, {Part.KEYS: tensors})):
            assert len(decode_frame(frame).tensors) <= framing.MAX_PACKED_TENSORS


def test_a_row_above_the_target_has_a_frame_of_its_own():
    sent = EncodedLayer(0, {Part.BASIS: {"b": random_tensor((3, 1500 * 1024), torch.uint8, 1)}})
    frames = list(layer_frames(sent, IDENT, 9))
    assert len(frames) == 3
    assert_same(assemble(frames, 1, sent.nbytes())[0], sent)


def test_splitting_copies_a_large_layer_once():
    encoded = EncodedLayer(0, {Part.VALUES: {"v": torch.zeros(8 * 1024, 1024, dtype=torch.uint8)}})
    tracemalloc.start()
    packer = FramePacker(IDENT, 9)
    for frame in packer._frames(packer._groups(layer_tensors(encoded)), None, PlainCopies()):
        assert len(frame) < 1100 * 1024
        del frame
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * 1024 * 1024, "one frame on its way out and one being made"


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {Part.KEYS: {}},
        {Part.KEYS: {"k": torch.tensor(1.0)}},
        {Part.KEYS: {"k": torch.zeros(2, dtype=torch.float64)}},
        {Part.KEYS: {"k": torch.zeros(2, dtype=torch.int64)}},
        {Part.KEYS: {"k": torch.zeros(2, dtype=torch.bool)}},
        {Part.KEYS: {"": torch.zeros(2)}},
        {Part.KEYS: {"k": torch.zeros(1, 5 * 1024 * 1024, dtype=torch.uint8)}},
    ],
)
def test_what_cannot_be_sent_is_refused(tensors):
    with pytest.raises(ValueError, match=r"\w"):
        list(layer_frames(EncodedLayer(0, tensors), IDENT, 9))


@pytest.mark.parametrize("sizes", [(0, 0), (100, 200), (DEFAULT_LIMITS.max_payload_bytes + 1, 100)])
def test_sizes_that_do_not_fit_together_are_refused(sizes):
    with pytest.raises(ValueError, match="pack_bytes"):
        FramePacker(IDENT, 9, target_payload_bytes=sizes[0], pack_bytes=sizes[1])


def test_receiving_takes_memory_for_each_tensor_once():
    sent = EncodedLayer(0, {Part.VALUES: {"v": random_tensor((4096, 1024), torch.uint8, 0)}})
    frames = list(layer_frames(sent, IDENT, 9))
    assembler = LayerAssembler(IDENT, 1, sent.nbytes())
    tracemalloc.start()  # torch's own memory is not traced, so this is all that is held beside the tensors
    done = [encoded for frame in frames for encoded in assembler.add(frame)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 128 * 1024
    assert_same(done[0], sent)


def test_parts_are_the_kinds_of_the_wire():
    assert {part.name: part.value for part in Part} == {k.name: k.value for k in Kind if k is not Kind.PACKED}
