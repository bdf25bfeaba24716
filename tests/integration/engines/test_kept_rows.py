"""Generated rows that are kept elsewhere: who goes on from them says what was said without interruption."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvsluice.compression.interfaces import EncodedLayer, Part
from kvsluice.compression.recipe import get_recipe
from kvsluice.errors import FrameMismatch
from kvsluice.services.decode.engine import EmittedChoice, KeptRows, RowsEvent
from kvsluice.services.decode.start import LEASH

EVERY, TOKENS = 8, 44
CHUNKS = (
    '{"retrieval": {"kind": "chunks", "chunk": 4, "outliers": 2, "budget_tokens": 32, "budget_rate": 0.05, '
    '"landmark_bits": 8, "select_every": %d}, "window": {"kind": "ends", "sinks": 4, "local": 16, "seal_block": 16}}'
)
RECIPES = {
    "exact": get_recipe("exact"),
    "kivi": get_recipe("kivi"),
    "fp8": get_recipe("fp8"),
    "streaming": get_recipe("streaming"),
    "chunks": get_recipe("sluice-full", CHUNKS % 1),
    "chunks of every fourth": get_recipe("sluice-full", CHUNKS % 4),
}
PROMPTS: dict[str, Any] = {}  # that have been run


@pytest.fixture(params=sorted(RECIPES))
def encoded(request, encode, prompt, sampling):
    if request.param not in PROMPTS:
        PROMPTS[request.param] = encode(prompt(400), sampling.drawn(TOKENS, seed=3), RECIPES[request.param])
    return PROMPTS[request.param]


def run_keeping(b, name: str) -> list[RowsEvent]:
    """Run to the end, and say of all rows that they are kept as soon as they are told."""
    while b.engine.has_work:
        for event in b.step():
            if isinstance(event, RowsEvent):
                rows = len(event.layers[0].tensors[Part.TAIL]["k"])
                b.engine.lengthen(name, event.choice, rows, event.epoch)
    return b.of(name, RowsEvent)


def kept_of(events: list[RowsEvent], choice: int = 0) -> list[KeptRows]:
    return [KeptRows(event.begin, event.layers) for event in events if event.choice == choice]


def test_keeping_changes_no_token_and_leaves_out_no_row(bench, encoded) -> None:
    plain, keeping = bench(), bench()
    plain.start("x", encoded)
    plain.run()
    keeping.start("x", encoded, keep_every=EVERY)
    kept = kept_of(run_keeping(keeping, "x"))
    assert keeping.tokens("x") == plain.tokens("x")
    end = len(encoded.ids)
    for rows in kept:
        assert rows.begin == end and 0 < rows.num_rows <= EVERY
        end += rows.num_rows
    assert end > len(encoded.ids) + TOKENS - 2 - EVERY


def test_another_engine_goes_on_from_what_is_kept(bench, encoded) -> None:
    first = bench()
    first.start("x", encoded, keep_every=EVERY)
    kept = kept_of(run_keeping(first, "x"))
    ids = (*encoded.first[0].token_ids, *first.tokens("x"))
    for told in (1, 2, EVERY + 1, 3 * EVERY + 2, TOKENS - 1):
        check_going_on(bench, encoded, kept, ids, told)


def check_going_on(bench, encoded, kept: list[KeptRows], ids: tuple[int, ...], told: int) -> None:
    """Go on after `told` of the tokens, and again from what that keeps itself."""
    other = bench()
    other.start("x", encoded, [EmittedChoice(ids[:told], kept=kept)], keep_every=EVERY)
    again = kept_of(run_keeping(other, "x"))
    assert other.tokens("x") == list(ids[told:])
    every, size = encoded.recipe.retrieval.select_every, len(encoded.ids)
    num_kept = sum(rows.num_rows for rows in kept)
    num_run = max(0, (size + min(told - 1, num_kept)) // every * every - size)
    assert other.replayed == told - 1 - num_run, "rows that are kept are not computed again"
    joined = [rows.first(again[0].begin - rows.begin) for rows in kept if rows.begin < again[0].begin] if again else []
    third = bench()
    third.start("x", encoded, [EmittedChoice(ids[: TOKENS - 1], kept=[*joined, *again])])
    third.run()
    assert third.tokens("x") == list(ids[TOKENS - 1 :])


def test_rows_that_nobody_keeps_hold_the_choice_and_no_other(bench, encode, prompt, sampling) -> None:
    encoded = encode(prompt(40), sampling.drawn(TOKENS))
    other = encode(prompt(30), sampling.drawn(TOKENS, seed=1))
    b = bench()
    b.start("kept", encoded, keep_every=EVERY)
    b.start("other", other)
    b.run()
    assert len(b.tokens("kept")) == LEASH * EVERY and len(b.tokens("other")) == TOKENS - 1
    b.engine.lengthen("kept", 0, EVERY, epoch=7)  # of another attempt
    assert not b.engine.has_work
    b.engine.lengthen("kept", 0, EVERY)
    b.run()
    assert len(b.tokens("kept")) == (LEASH + 1) * EVERY
    b.engine.lengthen("kept", 0, float("inf"))
    b.run()
    assert len(b.tokens("kept")) == TOKENS - 1
    b.engine.lengthen("kept", 0, 1)


def test_choices_are_kept_apart(bench, encode, prompt, sampling) -> None:
    encoded = encode(prompt(200), sampling.drawn(TOKENS, n=3, seed=5), RECIPES["kivi"])
    first = bench()
    first.start("x", encoded, keep_every=EVERY)
    events = run_keeping(first, "x")
    ids = [(*encoded.first[i].token_ids, *first.tokens("x", i)) for i in range(3)]
    told = (5, TOKENS, 30)
    emitted = [
        EmittedChoice(ids[i][: told[i]], "length" if told[i] == TOKENS else "", kept_of(events, i)) for i in range(3)
    ]
    other = bench()
    other.start("x", encoded, emitted)
    other.run()
    assert [other.tokens("x", i) for i in range(3)] == [list(ids[i][told[i] :]) for i in range(3)]
    assert other.ended("x").steps == sum(TOKENS - t for t in told)


def test_rows_that_cannot_be_gone_on_from_end_the_request(bench, encode, prompt, sampling) -> None:
    encoded = encode(prompt(40), sampling.drawn(TOKENS))
    first = bench()
    first.start("x", encoded, keep_every=EVERY)
    kept = kept_of(run_keeping(first, "x"))
    ids = (*encoded.first[0].token_ids, *first.tokens("x"))

    def changed(rows: KeptRows, change) -> KeptRows:
        return replace(rows, layers=[
            EncodedLayer(one.layer, {Part.TAIL: {name: change(t) for name, t in one.tensors[Part.TAIL].items()}})
            for one in rows.layers
        ])  # fmt: skip

    for name, wrong in {
        "gap": [kept[0], kept[2]],
        "order": [kept[1], kept[0]],
        "twice": [kept[0], kept[0]],
        "layers": [replace(kept[0], layers=kept[0].layers[1:])],
        "none": [replace(kept[0], layers=[])],
        "dtype": [changed(kept[0], lambda t: t.half())],
        "shape": [changed(kept[0], lambda t: t[:, :1])],
    }.items():
        b = bench()
        b.open("x", encoded)
        for layer in encoded.layers:
            b.engine.add_layer("x", layer)
        with pytest.raises(FrameMismatch):
            b.engine.commit("x", encoded.ids, [EmittedChoice(ids[:40], kept=wrong)])
            pytest.fail(name)
