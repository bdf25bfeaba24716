"""Manifests: what a whole sequence consists of. Written last, so that a sequence exists whole or not at all.

Encoding is deterministic and decoding total, as for frames; `protos/frame.proto` has the layout. Log-probabilities are
kept in float32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from ..errors import CorruptFrame
from ..protos import frame_pb2
from .envelope import FORMAT_VERSION, Fault, corrupt, open_envelope, seal
from .frame import DEFAULT_LIMITS, Frame, Kind, header_ident, ident_is_sound
from .identity import FrameIdent, FrameKey, StoreKey

MAGIC = b"KVSM"
FINISH_REASONS = ("", "stop", "length")
_FRAME_KEY = re.compile(r"kvsluice:frame:[0-9a-f]{64}:[0-9]{1,20}:[0-9]{1,10}", re.ASCII)


@dataclass(frozen=True)
class ManifestLimits:
    """What a decoder is willing to look at.

    Attributes:
        max_bytes: the whole manifest. Parsing one of tiny fields takes up to about 32 times its size.
        max_prompt_ids: tokens of the prompt.
        max_choices: choices of the request.
        max_emitted: tokens that all choices together have emitted.
        max_top_logprobs: alternatives of one token.
        max_recipe_bytes: the recipe's JSON in UTF-8.
        max_frames: frames that it names.
        max_frame_bytes: of one of them.
        max_id_bytes: request id, tenant, each fingerprint in UTF-8.
    """

    max_bytes: int = 4 * 1024 * 1024
    max_prompt_ids: int = 1 << 20
    max_choices: int = 128
    max_emitted: int = 1 << 20
    max_top_logprobs: int = 64
    max_recipe_bytes: int = 64 * 1024
    max_frames: int = 1 << 15
    max_frame_bytes: int = DEFAULT_LIMITS.max_frame_bytes
    max_id_bytes: int = DEFAULT_LIMITS.max_id_bytes


DEFAULT_MANIFEST_LIMITS = ManifestLimits()


@dataclass(frozen=True)
class EmittedToken:
    """A sampled token, with its log-probability and the best alternatives where they were asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class ChoiceState:
    """What one choice has emitted so far; `finish_reason` is empty while it goes on, else stop or length."""

    emitted: tuple[EmittedToken, ...]
    finish_reason: str = ""


@dataclass(frozen=True)
class FrameEntry:
    """A frame as a manifest names it.

    Attributes:
        key: its name in a store.
        size_bytes: of the whole frame.
        checksum: xxh3-64 that ends it.
        kind: of all its tensors, or PACKED.
        layers: half-open range of layers.
    """

    key: FrameKey
    size_bytes: int
    checksum: int
    kind: Kind
    layers: tuple[int, int]


@dataclass(frozen=True)
class Manifest:
    """A whole sequence.

    Attributes:
        ident: whom it belongs to.
        recipe_json: the effective recipe, all numbers resolved.
        prompt_ids: tokens of the prompt.
        choices: by index.
        seed: random numbers are a function of (seed, choice, position).
        frames: in the order in which they were sent.
    """

    ident: FrameIdent
    recipe_json: str
    prompt_ids: tuple[int, ...]
    choices: tuple[ChoiceState, ...]
    seed: int
    frames: tuple[FrameEntry, ...]


def frame_entry(key: FrameKey, frame: Frame) -> FrameEntry:
    """What a manifest says of a frame that is stored or sent under this name."""
    return FrameEntry(key, frame.size_bytes, frame.checksum, frame.kind, frame.layers)


def verify(manifest: Manifest, received: Iterable[FrameEntry]) -> None:
    """Check that the frames that are there are the manifest's, all of them and no others; in any order.

    Raises:
        CorruptFrame: a frame is missing, unnamed, twice there or another one than the manifest means.
    """
    wanted = {entry.key: entry for entry in manifest.frames}
    for entry in received:
        if entry.key not in wanted:
            raise corrupt("sequence", Fault.UNNAMED)
        if wanted.pop(entry.key) != entry:
            raise corrupt("sequence", Fault.DIFFERENT)
    if wanted:
        raise corrupt("sequence", Fault.MISSING)


def encode_manifest(manifest: Manifest, limits: ManifestLimits = DEFAULT_MANIFEST_LIMITS) -> bytes:
    """The manifest as one message or one stored value.

    Raises:
        ValueError: a decoder with these limits would refuse it; the message says why.
    """
    message = frame_pb2.Manifest(
        format_version=FORMAT_VERSION,
        request_id=manifest.ident.request_id,
        epoch=manifest.ident.epoch,
        tenant=manifest.ident.tenant,
        model_fingerprint=manifest.ident.model_fingerprint,
        recipe_fingerprint=manifest.ident.recipe_fingerprint,
        recipe_json=manifest.recipe_json,
        prompt_ids=manifest.prompt_ids,
        choices=[_choice_message(index, choice) for index, choice in enumerate(manifest.choices)],
        seed=manifest.seed,
        frames=[entry_message(entry) for entry in manifest.frames],
    )
    try:
        _check(message, limits)
    except CorruptFrame as exc:
        raise ValueError(f"cannot be encoded: {exc.message}") from exc
    data = seal(MAGIC, message.SerializeToString(deterministic=True))
    if len(data) > limits.max_bytes:
        raise ValueError(f"cannot be encoded: {Fault.TOO_LONG.value}")
    return data


