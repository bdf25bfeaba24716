"""Goes on with a sequence that another worker has left in a store.

    claim ──> manifest, continuation ──> frames of the prompt ──> layers ──> kept rows ──> the caller commits
                                     └──> its cache is still here (`kept_sessions`) ────────────^

The claim comes first: from then on the sequence does not change under whoever reads it, and its earlier owner is
fenced. Whatever is missing, broken or does not fit ends in `SequenceLost`; nothing of it is used then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...compression.interfaces import EncodedLayer
from ...compression.recipe import Recipe
from ...errors import CorruptFrame, FrameMismatch, SequenceLost
from ...kvstore.continuation import RowsEntry
from ...kvstore.frame import decode_frame
from ...kvstore.identity import FrameIdent, epoch_of
from ...kvstore.sequences import StoredSequence, claim_sequence, find_sequence, read_frames
from ...kvstore.store import Store
from ..framing import LayerAssembler
from .kept_sessions import SessionTurn
from .receiver import Target
from .sequence import EmittedChoice, KeptRows
from .start import usable_rows


@dataclass(frozen=True)
class Restoring:
    """What is to be gone on with.

    Attributes:
        ident: of the new owner.
        recipe: resolved.
        num_prompt_tokens, num_layers: of the sequence and the model.
        max_bytes: that all of it may take, as reserved.
        emitted: what every choice has sent, at least one token each.
        ttl_s: how long the claim lives.
        history_tokens: of what was sent, so many tokens go before the answer. What a turn that failed has left behind
            them may differ, and is not used.
    """

    ident: FrameIdent
    recipe: Recipe
    num_prompt_tokens: int
    num_layers: int
    max_bytes: int
    emitted: Sequence[EmittedChoice]
    ttl_s: float
    history_tokens: int = 0


@dataclass(frozen=True)
class Restored:
    """What was read.

    Attributes:
        found: names of all of it.
        emitted: every choice with those of its rows that are of use; the last of them may be a part of what was kept
            together.
        adopted_end: position up to which rows are stored of the one choice, whose cache was here; None = it was read.
    """

    found: StoredSequence
    emitted: list[EmittedChoice]
    adopted_end: int | None = None

    @property
    def ends(self) -> dict[int, int]:
        """Choice -> position up to which its stored rows are of use."""
        if self.adopted_end is not None:
            return {0: self.adopted_end}
        return {i: choice.kept[-1].end for i, choice in enumerate(self.emitted) if choice.kept}


async def restore(store: Store, wanted: Restoring, target: Target) -> Restored:
    """Read a sequence and put its layers into `target`; it is not started yet.

    Raises:
        SequenceLost: it cannot be gone on with.
        StoreUnavailable: the store cannot be reached.
        Fenced: a later attempt has claimed it.
    """
    before = await claim_sequence(store, wanted.ident, wanted.ttl_s)
    if before is None:
        raise SequenceLost("the store holds nothing of the sequence")
    found = await find_sequence(store, wanted.ident)
    if found is None:
        raise SequenceLost("the store does not hold the whole sequence")
    _check(found, wanted)
    if wanted.history_tokens:
        turn = _turn(found, wanted, before.epoch)
        if await target.adopt(turn):
            return Restored(found, list(wanted.emitted), turn.stored_end)
    try:
        await _restore_prompt(store, found, wanted, target)
        emitted = [await _with_rows(store, found, index, wanted) for index in range(len(wanted.emitted))]
    except (CorruptFrame, FrameMismatch) as exc:
        raise SequenceLost(f"what was stored of the sequence cannot be used: {exc.message}") from exc
    return Restored(found, emitted)


def _turn(found: StoredSequence, wanted: Restoring, last_epoch: int) -> SessionTurn:
    """What a session's turn goes on with. Sessions have one choice."""
    rows, size = found.rows_of(0), wanted.num_prompt_tokens
    return SessionTurn(
        last_epoch,
        found.manifest.prompt_ids,
        rows[-1].tokens[1] if rows else size,
        wanted.emitted[0],
    )


def _check(found: StoredSequence, wanted: Restoring) -> None:
    """Compare what was found with what the caller knows.

    Raises:
        SequenceLost: they contradict each other.
    """
    if len(found.manifest.prompt_ids) != wanted.num_prompt_tokens:
        raise SequenceLost("the stored prompt has another length")
    stored = _stored_ids(found)
    if len(stored) != len(wanted.emitted):
        raise SequenceLost("the stored sequence has another number of choices")
    for ids, choice in zip(stored, wanted.emitted, strict=True):
        if not wanted.history_tokens and _num_common(ids, choice.token_ids) < min(len(ids), len(choice.token_ids)):
            raise SequenceLost("the stored sequence says other tokens than were sent")


def _stored_ids(found: StoredSequence) -> list[tuple[int, ...]]:
    """What each choice has come to behind the prompt."""
    if found.continuation is not None:
        return [choice.token_ids for choice in found.continuation.choices]
    return [tuple(token.token_id for token in choice.emitted) for choice in found.manifest.choices]


def _num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


async def _restore_prompt(store: Store, found: StoredSequence, wanted: Restoring, target: Target) -> None:
    assembler = LayerAssembler(found.manifest.ident, wanted.num_layers, wanted.max_bytes)
    async for data in read_frames(store, found.manifest.frames):
        for layer in await asyncio.to_thread(assembler.add, data):
            await target.add_layer(layer)


async def _with_rows(store: Store, found: StoredSequence, index: int, wanted: Restoring) -> EmittedChoice:
    """A choice with those of its rows that need not be computed again."""
    choice, entries = wanted.emitted[index], found.rows_of(index)
    if choice.finish_reason or not entries:
        return choice
    size = wanted.num_prompt_tokens
    num_kept = min(entries[-1].tokens[1] - size, _num_common(_stored_ids(found)[index], choice.token_ids))
    end = size + usable_rows(wanted.recipe, size, len(choice.token_ids), num_kept)
    kept = [await _rows(store, entry, wanted) for entry in entries if entry.tokens[0] < end]
    return replace(choice, kept=[rows.first(end - rows.begin) for rows in kept])


async def _rows(store: Store, entry: RowsEntry, wanted: Restoring) -> KeptRows:
    ident = replace(wanted.ident, epoch=epoch_of(entry.frames[0].key))
    assembler = LayerAssembler(ident, wanted.num_layers, wanted.max_bytes)
    layers: list[EncodedLayer] = []
    async for data in read_frames(store, entry.frames):
        frame = decode_frame(data)
        if frame.tokens != entry.tokens:
            raise FrameMismatch("kept rows are of other positions than their name says")
        layers += assembler.add_frame(frame)
    if assembler.missing():
        raise FrameMismatch("kept rows of some layers are missing")
    return KeptRows(entry.tokens[0], sorted(layers, key=lambda layer: layer.layer))
