"""What frames and manifests share on the wire: magic, format version, header length, checksum.

    magic [4] | format version u32 | header length u32 | header | body | xxh3-64 of everything before it, u64

Integers are little-endian. Opening is total: any bytes give a header and a body, or `CorruptFrame` with one of the
messages of `Fault`. The checksum is verified before a caller sees anything, and lengths before the checksum.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import StrEnum

import xxhash

from ..errors import CorruptFrame

FORMAT_VERSION = 1
PREFIX_BYTES = 12
TRAILER_BYTES = 8

_PREFIX = struct.Struct("<4sII")
_TRAILER = struct.Struct("<Q")


class Fault(StrEnum):
    """Everything that can be wrong with the bytes of a frame or manifest. The texts are public and say no more."""

    # the envelope
    TOO_SHORT = "shorter than the smallest one"
    TOO_LONG = "longer than the limit"
    MAGIC = "does not begin with the magic number"
    VERSION = "format version is not supported"
    HEADER_BOUND = "header is longer than the limit"
    HEADER_RANGE = "header reaches beyond the end"
    CHECKSUM = "checksum does not match"
    HEADER_PARSE = "header cannot be parsed"
    # the header as a whole
    IDENTITY = "an identity is empty or longer than the limit"
    RANGE = "a range ends before it begins"
    NO_TENSORS = "holds no tensors"
    TENSOR_COUNT = "more tensors than the limit"
    SUMMARY = "kind or layers contradict the tensors"
    LENGTH = "length contradicts the header"
    PADDING = "padding is not zero"
    # one tensor
    NAME = "a tensor's name is empty or longer than the limit"
    KIND = "a tensor's kind is unknown"
    DTYPE = "a tensor's dtype is unknown"
    RANK = "a tensor has no axis or more than the limit"
    ELEMENTS = "a tensor has more elements than the limit"
    SLICE = "a slice lies outside its tensor or is empty"
    INDEX = "a tensor's index lies outside its layer or the layer has too many tensors"
    MISALIGNED = "a tensor is misaligned"
    OVERLAP = "tensors overlap or are out of order"
    GAP = "a gap between tensors"
    PAYLOAD_RANGE = "a tensor reaches beyond the payload"
    # a manifest
    PROMPT = "no prompt ids or more than the limit"
    CHOICES = "choices are missing, misnumbered or more than the limit"
    EMITTED = "more emitted tokens or log-probabilities than the limit"
    FINISH = "a finish reason is unknown"
    LOGPROB = "a log-probability is not a number"
    RECIPE = "the recipe is longer than the limit"
    FRAMES = "no frames or more than the limit"
    ENTRY = "a frame's entry is not valid or stands twice"
    # a continuation
    BASE = "the name of the manifest that it continues is not valid"
    ROWS = "rows of a choice that is not there, or that do not follow each other"
    # a sequence against its manifest
    MISSING = "a frame that the manifest names is missing"
    UNNAMED = "a frame that the manifest does not name"
    DIFFERENT = "a frame's size or hash is not what the manifest says"
    # layers put together from frames
    LAYER_RANGE = "a tensor of a layer that the model does not have"
    DUPLICATE = "a slice arrived twice or overlaps another"
    INCONSISTENT = "slices of one tensor contradict each other"
    ANNOUNCED_BOUND = "more bytes than were announced"
    SCATTERED = "slices lie too far apart"


def corrupt(what: str, fault: Fault) -> CorruptFrame:
    """The error for a fault of a `frame`, `manifest`, `sequence` or `layer`."""
    return CorruptFrame(f"corrupt {what}: {fault.value}")


@dataclass(frozen=True)
class Opened:
    """A sound envelope.

    Attributes:
        header: its bytes, copied; bounded by the caller's limit.
        body: read-only view of what lies between header and checksum.
        body_begin: where the body starts in the data.
        checksum: xxh3-64 that ends the data.
    """

    header: bytes
    body: memoryview
    body_begin: int
    checksum: int


def seal(magic: bytes, header: bytes, *body: bytes | memoryview) -> bytes:
    """Magic, version, length, header and body parts, ended by the checksum. Copies every part once."""
    prefix = _PREFIX.pack(magic, FORMAT_VERSION, len(header))
    parts = (prefix, header, *body)
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return b"".join((*parts, _TRAILER.pack(digest.intdigest())))


def open_envelope(
    what: str, magic: bytes, data: bytes | bytearray | memoryview, max_bytes: int, max_header_bytes: int
) -> Opened:
    """Check lengths, magic, version and checksum. Allocates at most `max_header_bytes`.

    Raises:
        CorruptFrame: with one of the envelope's faults.
    """
    view = memoryview(data).toreadonly().cast("B")
    if len(view) < PREFIX_BYTES + TRAILER_BYTES:
        raise corrupt(what, Fault.TOO_SHORT)
    if len(view) > max_bytes:
        raise corrupt(what, Fault.TOO_LONG)
    found, version, header_bytes = _PREFIX.unpack_from(view)
    if found != magic:
        raise corrupt(what, Fault.MAGIC)
    if version != FORMAT_VERSION:
        raise corrupt(what, Fault.VERSION)
    if header_bytes > max_header_bytes:
        raise corrupt(what, Fault.HEADER_BOUND)
    body_begin, body_end = PREFIX_BYTES + header_bytes, len(view) - TRAILER_BYTES
    if body_begin > body_end:
        raise corrupt(what, Fault.HEADER_RANGE)
    (checksum,) = _TRAILER.unpack_from(view, body_end)
    if xxhash.xxh3_64_intdigest(view[:body_end]) != checksum:
        raise corrupt(what, Fault.CHECKSUM)
    return Opened(bytes(view[PREFIX_BYTES:body_begin]), view[body_begin:body_end], body_begin, checksum)


def checksum_of(data: bytes) -> int:
    """The checksum that ends an envelope of at least eight bytes, unverified."""
    (checksum,) = _TRAILER.unpack_from(data, len(data) - TRAILER_BYTES)
    return int(checksum)
