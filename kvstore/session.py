"""Sessions: conversations that are continued by their id, and how they lie in a store.

    session's head ──> record: what has been said, as token ids, and under which model and recipe

The record says what belongs to the conversation. The cache of it is a sequence like any other (`sequences.py`), under
the name that `sequence_id` gives; it may hold more than the record, or less, and what is missing is computed again. A
turn counts once its record is written: a head changes by compare-and-set, so of two turns that run at once, one counts.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import NamedTuple

from google.protobuf.message import DecodeError

from ..errors import CorruptFrame, Fenced, StoreUnavailable
from ..protos import frame_pb2
from .envelope import FORMAT_VERSION, Fault, corrupt, open_envelope, seal
from .identity import HeadKey, RequestId, TenantId, session_key, session_record_key, tenant_sessions
from .manifest import DEFAULT_MANIFEST_LIMITS, ManifestLimits
from .store import Head, HeadWrite, Store

MAGIC = b"KVSS"
RECORD_TTL_FACTOR = 1.25  # by which a record outlives the head that names it
# no request's own id begins so: they hold no spaces
_SEQUENCE = "session "


@dataclass(frozen=True)
class Session:
    """A conversation between two turns.

    Attributes:
        model_fingerprint: of the model that it was begun with.
        recipe_name: as it was asked for.
        recipe_json: the effective recipe, all numbers resolved.
        is_chat: it was begun with messages, and goes on with such.
        epoch: of the attempt that ended the last turn; later ones' are above it.
        num_turns: at least one.
        prompt_ids: what was prefilled.
        history_ids: answers and later turns behind it.
        begun_unix_s, used_unix_s: when the first turn and the last one ended.
        stored_bytes: what the turns have written of its cache.
    """

    session_id: str
    tenant: TenantId
    model_fingerprint: str
    recipe_name: str
    recipe_json: str
    is_chat: bool
    epoch: int
    num_turns: int
    prompt_ids: tuple[int, ...]
    history_ids: tuple[int, ...]
    begun_unix_s: float
    used_unix_s: float
    stored_bytes: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.history_ids)


def sequence_id(session_id: str) -> RequestId:
    """What workers and the store call the sequence of a session."""
    return RequestId(_SEQUENCE + session_id)


def encode_session(session: Session) -> bytes:
    """The record as one stored value; equal sessions give equal bytes."""
    message = frame_pb2.Session(format_version=FORMAT_VERSION)
    for name in session.__dataclass_fields__:
        value = getattr(session, name)
        if isinstance(value, tuple):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return seal(MAGIC, message.SerializeToString(deterministic=True))


def decode_session(data: bytes, limits: ManifestLimits = DEFAULT_MANIFEST_LIMITS) -> Session:
    """The session that `data` is.

    Raises:
        CorruptFrame: `data` is no sound record within the limits.
    """
    opened = open_envelope("session", MAGIC, data, 2 * limits.max_bytes, 2 * limits.max_bytes)
    if opened.body:
        raise corrupt("session", Fault.LENGTH)
    message = frame_pb2.Session()
    try:
        message.ParseFromString(opened.header)
    except DecodeError as exc:
        raise corrupt("session", Fault.HEADER_PARSE) from exc
    if message.format_version != FORMAT_VERSION:
        raise corrupt("session", Fault.VERSION)
    ids = (message.session_id, message.model_fingerprint)
    if not all(ids) or any(len(one.encode()) > limits.max_id_bytes for one in (*ids, message.tenant)):
        raise corrupt("session", Fault.IDENTITY)
    if len(message.recipe_json.encode()) > limits.max_recipe_bytes:
        raise corrupt("session", Fault.RECIPE)
    if not 0 < len(message.prompt_ids) <= limits.max_prompt_ids:
        raise corrupt("session", Fault.PROMPT)
    if len(message.history_ids) > limits.max_emitted or not message.num_turns:
        raise corrupt("session", Fault.EMITTED)
    return Session(
        session_id=message.session_id,
        tenant=TenantId(message.tenant),
        model_fingerprint=message.model_fingerprint,
        recipe_name=message.recipe_name,
        recipe_json=message.recipe_json,
        is_chat=message.is_chat,
        epoch=message.epoch,
        num_turns=message.num_turns,
        prompt_ids=tuple(message.prompt_ids),
        history_ids=tuple(message.history_ids),
        begun_unix_s=message.begun_unix_s,
        used_unix_s=message.used_unix_s,
        stored_bytes=message.stored_bytes,
    )


class Found(NamedTuple):
    """What a store holds under a session's name.

    Attributes:
        head: as it was read; None = there is none. One without a session is what deleting leaves behind.
    """

    head: Head | None
    session: Session | None


class SessionBook:
    """The sessions of a store.

    Every method raises `StoreUnavailable` where the store cannot be reached or has no room.

    Args:
        ttl_s: how long a session lives without a turn.
    """

    def __init__(self, store: Store, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self._store = store

    async def find(self, tenant: TenantId, session_id: str) -> Found:
        """The session of this id. A corrupt record is deleted, and raises `CorruptFrame`."""
        key = session_key(tenant, session_id)
        found = await self._read(key)
        if found.session is not None and (found.session.tenant, found.session.session_id) != (tenant, session_id):
            raise corrupt("session", Fault.IDENTITY)
        return found

    async def write(self, session: Session, before: Head | None) -> None:
        """Make a session what it has come to with another turn.

        Args:
            before: its head when the turn began.

        Raises:
            Fenced: another turn has ended meanwhile.
        """
        name = session_record_key(session.tenant, session.session_id, session.epoch, session.num_turns)
        await self._store.put(name, encode_session(session), self.ttl_s * RECORD_TTL_FACTOR)
        key, head = session_key(session.tenant, session.session_id), Head(session.epoch, name)
        result = await self._store.compare_and_set_head(key, before, head, self.ttl_s)
        if result is HeadWrite.CHANGED and before is not None and await self._store.read_head(key) is None:
            # it expired while the turn ran; nobody else has begun it
            result = await self._store.compare_and_set_head(key, None, head, self.ttl_s)
        if result is not HeadWrite.WRITTEN:
            await self._store.delete(name)
            raise Fenced("another turn of the session has ended meanwhile")
        if before is not None and before.manifest != name:
            with contextlib.suppress(StoreUnavailable):  # the turn counts; what it replaced expires
                await self._store.delete(before.manifest)

    async def delete(self, tenant: TenantId, session_id: str) -> Session | None:
        """Forget a session; its head expires, and leads nowhere. Returns what it was. One that cannot be read is
        deleted as well."""
        key = session_key(tenant, session_id)
        try:
            found = await self._read(key)
        except CorruptFrame:
            return None
        if found.head is not None:
            await self._store.delete(found.head.manifest)
        return found.session

    async def sessions(self, tenant: TenantId) -> list[Session]:
        """A tenant's sessions, those used last first; what cannot be read is left out."""
        found = []
        for name in await self._store.scan(tenant_sessions(tenant)):
            try:
                session = (await self._read(HeadKey(name))).session
            except CorruptFrame:
                continue
            if session is not None and session.tenant == tenant:
                found.append(session)
        return sorted(found, key=lambda one: -one.used_unix_s)

    async def _read(self, key: HeadKey) -> Found:
        head = await self._store.read_head(key)
        data = None if head is None else await self._store.get(head.manifest)
        if head is None or data is None:
            return Found(head, None)
        try:
            return Found(head, decode_session(data))
        except CorruptFrame:
            await self._store.delete(head.manifest)
            raise
