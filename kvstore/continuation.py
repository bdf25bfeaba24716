"""Continuations: how far a sequence has come beyond the prompt that its manifest describes.

A continuation names the manifest that it continues, the tokens behind the prompt, and the frames of generated rows that
are kept. It is small, so that it can be written anew after every few tokens; what it names never changes. Encoding is
deterministic and decoding total, as for manifests.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from ..errors import CorruptFrame
from ..protos import frame_pb2
from .envelope import FORMAT_VERSION, Fault, corrupt, open_envelope, seal
from .frame import header_ident, ident_is_sound
from .identity import FrameIdent, ManifestKey, StoreKey
from .manifest import (
    DEFAULT_MANIFEST_LIMITS,
    FINISH_REASONS,
    FrameEntry,
    ManifestLimits,
    entry_is_sound,
    entry_message,
    read_entry,
)

MAGIC = b"KVSC"
_BASE_KEY = re.compile(r"kvsluice:manifest:[0-9a-f]{64}:[0-9]{1,20}", re.ASCII)


@dataclass(frozen=True)
class ContinuedChoice:
    """One choice: its tokens behind the prompt, and "stop" or "length" when it has ended."""

    token_ids: tuple[int, ...]
    finish_reason: str = ""


@dataclass(frozen=True)
class RowsEntry:
    """Generated rows that are kept, as the choice's cache held them before sealing any of them.

    Attributes:
        choice: whose.
        tokens: half-open range of positions.
        frames: in the order in which they were stored; together all layers.
    """

    choice: int
    tokens: tuple[int, int]
    frames: tuple[FrameEntry, ...]


@dataclass(frozen=True)
class Continuation:
    """A sequence beyond its prompt.

    Attributes:
        ident: whom it belongs to; its epoch is the writer's.
        base: the manifest that it continues, of this or an earlier epoch.
        base_checksum: xxh3-64 that ends the manifest.
        version: counts the continuations of the epoch, from 1.
        choices: by index, as many as the manifest has.
        rows: of every choice in order, each beginning where the one before ends, the first at the prompt's end.
    """

    ident: FrameIdent
    base: ManifestKey
    base_checksum: int
    version: int
    choices: tuple[ContinuedChoice, ...]
    rows: tuple[RowsEntry, ...]

    def rows_of(self, choice: int) -> list[RowsEntry]:
        """What is kept of a choice, ascending."""
        return [entry for entry in self.rows if entry.choice == choice]


def encode_continuation(continuation: Continuation, limits: ManifestLimits = DEFAULT_MANIFEST_LIMITS) -> bytes:
    """The continuation as one stored value.

    Raises:
        ValueError: a decoder with these limits would refuse it; the message says why.
    """
    ident = continuation.ident
    message = frame_pb2.Continuation(
        format_version=FORMAT_VERSION,
        request_id=ident.request_id,
        epoch=ident.epoch,
        tenant=ident.tenant,
        model_fingerprint=ident.model_fingerprint,
        recipe_fingerprint=ident.recipe_fingerprint,
        base=continuation.base,
        base_xxh3=continuation.base_checksum,
        version=continuation.version,
        choices=[
            frame_pb2.ContinuedChoice(token_ids=choice.token_ids, finish_reason=choice.finish_reason)
            for choice in continuation.choices
        ],
        rows=[
            frame_pb2.RowsEntry(
                choice=entry.choice,
                token_begin=entry.tokens[0],
                token_end=entry.tokens[1],
                frames=[entry_message(frame) for frame in entry.frames],
            )
            for entry in continuation.rows
        ],
    )
    try:
        _check(message, limits)
    except CorruptFrame as exc:
        raise ValueError(f"cannot be encoded: {exc.message}") from exc
    data = seal(MAGIC, message.SerializeToString(deterministic=True))
    if len(data) > limits.max_bytes:
        raise ValueError(f"cannot be encoded: {Fault.TOO_LONG.value}")
    return data


def decode_continuation(
    data: bytes | bytearray | memoryview, limits: ManifestLimits = DEFAULT_MANIFEST_LIMITS
) -> Continuation:
    """The continuation that `data` is.

    Raises:
        CorruptFrame: `data` is no sound continuation within the limits; the message is one of a closed set.
    """
    opened = open_envelope("continuation", MAGIC, data, limits.max_bytes, limits.max_bytes)
    if opened.body:
        raise corrupt("continuation", Fault.LENGTH)
    message = frame_pb2.Continuation()
    try:
        message.ParseFromString(opened.header)
    except DecodeError as exc:
        raise corrupt("continuation", Fault.HEADER_PARSE) from exc
    _check(message, limits)
    return Continuation(
        ident=header_ident(message),
        base=ManifestKey(StoreKey(message.base)),
        base_checksum=message.base_xxh3,
        version=message.version,
        choices=tuple(ContinuedChoice(tuple(one.token_ids), one.finish_reason) for one in message.choices),
        rows=tuple(
            RowsEntry(one.choice, (one.token_begin, one.token_end), tuple(read_entry(frame) for frame in one.frames))
            for one in message.rows
        ),
    )


def _check(message: frame_pb2.Continuation, limits: ManifestLimits) -> None:
    """Refuse what breaks a limit or contradicts itself, at a cost bounded by the continuation's own length."""
    if message.format_version != FORMAT_VERSION:
        raise corrupt("continuation", Fault.VERSION)
    if not ident_is_sound(header_ident(message), limits.max_id_bytes):
        raise corrupt("continuation", Fault.IDENTITY)
    if _BASE_KEY.fullmatch(message.base) is None or not message.version:
        raise corrupt("continuation", Fault.BASE)
    if not 0 < len(message.choices) <= limits.max_choices:
        raise corrupt("continuation", Fault.CHOICES)
    if sum(len(choice.token_ids) for choice in message.choices) > limits.max_emitted:
        raise corrupt("continuation", Fault.EMITTED)
    if any(choice.finish_reason not in FINISH_REASONS for choice in message.choices):
        raise corrupt("continuation", Fault.FINISH)
    frames = [frame for entry in message.rows for frame in entry.frames]
    if len(frames) > limits.max_frames:
        raise corrupt("continuation", Fault.FRAMES)
    if len({frame.key for frame in frames}) != len(frames) or not all(entry_is_sound(one, limits) for one in frames):
        raise corrupt("continuation", Fault.ENTRY)
    if not _rows_are_sound(message.rows, len(message.choices)):
        raise corrupt("continuation", Fault.ROWS)


def _rows_are_sound(rows: Sequence[frame_pb2.RowsEntry], num_choices: int) -> bool:
    """Whether each choice's rows have frames and follow each other, and the choices each other."""
    order = [entry.choice for entry in rows]
    if order != sorted(order) or any(choice >= num_choices for choice in order):
        return False
    begins: set[int] = set()
    end, before = 0, -1
    for entry in rows:
        if entry.choice != before:
            begins.add(entry.token_begin)
        elif entry.token_begin != end:
            return False
        if not entry.frames or entry.token_end <= entry.token_begin:
            return False
        before, end = entry.choice, entry.token_end
    return len(begins) <= 1
