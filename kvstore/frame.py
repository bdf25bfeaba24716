"""Frames: the one form in which KV travels, lies in a cold tier and is read by decode. Layout: `protos/frame.proto`.

Encoding is deterministic: the same content gives the same bytes. Decoding is total and copies no payload: any bytes
give a `Frame`, whose tensors are views of them, or `CorruptFrame`. Every length that the header claims is checked
against `FrameLimits` and against the bytes that are really there; nothing is allocated for what is only claimed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from google.protobuf.message import DecodeError

from ..errors import CorruptFrame
from ..protos import frame_pb2
from .envelope import FORMAT_VERSION, PREFIX_BYTES, TRAILER_BYTES, Fault, corrupt, open_envelope, seal
from .identity import FrameIdent, ModelFingerprint, RecipeFingerprint, RequestId, TenantId

MAGIC = b"KVSF"
PAYLOAD_ALIGN = 64
TENSOR_ALIGN = 16


class Kind(IntEnum):
    """What a tensor is, or that a frame holds several; the numbers are those of `frame.proto`."""

    KEYS = 1
    VALUES = 2
    BASIS = 3
    OUTLIERS = 4
    POSITIONS = 5
    HIDDEN = 6
    TAIL = 7
    PACKED = 8


class DType(IntEnum):
    """Element types that may be sent; the numbers are those of `frame.proto`. All are little-endian."""

    UINT8 = 1
    INT8 = 2
    INT32 = 3
    FLOAT16 = 4
    BFLOAT16 = 5
    FLOAT32 = 6
    FLOAT8_E4M3 = 7

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return _ITEMSIZE[self]


_ITEMSIZE = {
    DType.UINT8: 1,
    DType.INT8: 1,
    DType.INT32: 4,
    DType.FLOAT16: 2,
    DType.BFLOAT16: 2,
    DType.FLOAT32: 4,
    DType.FLOAT8_E4M3: 1,
}


@dataclass(frozen=True)
class FrameLimits:
    """What a decoder is willing to look at.

    Attributes:
        max_header_bytes: protobuf header.
        max_payload_bytes: payload, padding included.
        max_tensors: tensors a frame, and tensors a layer.
        max_rank: axes a tensor.
        max_elements: elements of a whole tensor of which a frame holds a slice; an axis of length 0 counts as 1.
        max_name_bytes: a tensor's name in UTF-8.
        max_id_bytes: request id, tenant, each fingerprint in UTF-8.
    """

    max_header_bytes: int = 64 * 1024
    max_payload_bytes: int = 4 * 1024 * 1024
    max_tensors: int = 512
    max_rank: int = 8
    max_elements: int = 1 << 30
    max_name_bytes: int = 64
    max_id_bytes: int = 256

    @property
    def max_frame_bytes(self) -> int:
        """Bytes of the longest frame within the limits; what a message or a stored value must have room for."""
        return PREFIX_BYTES + self.max_header_bytes + PAYLOAD_ALIGN + self.max_payload_bytes + TRAILER_BYTES


DEFAULT_LIMITS = FrameLimits()


@dataclass(frozen=True)
class TensorSlice:
    """Rows [begin, begin + shape[0]) along axis 0 of one tensor of a layer.

    Attributes:
        layer: of the model.
        kind: which part of the layer's cache; never PACKED.
        name: within the part.
        dtype: of the elements.
        shape: of the slice; shape[0] rows.
        begin: first row.
        total: rows of the whole tensor.
        index: which of the layer's tensors, in the recipe's order.
        layer_tensors: tensors of the whole layer.
        data: the rows, dense and row-major; decoding gives a read-only view of the frame's bytes.
    """

    layer: int
    kind: Kind
    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    total: int
    index: int
    layer_tensors: int
    data: memoryview

    @property
    def row_nbytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Of the slice."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Frame:
    """A decoded frame.

    Attributes:
        ident: whom it belongs to.
        kind: of all its tensors, or PACKED.
        layers: half-open range of layers.
        tokens: half-open range of prompt positions that it speaks of.
        tensors: in the order of the payload.
        size_bytes: of the whole frame.
        checksum: xxh3-64 that ends it.
    """

    ident: FrameIdent
    kind: Kind
    layers: tuple[int, int]
    tokens: tuple[int, int]
    tensors: tuple[TensorSlice, ...]
    size_bytes: int
    checksum: int


def aligned(offset: int, alignment: int = TENSOR_ALIGN) -> int:
    """The next multiple of `alignment`, or `offset` where it is one."""
    return -(-offset // alignment) * alignment


def encode_frame(
    ident: FrameIdent,
    tokens: tuple[int, int],
    tensors: Sequence[TensorSlice],
    limits: FrameLimits = DEFAULT_LIMITS,
) -> bytes:
    """One frame with these tensors. Copies their data once.

    Args:
        ident: whom it belongs to.
        tokens: half-open range of prompt positions that the frame speaks of.
        tensors: at least one; their `data` is any contiguous buffer.
        limits: what the receiver decodes with.

    Raises:
        ValueError: a decoder with these limits would refuse the frame; the message says why.
    """
    raw, offsets, _ = _planned(ident, tokens, tensors, limits)
    body: list[bytes | memoryview] = []
    end = 0
    for offset, tensor in zip(offsets, tensors, strict=True):
        if tensor.data.nbytes != tensor.nbytes:
            raise ValueError(f"tensor {tensor.name!r}: {tensor.data.nbytes} bytes do not fill the shape {tensor.shape}")
        body += [bytes(offset - end), tensor.data]
        end = offset + tensor.data.nbytes
    header_end = PREFIX_BYTES + len(raw)
    return seal(MAGIC, raw, bytes(aligned(header_end, PAYLOAD_ALIGN) - header_end), *body)


def frame_nbytes(
    ident: FrameIdent,
    tokens: tuple[int, int],
    tensors: Sequence[TensorSlice],
    limits: FrameLimits = DEFAULT_LIMITS,
) -> int:
    """Bytes of the frame that `encode_frame` would make; the tensors need no data. Raises what it would."""
    raw, _, payload_bytes = _planned(ident, tokens, tensors, limits)
    return aligned(PREFIX_BYTES + len(raw), PAYLOAD_ALIGN) + payload_bytes + TRAILER_BYTES


def _planned(
    ident: FrameIdent, tokens: tuple[int, int], tensors: Sequence[TensorSlice], limits: FrameLimits
) -> tuple[bytes, list[int], int]:
    """The header, where each tensor begins in the payload, and the payload's bytes."""
    header, offsets, end = _header(ident, tokens, tensors), [], 0
    for spec, tensor in zip(header.tensors, tensors, strict=True):
        spec.offset = aligned(end)
        offsets.append(spec.offset)
        end = spec.offset + tensor.nbytes
    header.payload_bytes = end
    try:
        _check_header(header, limits)
    except CorruptFrame as exc:
        raise ValueError(f"cannot be encoded: {exc.message}") from exc
    raw = header.SerializeToString(deterministic=True)
    if len(raw) > limits.max_header_bytes:
        raise ValueError(f"cannot be encoded: {Fault.HEADER_BOUND.value}")
    return raw, offsets, end


