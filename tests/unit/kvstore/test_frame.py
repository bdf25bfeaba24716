"""Frames: what is encoded comes back, and nothing else is ever taken for a frame."""

from __future__ import annotations

import math
import struct
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsluice.errors import CorruptFrame
from kvsluice.kvstore.envelope import FORMAT_VERSION, Fault, seal
from kvsluice.kvstore.frame import (
    DEFAULT_LIMITS,
    MAGIC,
    PAYLOAD_ALIGN,
    TENSOR_ALIGN,
    DType,
    Frame,
    FrameLimits,
    Kind,
    TensorSlice,
    decode_frame,
    encode_frame,
)
from kvsluice.kvstore.identity import FrameIdent
from kvsluice.protos import frame_pb2

IDENT = FrameIdent(
    request_id="req-1", epoch=3, tenant="acme", model_fingerprint="ab" * 16, recipe_fingerprint="cd" * 16
)
MESSAGES = {f"corrupt frame: {fault.value}" for fault in Fault}
PREFIX = struct.Struct("<4sII")
U32 = st.one_of(st.integers(0, 5), st.sampled_from([2**16, 2**31 - 1, 2**31, 2**32 - 1]))
U64 = st.one_of(U32, st.sampled_from([2**32, 2**63, 2**64 - 1]))


def tensor(shape, dtype=DType.UINT8, fill=None, **fields) -> TensorSlice:
    """A slice with numbered bytes; the whole tensor unless fields say otherwise."""
    size = math.prod(shape) * dtype.itemsize
    data = bytes(i % 251 for i in range(size)) if fill is None else bytes([fill]) * size
    start = {"layer": 0, "kind": Kind.KEYS, "name": "codes", "begin": 0, "total": shape[0], "index": 0}
    return TensorSlice(**{**start, "layer_tensors": 8, **fields}, dtype=dtype, shape=shape, data=memoryview(data))


def small_frame() -> bytes:
    """A frame with padding of every sort: before the payload and between tensors."""
    parts = [
        tensor((3, 5), layer=2, index=0),
        tensor((2, 3), DType.BFLOAT16, layer=2, kind=Kind.VALUES, name="values", index=1, begin=4, total=9),
        tensor((4,), DType.INT32, layer=3, kind=Kind.POSITIONS, name="positions"),
    ]
    return encode_frame(IDENT, (0, 9), parts)


