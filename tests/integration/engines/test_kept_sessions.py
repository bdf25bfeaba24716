"""A turn that goes on with the cache that the one before has left says what it says from kept rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvsluice.compression.recipe import get_recipe
from kvsluice.services.decode.engine import DecodeRequest, EmittedChoice, RowsEvent
from kvsluice.services.decode.kept_sessions import SessionTurn
from kvsluice.services.decode.sequence import KeptRows

EVERY = 8
STREAMING = get_recipe("streaming")
CHUNKS = get_recipe(
    "sluice-full",
    '{"retrieval": {"kind": "chunks", "chunk": 4, "outliers": 0, "budget_tokens": 32, "landmark_bits": 8},'
    ' "window": {"kind": "ends", "sinks": 4, "local": 16, "seal_block": 16}}',
)


def run(b, num_steps: int = 1 << 20) -> None:
    """All rows that are told are kept at once."""
    while b.engine.has_work and num_steps:
        num_steps -= 1
        for event in b.step():
            if isinstance(event, RowsEvent):
                b.engine.lengthen(event.request_id, event.choice, EVERY, event.epoch)


def first_turn(b, encoded, num_steps: int = 1 << 20) -> tuple[tuple[int, ...], list[KeptRows]]:
    """Run a turn, or the first steps of it. Returns what was said, and the rows that were kept of it."""
    size = len(encoded.ids)
    b.engine.open(DecodeRequest("one", 1, size, encoded.recipe, encoded.params, None, EVERY, session_key="s"))
    b.feed("one", encoded)
    run(b, num_steps)
    if b.engine.has_work:
        b.engine.cancel("one", 0)
        run(b)
    kept = [KeptRows(event.begin, event.layers) for event in b.of("one", RowsEvent)]
    return (*encoded.first[0].token_ids, *b.tokens("one")), kept


def next_turn(b, encoded, params, history, kept, adopts: bool | None = None) -> list[int]:
    """Go on behind `history`, with what the engine has, or with what was kept of the turn before."""
    size, begun = len(encoded.ids), EmittedChoice(history)
    b.engine.open(DecodeRequest("two", 2, size, encoded.recipe, params, None, EVERY, len(history), "s"))
    b.step()
    if adopts is not None:
        turn = SessionTurn(1, encoded.ids, kept[-1].end if kept else size, begun)
        assert b.engine.adopt("two", turn) == adopts
    if adopts:
        b.engine.commit("two", encoded.ids, [begun])
    else:
        b.feed("two", encoded, [replace(begun, kept=kept)])
    run(b)
    return b.tokens("two")


@pytest.mark.parametrize(("recipe", "tokens"), [(CHUNKS, 25), (STREAMING, 9)], ids=["chunks", "streaming"])
def test_a_turn_may_end_where_a_block_is_due(bench, encode, prompt, sampling, recipe, tokens: int) -> None:
    """What is due is sealed before the next turn's first row, as it would have been in one long turn."""
    encoded = encode(prompt(200), sampling.drawn(tokens, seed=3), recipe)
    first, window = 200 + tokens - 1, encoded.recipe.window
    assert (first - window.local_rows(200)) % window.seal_block == 0, "the turn's last row is the last before a seal"
    b = bench(session_bytes=1 << 30)
    answer, kept = first_turn(b, encoded)
    history = (*answer, *prompt(20, seed=9))
    wanted = next_turn(bench(), encoded, sampling.drawn(12, seed=5), history, kept)
    assert next_turn(b, encoded, sampling.drawn(12, seed=5), history, kept, adopts=True) == wanted


def test_a_turn_does_not_hold_the_room_of_a_longer_one(bench, encode, prompt, sampling) -> None:
    """One that ended early leaves a cache with room for all that it might have said, which the next did not reserve."""
    encoded = encode(prompt(100), sampling.drawn(1500, seed=3))
    b = bench(session_bytes=1 << 30)
    answer, kept = first_turn(b, encoded, num_steps=12)
    history = (*answer, *prompt(5, seed=9))
    wanted = next_turn(bench(), encoded, sampling.drawn(8, seed=5), history, kept)
    assert next_turn(b, encoded, sampling.drawn(8, seed=5), history, kept, adopts=False) == wanted
    assert b.engine.tier_snapshot().session_misses == 1
