"""Who a piece of KV belongs to, and the key names that follow from it.

Key names carry tenant, model and recipe identity, so nothing that one of them made is ever found by another. They
hold no text of a request: identities enter by SHA-256 over length-prefixed parts, so no choice of parts can imitate
another.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NewType

RequestId = NewType("RequestId", str)
TenantId = NewType("TenantId", str)
ModelFingerprint = NewType("ModelFingerprint", str)
RecipeFingerprint = NewType("RecipeFingerprint", str)

SequenceKey = NewType("SequenceKey", str)
"""Names a sequence of a tenant under one model and recipe, in all its epochs: 64 hex digits."""

StoreKey = NewType("StoreKey", str)
"""Names an immutable value of a store."""
FrameKey = NewType("FrameKey", StoreKey)
ManifestKey = NewType("ManifestKey", StoreKey)
"""Names a manifest or a continuation."""
HeadKey = NewType("HeadKey", str)
"""Names the one value of a sequence that changes: which epoch and manifest are current."""


@dataclass(frozen=True, kw_only=True)
class FrameIdent:
    """Whom a frame or a manifest belongs to; a receiver takes nothing that differs in any field.

    Attributes:
        request_id: request or session.
        epoch: counts the owners of the sequence; what an older owner wrote is never mixed with newer frames.
        tenant: whose data it is.
        model_fingerprint: of the model's configuration and weights.
        recipe_fingerprint: of the effective recipe.
    """

    request_id: RequestId
    epoch: int
    tenant: TenantId
    model_fingerprint: ModelFingerprint
    recipe_fingerprint: RecipeFingerprint


def content_key(purpose: str, *parts: str | bytes) -> str:
    """SHA-256 over the purpose and the parts, each behind its length as u64 little-endian; 64 hex digits."""
    digest = hashlib.sha256()
    for part in (purpose, *parts):
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()


def sequence_key(ident: FrameIdent) -> SequenceKey:
    """The sequence that `ident` is about, whatever its epoch."""
    parts = (ident.tenant, ident.model_fingerprint, ident.recipe_fingerprint, ident.request_id)
    return SequenceKey(content_key("sequence", *parts))


FRAMES = "kvsluice:frame:"  # what names of frames begin with


def frame_key(ident: FrameIdent, index: int) -> FrameKey:
    """Name of the frame that was sent as number `index` of its sequence and epoch."""
    return FrameKey(StoreKey(f"{FRAMES}{sequence_key(ident)}:{ident.epoch}:{index}"))


def image_key(ident: FrameIdent, number: int, index: int) -> StoreKey:
    """Name of a piece of a running request's memory, which its worker has put away for the `number`-th time."""
    return StoreKey(f"kvsluice:image:{sequence_key(ident)}:{ident.epoch}:{number}:{index}")


def manifest_key(ident: FrameIdent) -> ManifestKey:
    """Name of the manifest of a sequence and epoch."""
    return ManifestKey(StoreKey(f"kvsluice:manifest:{sequence_key(ident)}:{ident.epoch}"))


def continuation_key(ident: FrameIdent, version: int) -> ManifestKey:
    """Name of the `version`-th continuation of a sequence and epoch."""
    return ManifestKey(StoreKey(f"kvsluice:continuation:{sequence_key(ident)}:{ident.epoch}:{version}"))


def epoch_of(key: FrameKey | ManifestKey) -> int:
    """The epoch that a name holds."""
    return int(key.split(":")[3])


def head_key(ident: FrameIdent) -> HeadKey:
    """Name of the sequence's head; the same in all epochs."""
    return HeadKey(f"kvsluice:head:{sequence_key(ident)}")


def tenant_sessions(tenant: TenantId) -> str:
    """What the names of all sessions of a tenant begin with."""
    return f"kvsluice:session:{content_key('tenant', tenant)}:"


def session_key(tenant: TenantId, session_id: str) -> HeadKey:
    """Name of a session's head."""
    return HeadKey(tenant_sessions(tenant) + content_key("session", session_id))


def session_record_key(tenant: TenantId, session_id: str, epoch: int, turn: int) -> ManifestKey:
    """Name of what a session has come to with a turn, which an attempt of this epoch has ended."""
    return ManifestKey(StoreKey(f"kvsluice:record:{content_key('record', tenant, session_id)}:{epoch}:{turn}"))
