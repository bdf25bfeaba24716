"""Conversations that are continued by their id: what a turn begins with, and what it leaves.

    record ──> Turn: prompt, history + what is new ──> the answer ──> record of one more turn

The gateway holds the truth of a conversation as token ids; its cache lies where workers keep it. What a turn adds is
written before its `complete` message: a turn that fails, or is cancelled, leaves the session as it was.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...compression.recipe import ModelShape, Recipe, Resolved
from ...errors import CorruptFrame, DuplicateRequest, KvsluiceError, SessionMismatch, StoreUnavailable
from ...kvstore.identity import FrameIdent, ModelFingerprint, RecipeFingerprint, RequestId, TenantId
from ...kvstore.sequences import delete_sequence
from ...kvstore.session import Session, SessionBook, sequence_id
from ...kvstore.store import Head, Store
from ...protos import generation_pb2 as pb
from ..keys import UNLIMITED, TenantLimits
from ..validation import CheckedRequest, choose_recipe
from .choice import Choice, Detokenizer
from .stored import StoredBytes

log = logging.getLogger("kvsluice.gateway")

MAX_PLACES = 65536  # sessions whose last worker is remembered


class TurnTokenizer(Detokenizer, Protocol):
    """What a turn needs of `models.tokenizer.Tokenizer`."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]: ...
    def continue_chat(self, messages: list[dict[str, str]]) -> list[int]: ...


@dataclass(frozen=True)
class Turn:
    """A turn of a session that is running.

    Attributes:
        tenant: whose session it is.
        session: as the turns before left it; None = this is the first.
        head: the session's when the turn began.
    """

    tenant: TenantId
    session_id: str
    session: Session | None
    head: Head | None

    @property
    def number(self) -> int:
        """From 1."""
        return 1 if self.session is None else self.session.num_turns + 1

    @property
    def epoch(self) -> int:
        """What this turn's epochs have to be above."""
        return 0 if self.head is None else self.head.epoch

    def new_ids(self, checked: CheckedRequest, tokenizer: TurnTokenizer) -> list[int]:
        """What the request adds to the conversation. Text is tokenized by itself: a turn begins with a new token.

        Raises:
            SessionMismatch: messages where the session was begun without, or text where it was begun with such.
            InvalidRequest: the chat template does not take the messages here.
        """
        assert self.session is not None, "a first turn is an ordinary prompt"
        if checked.token_ids is not None:
            return list(checked.token_ids)
        if self.session.is_chat != (checked.messages is not None):
            begun, allowed = ("messages", "chat, token_ids") if self.session.is_chat else ("text", "prompt, token_ids")
            raise SessionMismatch(f"{checked.input_field}: the session was begun with {begun}; allowed: {allowed}")
        if checked.messages is not None:
            return tokenizer.continue_chat(list(checked.messages))
        return tokenizer.encode(checked.prompt or "")

    def recipe(self, checked: CheckedRequest, shape: ModelShape, profile: dict[str, Any]) -> Resolved:
        """The session's recipe.

        Raises:
            SessionMismatch: the request names another one, or the session's is none any more.
        """
        session = self.session
        assert session is not None, "a first turn chooses its own"
        try:
            recipe = Recipe.from_json(session.recipe_json)
            recipe.check_resolved()
        except KvsluiceError as exc:
            raise SessionMismatch("session_id: the session's recipe is not known to this version") from exc
        if checked.recipe_given:
            wanted = choose_recipe(checked, len(session.prompt_ids), shape, profile)
            if wanted.recipe.fingerprint != recipe.fingerprint:
                raise SessionMismatch(
                    f"recipe: {checked.recipe_name} is not what the session was begun with; allowed: "
                    f"{session.recipe_name} with the same slots, or none"
                )
        return Resolved(session.recipe_name, recipe)

    def check_model(self, model_fingerprint: str) -> None:
        """Raises `SessionMismatch` where the session was begun with another model."""
        if self.session is not None and self.session.model_fingerprint != model_fingerprint:
            raise SessionMismatch("session_id: the session was begun with another model, or other weights of it")