def parts_of(frame: bytes) -> tuple[frame_pb2.FrameHeader, bytes]:
    """Header and payload of a sound frame, found by the documented layout alone."""
    magic, version, header_bytes = PREFIX.unpack_from(frame)
    assert (magic, version) == (MAGIC, FORMAT_VERSION)
    begin = -(-(PREFIX.size + header_bytes) // 64) * 64
    return frame_pb2.FrameHeader.FromString(frame[PREFIX.size : PREFIX.size + header_bytes]), frame[begin:-8]


def rebuilt(header: frame_pb2.FrameHeader | bytes, payload: bytes, pad: int = 0) -> bytes:
    """A frame of any header and payload with a checksum that fits them."""
    raw = header if isinstance(header, bytes) else header.SerializeToString()
    return seal(MAGIC, raw, bytes([pad]) * (-(PREFIX.size + len(raw)) % 64), payload)


def decoded_or_corrupt(data: bytes, limits: FrameLimits = DEFAULT_LIMITS) -> Frame | None:
    """Decode in bounded memory; None for CorruptFrame, whose message must be of the closed set. What decodes must
    make sense."""
    tracemalloc.start()
    try:
        frame = decode_frame(data, limits)
    except CorruptFrame as error:
        assert error.message in MESSAGES
        return None
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 256 * 1024
    assert frame.size_bytes == len(data) <= limits.max_frame_bytes
    assert 0 < len(frame.tensors) <= limits.max_tensors
    for item in frame.tensors:
        assert item.data.nbytes == math.prod(item.shape) * item.dtype.itemsize
        assert item.begin + item.shape[0] <= item.total
        assert frame.layers[0] <= item.layer < frame.layers[1]
        assert frame.kind in (item.kind, Kind.PACKED)
    return frame


@st.composite
def tensor_lists(draw) -> list[TensorSlice]:
    result = []
    for index in range(draw(st.integers(1, 6))):
        shape = tuple(draw(st.lists(st.integers(0, 5), min_size=1, max_size=4)))
        dtype = draw(st.sampled_from(DType))
        before, after = draw(st.integers(0, 1000)), draw(st.integers(0, 1000))
        whole = math.prod(shape) == 0
        result.append(
            tensor(
                shape,
                dtype,
                layer=draw(st.integers(0, 100)),
                kind=draw(st.sampled_from([kind for kind in Kind if kind is not Kind.PACKED])),
                name=draw(st.text(min_size=1, max_size=16)),
                index=index,
                layer_tensors=draw(st.integers(6, 20)),
                begin=0 if whole else before,
                total=shape[0] if whole else before + shape[0] + after,
            )
        )
    return result


@settings(deadline=None, max_examples=150)
@given(tensor_lists(), st.integers(0, 2**64 - 1), st.text(max_size=16), st.integers(0, 2**32 - 1))
def test_what_is_encoded_comes_back(tensors, epoch, tenant, num_tokens):
    ident = replace(IDENT, epoch=epoch, tenant=tenant)
    data = encode_frame(ident, (0, num_tokens), tensors)
    frame = decode_frame(data)
    assert frame.ident == ident
    assert frame.tokens == (0, num_tokens)
    assert frame.layers == (min(t.layer for t in tensors), max(t.layer for t in tensors) + 1)
    assert frame.kind is (tensors[0].kind if len({t.kind for t in tensors}) == 1 else Kind.PACKED)
    assert list(frame.tensors) == tensors  # memoryviews compare by content
    assert data[-8:] == struct.pack("<Q", frame.checksum)
    assert encode_frame(frame.ident, frame.tokens, frame.tensors) == data


@settings(deadline=None, max_examples=50)
@given(tensor_lists())
def test_payload_and_tensors_are_aligned_in_place(tensors):
    data = encode_frame(IDENT, (0, 1), tensors)
    header, payload = parts_of(data)
    assert (len(data) - 8 - len(payload)) % PAYLOAD_ALIGN == 0
    base = np.frombuffer(data, np.uint8).ctypes.data
    for item, spec in zip(decode_frame(data).tensors, header.tensors, strict=True):
        assert spec.offset % TENSOR_ALIGN == 0
        if item.data.nbytes:
            assert (np.frombuffer(item.data, np.uint8).ctypes.data - base) % TENSOR_ALIGN == 0


GOLDEN = (  # prefix and header; padding to 64; payload; checksum
    "4b565346010000002d0000000801120172180122016d2a016330013801400250025a110a016b10041a020201280130014002500160046a0174"
    "00000000000000"
    "07070707"
    "50b1c90eada04446"
)


def test_bytes_of_the_format_do_not_change_by_accident():
    ident = FrameIdent(request_id="r", epoch=1, tenant="t", model_fingerprint="m", recipe_fingerprint="c")
    data = encode_frame(ident, (0, 2), [tensor((2, 1), DType.FLOAT16, fill=7, name="k", layer=1, layer_tensors=1)])
    assert data.hex() == GOLDEN
    assert decode_frame(bytes.fromhex(GOLDEN)).tensors[0].data == b"\x07\x07\x07\x07"


def test_decoding_copies_no_payload():
    data = encode_frame(IDENT, (0, 1), [tensor((4 * 1024, 1024))])
    tracemalloc.start()
    frame = decode_frame(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 1024
    assert frame.tensors[0].data.obj is data
    assert frame.tensors[0].data.readonly
    assert decode_frame(bytearray(data)).tensors[0].data.readonly


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=400), st.sampled_from(["raw", "prefixed", "sealed header", "sealed body"]))
def test_any_bytes_are_a_frame_or_corrupt(noise, where):
    data = {
        "raw": lambda: noise,
        "prefixed": lambda: PREFIX.pack(MAGIC, FORMAT_VERSION, len(noise) // 2) + noise,
        "sealed header": lambda: rebuilt(noise, b""),
        "sealed body": lambda: rebuilt(parts_of(small_frame())[0], noise),
    }[where]()
    decoded_or_corrupt(data)


def set_fields(draw, message) -> None:
    """Put arbitrary values into one or two fields, of any sort."""
    for field in draw(st.lists(st.sampled_from(list(message.DESCRIPTOR.fields)), min_size=1, max_size=2)):
        if field.message_type is not None:
            repeated = getattr(message, field.name)
            del repeated[draw(st.integers(0, len(repeated))) :]
            repeated.extend([frame_pb2.TensorSpec()] * draw(st.integers(0, 3)))
        elif field.is_repeated:
            del getattr(message, field.name)[:]
            getattr(message, field.name).extend(draw(st.lists(U32, max_size=12)))
        elif field.type == field.TYPE_STRING:
            setattr(message, field.name, draw(st.one_of(st.text(max_size=4), st.just("x" * 300))))
        elif field.enum_type is not None:
            setattr(message, field.name, draw(st.sampled_from([-(2**31), -1, 0, 1, 7, 8, 9, 2**31 - 1])))
        else:
            setattr(message, field.name, draw(U64 if field.type == field.TYPE_UINT64 else U32))


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_a_lying_header_with_a_good_checksum_is_bounded(data):
    header, payload = parts_of(small_frame())
    for target in data.draw(st.lists(st.sampled_from([header, *header.tensors]), min_size=1, max_size=2)):
        set_fields(data.draw, target)
    decoded_or_corrupt(rebuilt(header, payload))


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_header_bytes_mutated_under_a_good_checksum(data):
    header, payload = parts_of(small_frame())
    raw = bytearray(header.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    decoded_or_corrupt(rebuilt(bytes(raw), payload))


def test_every_flipped_bit_is_caught():
    sound = small_frame()
    for offset in range(len(sound)):
        for bit in range(8):
            broken = bytearray(sound)
            broken[offset] ^= 1 << bit
            with pytest.raises(CorruptFrame):
                decode_frame(broken)


def test_every_truncation_and_any_trailing_byte_is_caught():
    sound = small_frame()
    for length in range(len(sound)):
        with pytest.raises(CorruptFrame):
            decode_frame(sound[:length])
    for extra in (b"\0", b"\0" * 8, b"\0" * 64, sound):
        with pytest.raises(CorruptFrame):
            decode_frame(sound + extra)


def test_pickle_bytes_are_corrupt_and_never_run(tmp_path):
    canary = tmp_path / "canary"
    program = f"cos\nmkdir\n(V{canary}\ntR.".encode()
    for data in (program, rebuilt(program, b""), seal(MAGIC, program), seal(program[:4], program[4:])):
        assert decoded_or_corrupt(data) is None
    decoded_or_corrupt(encode_frame(replace(IDENT, request_id=program.decode()), (0, 1), [tensor((1,))]))
    assert not canary.exists()


def lie(at: int | None = 0, **fields):
    """A change of the spec of tensor `at`, or of the header itself."""

    def change(header: frame_pb2.FrameHeader) -> None:
        message = header if at is None else header.tensors[at]
        for name in fields:
            message.ClearField(name)
        message.MergeFrom(type(message)(**fields))

    return change


LIES = [
    (Fault.VERSION, lie(None, format_version=2)),
    (Fault.IDENTITY, lie(None, request_id="")),
    (Fault.IDENTITY, lie(None, model_fingerprint="")),
    (Fault.IDENTITY, lie(None, tenant="t" * 257)),
    (Fault.RANGE, lie(None, token_begin=10)),
    (Fault.TOO_LONG, lie(None, payload_bytes=2**63)),
    (Fault.LENGTH, lie(None, payload_bytes=49)),
    (Fault.PAYLOAD_RANGE, lie(None, payload_bytes=47)),
    (Fault.NO_TENSORS, lambda header: header.ClearField("tensors")),
    (Fault.TENSOR_COUNT, lambda header: header.tensors.extend([header.tensors[0]] * 510)),
    (Fault.SUMMARY, lie(None, kind=Kind.KEYS)),
    (Fault.SUMMARY, lie(None, kind=9)),
    (Fault.SUMMARY, lie(None, layer_begin=1)),
    (Fault.SUMMARY, lie(None, layer_end=5)),
    (Fault.NAME, lie(name="")),
    (Fault.NAME, lie(name="n" * 65)),
    (Fault.KIND, lie(kind=0)),
    (Fault.KIND, lie(kind=Kind.PACKED)),
    (Fault.KIND, lie(kind=-1)),
    (Fault.DTYPE, lie(dtype=0)),
    (Fault.DTYPE, lie(dtype=8)),
    (Fault.DTYPE, lie(dtype=-(2**31))),
    (Fault.RANK, lie(shape=[])),
    (Fault.RANK, lie(shape=[1] * 99)),
    (Fault.ELEMENTS, lie(shape=[2**31], total=2**31)),
    (Fault.ELEMENTS, lie(total=2**31)),
    (Fault.ELEMENTS, lie(shape=[0, 2**31], total=0)),
    (Fault.ELEMENTS, lie(shape=[2**32 - 1] * 8, total=2**32 - 1)),
    (Fault.SLICE, lie(begin=1)),
    (Fault.SLICE, lie(total=2)),
    (Fault.SLICE, lie(shape=[0, 5])),
    (Fault.SLICE, lie(shape=[2, 0])),
    (Fault.INDEX, lie(index=8)),
    (Fault.INDEX, lie(layer_tensors=0)),
    (Fault.INDEX, lie(layer_tensors=513)),
    (Fault.MISALIGNED, lie(1, offset=17)),
    (Fault.OVERLAP, lie(1, offset=0)),
    (Fault.GAP, lie(1, offset=32)),
    (Fault.GAP, lie(offset=16)),
    (Fault.PAYLOAD_RANGE, lie(shape=[2**20], total=2**20)),
    (Fault.GAP, lambda header: header.tensors.reverse()),
    (Fault.OVERLAP, lie(shape=[4, 5], total=4)),
    (Fault.GAP, lie(offset=2**64 - 16)),
]


@pytest.mark.parametrize(("fault", "change"), LIES, ids=[f"{i}-{fault.name}" for i, (fault, _) in enumerate(LIES)])
def test_each_lie_is_named_before_anything_is_allocated(fault, change):
    header, payload = parts_of(small_frame())
    change(header)
    data = rebuilt(header, payload)
    tracemalloc.start()
    with pytest.raises(CorruptFrame) as caught:
        decode_frame(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.message == f"corrupt frame: {fault.value}"
    assert peak < 256 * 1024


def test_faults_of_the_envelope_are_named():
    sound = small_frame()
    header, payload = parts_of(sound)
    cases = {
        Fault.TOO_SHORT: [b"", sound[:19]],
        Fault.TOO_LONG: [bytes(DEFAULT_LIMITS.max_frame_bytes + 1)],
        Fault.MAGIC: [b"KVSM" + sound[4:]],
        Fault.VERSION: [PREFIX.pack(MAGIC, 2, 1) + sound[12:]],
        Fault.HEADER_BOUND: [PREFIX.pack(MAGIC, FORMAT_VERSION, 64 * 1024 + 1) + sound[12:]],
        Fault.HEADER_RANGE: [PREFIX.pack(MAGIC, FORMAT_VERSION, len(sound)) + sound[12:]],
        Fault.CHECKSUM: [sound[:-1] + bytes([sound[-1] ^ 1])],
        Fault.HEADER_PARSE: [rebuilt(b"\xff" * 40, payload), rebuilt(b"\x12\x02\xff\xfe", b"")],
        Fault.LENGTH: [rebuilt(header, payload + b"\0"), rebuilt(header, payload[:-1])],
        Fault.PADDING: [rebuilt(header, payload, pad=1), rebuilt(header, payload[:15] + b"\1" + payload[16:])],
    }
    for fault, broken in cases.items():
        for data in broken:
            with pytest.raises(CorruptFrame) as caught:
                decode_frame(data)
            assert caught.value.message == f"corrupt frame: {fault.value}"


def test_the_checksum_is_verified_before_the_header_is_parsed():
    unparsable = rebuilt(b"\xff" * 40, b"")
    with pytest.raises(CorruptFrame, match=Fault.HEADER_PARSE.value):
        decode_frame(unparsable)
    with pytest.raises(CorruptFrame, match=Fault.CHECKSUM.value):
        decode_frame(unparsable[:-1] + bytes([unparsable[-1] ^ 1]))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 8), st.integers(1, 64))
def test_a_decoder_s_own_limits_count(max_rank, max_payload):
    limits = FrameLimits(max_rank=max_rank, max_payload_bytes=max_payload)
    fits = encode_frame(IDENT, (0, 1), [tensor((max_payload, *[1] * (max_rank - 1)))])
    assert decode_frame(fits, limits).tensors
    assert decoded_or_corrupt(encode_frame(IDENT, (0, 1), [tensor((max_payload + 1,))]), limits) is None
    if max_rank < 8:
        assert decoded_or_corrupt(encode_frame(IDENT, (0, 1), [tensor((1,) * (max_rank + 1))]), limits) is None


@pytest.mark.parametrize(
    "broken",
    [
        [],
        [tensor((2, 2), name="")],
        [tensor((2, 2), kind=Kind.PACKED)],
        [tensor((2, 2), begin=1)],
        [tensor((2, 2), index=8)],
        [tensor((2, 2), layer=-1)],
        [tensor((5 * 1024, 1024))],
        [replace(tensor((2, 2)), shape=(2, 3))],
        [replace(tensor((2, 2)), shape=())],
        [tensor((1,), name="é" * 32, index=i, layer_tensors=512) for i in range(513)],
    ],
)
def test_what_no_decoder_would_take_is_not_encoded(broken):
    with pytest.raises(ValueError, match=r"\w"):
        encode_frame(IDENT, (0, 1), broken)


def test_headers_of_full_frames_fit_with_the_longest_names():
    ident = FrameIdent(
        request_id="r" * 256,
        epoch=2**64 - 1,
        tenant="t" * 256,
        model_fingerprint="m" * 256,
        recipe_fingerprint="c" * 256,
    )
    many = [tensor((1,), name="n" * 64, index=i, layer_tensors=512, layer=2**20) for i in range(512)]
    assert len(decode_frame(encode_frame(ident, (0, 2**32 - 1), many)).tensors) == 512


def test_enumerations_are_those_of_the_wire():
    assert {kind.name: kind.value for kind in Kind} | {"KIND_UNSPECIFIED": 0} == dict(frame_pb2.Kind.items())
    assert {d.name: d.value for d in DType} | {"DTYPE_UNSPECIFIED": 0} == dict(frame_pb2.DType.items())