def _header(ident: FrameIdent, tokens: tuple[int, int], tensors: Sequence[TensorSlice]) -> frame_pb2.FrameHeader:
    if not tensors:
        raise ValueError("cannot be encoded: a frame holds at least one tensor")
    header = frame_pb2.FrameHeader(
        format_version=FORMAT_VERSION,
        request_id=ident.request_id,
        epoch=ident.epoch,
        tenant=ident.tenant,
        model_fingerprint=ident.model_fingerprint,
        recipe_fingerprint=ident.recipe_fingerprint,
        token_begin=tokens[0],
        token_end=tokens[1],
        tensors=[
            frame_pb2.TensorSpec(
                name=tensor.name,
                dtype=int(tensor.dtype),  # type: ignore[arg-type]
                shape=tensor.shape,
                kind=int(tensor.kind),  # type: ignore[arg-type]
                layer=tensor.layer,
                begin=tensor.begin,
                total=tensor.total,
                index=tensor.index,
                layer_tensors=tensor.layer_tensors,
            )
            for tensor in tensors
        ],
    )
    header.kind, header.layer_begin, header.layer_end = _summary(header)
    return header


def _summary(header: frame_pb2.FrameHeader) -> tuple[frame_pb2.Kind, int, int]:
    """Kind and half-open layer range that the tensors of a header, at least one, amount to."""
    kinds = {spec.kind for spec in header.tensors}
    layers = [spec.layer for spec in header.tensors]
    return (kinds.pop() if len(kinds) == 1 else frame_pb2.PACKED), min(layers), max(layers) + 1


def decode_frame(data: bytes | bytearray | memoryview, limits: FrameLimits = DEFAULT_LIMITS) -> Frame:
    """The frame that `data` is. Its tensors are read-only views of `data`, which must not change afterwards.

    Raises:
        CorruptFrame: `data` is no sound frame within the limits; the message is one of a closed set.
    """
    opened = open_envelope("frame", MAGIC, data, limits.max_frame_bytes, limits.max_header_bytes)
    header = frame_pb2.FrameHeader()
    try:
        header.ParseFromString(opened.header)
    except DecodeError as exc:
        raise corrupt("frame", Fault.HEADER_PARSE) from exc
    _check_header(header, limits)
    pad = aligned(opened.body_begin, PAYLOAD_ALIGN) - opened.body_begin
    if len(opened.body) != pad + header.payload_bytes:
        raise corrupt("frame", Fault.LENGTH)
    payload = opened.body[pad:]
    tensors = []
    padding, end = [opened.body[:pad]], 0
    for spec in header.tensors:
        tensor = _tensor(spec, payload)
        tensors.append(tensor)
        padding.append(payload[end : spec.offset])
        end = spec.offset + tensor.data.nbytes
    if any(any(gap) for gap in padding):
        raise corrupt("frame", Fault.PADDING)
    return Frame(
        ident=header_ident(header),
        kind=Kind(header.kind),
        layers=(header.layer_begin, header.layer_end),
        tokens=(header.token_begin, header.token_end),
        tensors=tuple(tensors),
        size_bytes=memoryview(data).nbytes,
        checksum=opened.checksum,
    )