class Sessions:
    """The sessions of a service.

    Args:
        ttl_s: how long a session lives without a turn.
        has_store: a store is configured, whether it is there or not.
    """

    def __init__(self, ttl_s: float, has_store: bool) -> None:
        self.ttl_s, self._has_store = ttl_s, has_store
        self._store: Store | None = None
        self._book: SessionBook | None = None
        self._running: set[tuple[TenantId, str]] = set()
        self._places: OrderedDict[tuple[TenantId, str], str] = OrderedDict()
        self._stored: StoredBytes | None = None

    def use_store(self, store: Store) -> None:
        """From now on sessions are kept there; `close` closes it."""
        self._store, self._book = store, SessionBook(store, self.ttl_s)
        self._stored = StoredBytes(self._book.sessions, self.ttl_s)

    @property
    def available(self) -> bool:
        return self._book is not None

    async def close(self) -> None:
        if self._store is not None:
            await self._store.close()

    @contextlib.contextmanager
    def running(self, tenant: TenantId, session_id: str | None) -> Iterator[None]:
        """Hold a tenant's session, so that no other turn of it runs here. None = nothing is to be held.

        Raises:
            DuplicateRequest: one does.
        """
        if session_id is None:
            yield
            return
        if (tenant, session_id) in self._running:
            raise DuplicateRequest("session_id: a turn of this session is running")
        self._running.add((tenant, session_id))
        try:
            yield
        finally:
            self._running.discard((tenant, session_id))

    async def turn(self, tenant: TenantId, checked: CheckedRequest, limits: TenantLimits = UNLIMITED) -> Turn:
        """What a tenant's request continues, or begins; the session is held meanwhile.

        Raises:
            SessionMismatch: the turn is not the one that the request takes it for.
            Overloaded: the tenant's sessions take up what they may.
            StoreUnavailable: the store cannot be asked. CorruptFrame: what it holds is broken.
        """
        assert checked.session_id is not None
        found = await self._open_book().find(tenant, checked.session_id)
        turn = Turn(tenant, checked.session_id, found.session, found.head)
        if checked.session_turn not in (None, turn.number):
            has = f"has {turn.number - 1} turns" if turn.session else "is not there: it has expired, or was deleted"
            raise SessionMismatch(f"session_turn: got {checked.session_turn}, and the session {has}")
        assert self._stored is not None, "set with the book"
        await self._stored.check(tenant, limits.stored_bytes)
        return turn

    async def keep(self, session: Session, turn: Turn, worker_id: str) -> None:
        """Let a turn count.

        Args:
            worker_id: of the decode worker that ran it, which may have its cache in memory.

        Raises:
            Fenced: another turn has counted meanwhile. StoreUnavailable.
        """
        await self._open_book().write(session, turn.head)
        if self._stored is not None:
            self._stored.kept(session)
        key = (session.tenant, session.session_id)
        self._places[key] = worker_id
        self._places.move_to_end(key)
        if len(self._places) > MAX_PLACES:
            self._places.popitem(last=False)

    def place(self, tenant: TenantId, session_id: str | None) -> str | None:
        """The decode worker of a session's last turn; None where it is not known."""
        return None if session_id is None else self._places.get((tenant, session_id))

    async def all(self, tenant: TenantId) -> list[pb.SessionInfo]:
        """What a tenant has, used last first. Raises `StoreUnavailable`."""
        return [
            pb.SessionInfo(
                session_id=one.session_id,
                turns=one.num_turns,
                tokens=one.num_tokens,
                recipe=one.recipe_name,
                begun_unix_s=one.begun_unix_s,
                used_unix_s=one.used_unix_s,
                expires_unix_s=one.used_unix_s + self.ttl_s,
                stored_bytes=one.stored_bytes,
            )
            for one in await self._open_book().sessions(tenant)
        ]

    async def delete(self, tenant: TenantId, session_id: str) -> bool:
        """Delete a tenant's session and its cache. Returns whether it was there.

        Raises:
            DuplicateRequest: a turn of it is running. StoreUnavailable.
        """
        with self.running(tenant, session_id):
            session = await self._open_book().delete(tenant, session_id)
            if session is None:
                return False
            assert self._store is not None and self._stored is not None
            self._stored.deleted(tenant, session_id)
            try:
                await delete_sequence(self._store, _ident(session))
            except (StoreUnavailable, CorruptFrame) as exc:
                log.warning("the cache of a deleted session stays until it expires: %s", exc.message)
            return True

    def _open_book(self) -> SessionBook:
        if self._book is None:
            why = "which cannot be reached now" if self._has_store else "which this service has not; see --store-url"
            raise StoreUnavailable(f"sessions need the store, {why}")
        return self._book


def owned_id(tenant: TenantId, sequence: RequestId) -> RequestId:
    """What workers and the store call a tenant's sequence. Two tenants' ids are never the same: a tenant's name holds
    neither a colon nor a space, and an id by itself begins with none that is followed by these."""
    return RequestId(f"{tenant}: {sequence}") if tenant else sequence


def _ident(session: Session) -> FrameIdent:
    return FrameIdent(
        request_id=owned_id(session.tenant, sequence_id(session.session_id)),
        epoch=session.epoch,
        tenant=session.tenant,
        model_fingerprint=ModelFingerprint(session.model_fingerprint),
        recipe_fingerprint=RecipeFingerprint(Recipe.from_json(session.recipe_json).fingerprint),
    )


def said_ids(choice: Choice, tokenizer: TurnTokenizer) -> list[int]:
    """What an answer adds to the conversation: the tokens whose text was delivered. A token that ended it gives none.
    Where a stop string cut through a token, what was delivered of its text is tokenized anew."""
    ids = list(choice.token_ids)
    if choice.finish_reason != "stop":
        return ids
    if not choice.stopped_by_text:
        return ids[:-1]
    for count in range(len(ids), -1, -1):
        text = tokenizer.stream().push(ids[:count])
        if choice.text.startswith(text):
            return ids[:count] + tokenizer.encode(choice.text[len(text) :])
    raise AssertionError("no tokens give no text")


def after_turn(
    turn: Turn, checked: CheckedRequest, resolved: Resolved, model_fingerprint: str, epoch: int,
    prompt_ids: Sequence[int], history_ids: Sequence[int], stored_bytes: int,
) -> Session:  # fmt: skip
    """The session that a turn leaves.

    Args:
        history_ids: behind the prompt, with the turn's own input and answer.
        stored_bytes: of the cache that the turn has come to.
    """
    now, before = time.time(), turn.session
    return Session(
        session_id=turn.session_id,
        tenant=turn.tenant,
        model_fingerprint=model_fingerprint,
        recipe_name=checked.recipe_name if before is None else before.recipe_name,
        recipe_json=resolved.recipe.to_json(),
        is_chat=checked.messages is not None if before is None else before.is_chat,
        epoch=epoch,
        num_turns=turn.number,
        prompt_ids=tuple(prompt_ids),
        history_ids=tuple(history_ids),
        begun_unix_s=now if before is None else before.begun_unix_s,
        used_unix_s=now,
        stored_bytes=stored_bytes,
    )
