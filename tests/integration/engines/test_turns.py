"""A conversation goes on: what was said and asked is run behind the prompt, and the next answer is drawn behind it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvsluice.compression.recipe import get_recipe
from kvsluice.errors import InvalidRequest
from kvsluice.services.decode import step as step_module
from kvsluice.services.decode.engine import DecodeRequest, EmittedChoice, FinishedEvent, RowsEvent
from kvsluice.services.decode.launch import MOST_REPLAYED
from kvsluice.services.decode.sequence import KeptRows

EVERY, TOKENS = 8, 20
CHUNKS = (
    '{"retrieval": {"kind": "chunks", "chunk": 4, "outliers": 2, "budget_tokens": 32, "budget_rate": 0.05, '
    '"landmark_bits": 8}, "window": {"kind": "ends", "sinks": 4, "local": 16, "seal_block": 16}}'
)
RECIPES = {"exact": get_recipe("exact"), "kivi": get_recipe("kivi"), "chunks": get_recipe("sluice-full", CHUNKS)}


def go_on(b, name, encoded, params, begun, history, **more):
    """Start a turn; run it to its end."""
    size = len(encoded.ids)
    b.engine.open(DecodeRequest(name, 1, size, encoded.recipe, params, history_tokens=history, **more))
    b.feed(name, encoded, begun)
    while b.engine.has_work:
        for event in b.step():
            if isinstance(event, RowsEvent):
                b.engine.lengthen(name, event.choice, 1 << 20, event.epoch)
    return b.tokens(name)


@pytest.fixture
def conversation(bench, encode, prompt, sampling, request):
    """A prompt, its answer, the rows that were kept of it, and a question."""
    params = sampling.drawn(TOKENS, seed=3)
    encoded = encode(prompt(400), params, RECIPES[request.param])
    b = bench()
    told = go_on(b, "one", encoded, params, encoded.first, 0, keep_every=EVERY)
    answer = (*encoded.first[0].token_ids, *told)
    kept = [KeptRows(event.begin, event.layers) for event in b.of("one", RowsEvent)]
    return encoded, answer, kept, prompt(13, seed=9)


@pytest.mark.parametrize("conversation", RECIPES, indirect=True)
def test_a_turn_is_the_same_from_kept_rows_and_from_the_prompt(bench, conversation, sampling):
    encoded, answer, kept, question = conversation
    history = (*answer, *question)
    params = replace(sampling.drawn(30, seed=5), repetition_penalty=1.3)
    from_rows = go_on(bench(), "x", encoded, params, [EmittedChoice(history, kept=kept)], len(history))
    replayed = go_on(bench(), "x", encoded, params, [EmittedChoice(history)], len(history))
    assert len(replayed) == 30
    assert from_rows == replayed
    # another worker goes on in the middle of the second answer
    for told in (1, 17):
        begun = [EmittedChoice((*history, *replayed[:told]), kept=kept)]
        assert go_on(bench(), "x", encoded, params, begun, len(history)) == replayed[told:]


@pytest.mark.parametrize("conversation", ["exact"], indirect=True)
def test_a_turn_says_what_the_whole_conversation_as_one_prompt_says(bench, encode, conversation, sampling):
    encoded, answer, kept, question = conversation
    history = (*answer, *question)
    params = sampling.greedy(25)
    whole = encode((*encoded.ids, *history), params, "exact")
    b = bench()
    b.start("x", whole)
    b.run()
    want = [*whole.first[0].token_ids, *b.tokens("x")]
    assert go_on(bench(), "x", encoded, params, [EmittedChoice(history, kept=kept)], len(history)) == want


@pytest.mark.parametrize("conversation", ["exact", "kivi"], indirect=True)
@pytest.mark.parametrize("keep_every", [None, EVERY])
def test_a_long_question_runs_in_blocks(bench, encode, prompt, conversation, sampling, keep_every):
    """Beside another request, whose every step has one row; and what is kept of the question is of use."""
    encoded, answer, kept, _ = conversation
    history = (*answer, *prompt(300, seed=5))
    params, other = sampling.greedy(25), encode(prompt(50, seed=3), sampling.greedy(40))
    b = bench()
    b.start("other", other)
    told = go_on(b, "x", encoded, params, [EmittedChoice(history, kept=kept)], len(history), keep_every=keep_every)
    assert b.of("x", FinishedEvent)[0].steps < 25 + 300 / 8
    alone = bench()
    alone.start("other", other)
    alone.run()
    assert b.tokens("other") == alone.tokens("other")
    if encoded.recipe.name == "exact":
        whole, dense = encode((*encoded.ids, *history), params, "exact"), bench()
        dense.start("x", whole)
        dense.run()
        assert told == [whole.first[0].token_ids[0], *dense.tokens("x")]
    if keep_every:
        more = [KeptRows(event.begin, event.layers) for event in b.of("x", RowsEvent)]
        assert max(rows.num_rows for rows in more) > EVERY
        begun = [EmittedChoice((*history, *told[:9]), kept=[*kept, *more])]
        assert go_on(bench(), "x", encoded, params, begun, len(history)) == told[9:]


@pytest.mark.parametrize("conversation", ["exact"], indirect=True)
def test_appends_take_no_more_of_a_step_however_many_and_long_they_are(
    bench, encode, prompt, conversation, sampling, monkeypatch
):
    """And a neighbour has a row in every step."""
    encoded, answer, _, _ = conversation
    b, sizes, forward = bench(), [], step_module.forward_rows

    def counted(model, batch):
        sizes.append([len(rows.ids) for rows in batch])
        return forward(model, batch)

    monkeypatch.setattr(step_module, "forward_rows", counted)
    b.start("other", encode(prompt(50, seed=3), sampling.greedy(40)))
    for i in range(3):
        history = (*answer, *prompt(200 + 50 * i, seed=i))
        request = DecodeRequest(f"{i}", 1, len(encoded.ids), encoded.recipe, sampling.greedy(4))
        b.engine.open(replace(request, history_tokens=len(history)))
        b.feed(f"{i}", encoded, [EmittedChoice(history)])
    b.run()
    assert sum(max(step) > 1 for step in sizes) >= 5, "three long ones at once"
    assert all(sum(step) <= len(step) + MOST_REPLAYED for step in sizes)
    assert all(1 in step for step in sizes[:39]), "the neighbour runs in each"


@pytest.mark.parametrize("conversation", ["chunks"], indirect=True)
def test_turns_have_choices_and_rows_that_are_kept(bench, conversation, sampling):
    encoded, answer, kept, question = conversation
    history = (*answer, *question)
    params = sampling.drawn(12, seed=5, n=2)
    alone, b = bench(), bench()
    begun = [EmittedChoice(history, kept=kept)] * 2
    go_on(alone, "x", encoded, params, begun, len(history))
    go_on(b, "x", encoded, params, begun, len(history), keep_every=EVERY)
    assert [b.tokens("x", i) for i in (0, 1)] == [alone.tokens("x", i) for i in (0, 1)]
    assert b.tokens("x", 0) != b.tokens("x", 1)
    ends = [event.begin for event in b.of("x", RowsEvent) if event.choice == 0]
    assert min(ends) == kept[-1].end, "what was kept before is not told again"


@pytest.mark.parametrize("conversation", ["exact"], indirect=True)
def test_histories_that_cannot_be_are_refused(bench, conversation, sampling):
    encoded, answer, _, question = conversation
    history = (*answer, *question)
    for begun in ([EmittedChoice(history[:-1])], [EmittedChoice((*history, 5, 5, 5))]):
        with pytest.raises(InvalidRequest, match="emitted"):
            go_on(bench(), "x", encoded, sampling.greedy(2), begun, len(history))
    with pytest.raises(InvalidRequest, match="one history"):
        begun = [EmittedChoice(history), EmittedChoice((*history[:-1], history[-1] ^ 1))]
        go_on(bench(), "x", encoded, sampling.drawn(3, n=2), begun, len(history))