def header_ident(header: frame_pb2.FrameHeader | frame_pb2.Manifest | frame_pb2.Continuation) -> FrameIdent:
    """The identity fields that frames, manifests and continuations share."""
    return FrameIdent(
        request_id=RequestId(header.request_id),
        epoch=header.epoch,
        tenant=TenantId(header.tenant),
        model_fingerprint=ModelFingerprint(header.model_fingerprint),
        recipe_fingerprint=RecipeFingerprint(header.recipe_fingerprint),
    )


def ident_is_sound(ident: FrameIdent, max_id_bytes: int) -> bool:
    """Whether no identity is too long, and none but the tenant's is empty."""
    needed = (ident.request_id, ident.model_fingerprint, ident.recipe_fingerprint)
    return all(needed) and all(len(text.encode()) <= max_id_bytes for text in (*needed, ident.tenant))


def _tensor(spec: frame_pb2.TensorSpec, payload: memoryview) -> TensorSlice:
    """A tensor whose spec has been checked."""
    dtype, shape = DType(spec.dtype), tuple(spec.shape)
    return TensorSlice(
        layer=spec.layer,
        kind=Kind(spec.kind),
        name=spec.name,
        dtype=dtype,
        shape=shape,
        begin=spec.begin,
        total=spec.total,
        index=spec.index,
        layer_tensors=spec.layer_tensors,
        data=payload[spec.offset : spec.offset + math.prod(shape) * dtype.itemsize],
    )


def _check_header(header: frame_pb2.FrameHeader, limits: FrameLimits) -> None:
    """Refuse a header that breaks a limit or contradicts itself, at a cost bounded by the header's own length."""
    if header.format_version != FORMAT_VERSION:
        raise corrupt("frame", Fault.VERSION)
    if not ident_is_sound(header_ident(header), limits.max_id_bytes):
        raise corrupt("frame", Fault.IDENTITY)
    if header.token_begin > header.token_end:
        raise corrupt("frame", Fault.RANGE)
    if header.payload_bytes > limits.max_payload_bytes:
        raise corrupt("frame", Fault.TOO_LONG)
    if not header.tensors:
        raise corrupt("frame", Fault.NO_TENSORS)
    if len(header.tensors) > limits.max_tensors:
        raise corrupt("frame", Fault.TENSOR_COUNT)
    end = 0
    for spec in header.tensors:
        fault = _spec_fault(spec, limits) or _place_fault(spec, end, header.payload_bytes)
        if fault is not None:
            raise corrupt("frame", fault)
        end = spec.offset + _nbytes(spec)
    if end != header.payload_bytes:
        raise corrupt("frame", Fault.LENGTH)
    if (header.kind, header.layer_begin, header.layer_end) != _summary(header):
        raise corrupt("frame", Fault.SUMMARY)


def _nbytes(spec: frame_pb2.TensorSpec) -> int:
    return math.prod(spec.shape) * DType(spec.dtype).itemsize


def _spec_fault(spec: frame_pb2.TensorSpec, limits: FrameLimits) -> Fault | None:
    """What is wrong with a tensor by itself."""
    if not 0 < len(spec.name.encode()) <= limits.max_name_bytes:
        return Fault.NAME
    if not Kind.KEYS <= spec.kind < Kind.PACKED:
        return Fault.KIND
    if not DType.UINT8 <= spec.dtype <= DType.FLOAT8_E4M3:
        return Fault.DTYPE
    if not 1 <= len(spec.shape) <= limits.max_rank:
        return Fault.RANK
    rows, row_elements = spec.shape[0], math.prod(spec.shape[1:])
    if math.prod(max(axis, 1) for axis in (spec.total, *spec.shape[1:])) > limits.max_elements:
        return Fault.ELEMENTS
    # rows without bytes must come all at once: nothing else would bound how many slices a tensor has
    whole = rows == spec.total and spec.begin == 0
    if spec.begin + rows > spec.total or (not whole and rows * row_elements == 0):
        return Fault.SLICE
    if not spec.index < spec.layer_tensors <= limits.max_tensors:
        return Fault.INDEX
    return None


def _place_fault(spec: frame_pb2.TensorSpec, end: int, payload_bytes: int) -> Fault | None:
    """What is wrong with where a tensor lies; `end` is where the one before it ends."""
    if spec.offset % TENSOR_ALIGN:
        return Fault.MISALIGNED
    if spec.offset < end:
        return Fault.OVERLAP
    if spec.offset > aligned(end):
        return Fault.GAP
    if spec.offset + _nbytes(spec) > payload_bytes:
        return Fault.PAYLOAD_RANGE
    return None