def decode_manifest(data: bytes | bytearray | memoryview, limits: ManifestLimits = DEFAULT_MANIFEST_LIMITS) -> Manifest:
    """The manifest that `data` is.

    Raises:
        CorruptFrame: `data` is no sound manifest within the limits; the message is one of a closed set.
    """
    opened = open_envelope("manifest", MAGIC, data, limits.max_bytes, limits.max_bytes)
    if opened.body:
        raise corrupt("manifest", Fault.LENGTH)
    message = frame_pb2.Manifest()
    try:
        message.ParseFromString(opened.header)
    except DecodeError as exc:
        raise corrupt("manifest", Fault.HEADER_PARSE) from exc
    _check(message, limits)
    return Manifest(
        ident=header_ident(message),
        recipe_json=message.recipe_json,
        prompt_ids=tuple(message.prompt_ids),
        choices=tuple(_choice(choice) for choice in message.choices),
        seed=message.seed,
        frames=tuple(read_entry(entry) for entry in message.frames),
    )


def _choice_message(index: int, choice: ChoiceState) -> frame_pb2.ChoiceState:
    emitted = [
        frame_pb2.SampledToken(
            token_id=token.token_id,
            logprob=token.logprob,
            top_logprobs=[frame_pb2.TokenLogprob(token_id=t, logprob=logprob) for t, logprob in token.top],
        )
        for token in choice.emitted
    ]
    return frame_pb2.ChoiceState(index=index, emitted=emitted, finish_reason=choice.finish_reason)


def _choice(message: frame_pb2.ChoiceState) -> ChoiceState:
    emitted = tuple(
        EmittedToken(
            token_id=token.token_id,
            logprob=token.logprob if token.HasField("logprob") else None,
            top=tuple((t.token_id, t.logprob) for t in token.top_logprobs),
        )
        for token in message.emitted
    )
    return ChoiceState(emitted, message.finish_reason)


def entry_message(entry: FrameEntry) -> frame_pb2.ManifestEntry:
    """An entry as it is encoded."""
    return frame_pb2.ManifestEntry(
        key=entry.key,
        size=entry.size_bytes,
        xxh3=entry.checksum,
        kind=int(entry.kind),  # type: ignore[arg-type]
        layer_begin=entry.layers[0],
        layer_end=entry.layers[1],
    )


def read_entry(message: frame_pb2.ManifestEntry) -> FrameEntry:
    """An entry that has been checked."""
    return FrameEntry(
        key=FrameKey(StoreKey(message.key)),
        size_bytes=message.size,
        checksum=message.xxh3,
        kind=Kind(message.kind),
        layers=(message.layer_begin, message.layer_end),
    )


def _check(message: frame_pb2.Manifest, limits: ManifestLimits) -> None:
    """Refuse what breaks a limit or contradicts itself, at a cost bounded by the manifest's own length."""
    if message.format_version != FORMAT_VERSION:
        raise corrupt("manifest", Fault.VERSION)
    if not ident_is_sound(header_ident(message), limits.max_id_bytes):
        raise corrupt("manifest", Fault.IDENTITY)
    if len(message.recipe_json.encode()) > limits.max_recipe_bytes:
        raise corrupt("manifest", Fault.RECIPE)
    if not 0 < len(message.prompt_ids) <= limits.max_prompt_ids:
        raise corrupt("manifest", Fault.PROMPT)
    indices = [choice.index for choice in message.choices[: limits.max_choices + 1]]
    if not 0 < len(indices) <= limits.max_choices or indices != list(range(len(indices))):
        raise corrupt("manifest", Fault.CHOICES)
    if sum(len(choice.emitted) for choice in message.choices) > limits.max_emitted:
        raise corrupt("manifest", Fault.EMITTED)
    for choice in message.choices:
        fault = _choice_fault(choice, limits)
        if fault is not None:
            raise corrupt("manifest", fault)
    if not 0 < len(message.frames) <= limits.max_frames:
        raise corrupt("manifest", Fault.FRAMES)
    keys = {entry.key for entry in message.frames}
    if len(keys) != len(message.frames) or not all(entry_is_sound(entry, limits) for entry in message.frames):
        raise corrupt("manifest", Fault.ENTRY)


def _choice_fault(choice: frame_pb2.ChoiceState, limits: ManifestLimits) -> Fault | None:
    if choice.finish_reason not in FINISH_REASONS:
        return Fault.FINISH
    for token in choice.emitted:
        if len(token.top_logprobs) > limits.max_top_logprobs:
            return Fault.EMITTED
        if math.isnan(token.logprob) or any(math.isnan(top.logprob) for top in token.top_logprobs):
            return Fault.LOGPROB
    return None


def entry_is_sound(entry: frame_pb2.ManifestEntry, limits: ManifestLimits) -> bool:
    """Whether an entry's name, size, kind and layers can be."""
    return (
        _FRAME_KEY.fullmatch(entry.key) is not None
        and 0 < entry.size <= limits.max_frame_bytes
        and Kind.KEYS <= entry.kind <= Kind.PACKED
        and entry.layer_begin < entry.layer_end
    )
