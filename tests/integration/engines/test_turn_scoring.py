"""What an evaluation says of later turns is what a session's next turn on the decode engine says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kvsluice.compression.recipe import get_recipe
from kvsluice.evals.scoring import Scorer
from kvsluice.evals.suites import Case, Turn
from kvsluice.services.decode.engine import DecodeRequest, EmittedChoice

PROFILE = {"tsp_layer": 1, "tsp_rate": 0.25, "key_codec": {"kind": "affine", "bits": 4, "group": 16, "axis": "token"}}
SEALING = json.dumps(
    {
        "window": get_recipe("sluice").window.to_dict() | {"local": 16, "seal_block": 8},
        "retrieval": get_recipe("sluice").retrieval.to_dict() | {"budget_tokens": 64},
    }
)
RECIPES = {
    "exact": get_recipe("exact"),
    "fastkv": get_recipe("fastkv"),
    "snapkv": get_recipe("snapkv"),
    "kivi": get_recipe("kivi"),
    "sluice": get_recipe("sluice", SEALING),
}
NUM_TOKENS = (600, 9, 7, 1, 5)  # of the prompt, and of the answers
QUESTIONS = (70, 11, 1)  # more than are replayed one by one, a block with others, a single token


@pytest.fixture
def conversation(model, bench, encode, prompt, sampling):
    """conversation(recipe) -> a case whose answers are what the engines say, each turn a request of its own that has
    the turns before as its history."""

    def make(recipe) -> Case:
        size, *answers = NUM_TOKENS
        ids, history, turns = prompt(size), (), []
        for place, count in enumerate(answers):
            question = prompt(QUESTIONS[place - 1], seed=place) if place else ()
            params = sampling.greedy(max(2, count))
            encoded = encode(ids, params, recipe)
            history += question
            begun = [EmittedChoice(history)] if history else encoded.first
            b = bench()
            b.engine.open(DecodeRequest("x", 1, size, encoded.recipe, params, history_tokens=len(history)))
            b.feed("x", encoded, begun)
            b.run()
            said = b.tokens("x") if history else [*encoded.first[0].token_ids, *b.tokens("x")]
            turns.append(Turn(question, tuple(said[:count])))
            history += turns[-1].answer_ids
        return Case(ids, turns[0].answer_ids, "all", tuple(turns[1:]))

    return make


@pytest.mark.parametrize("lookahead", [False], indirect=True)
@pytest.mark.parametrize("label", RECIPES)
def test_a_turn_is_right_iff_the_engine_says_its_answer(model, conversation, label):
    recipe = RECIPES[label]
    case = conversation(recipe)
    scorer = Scorer(model, {}, {label: recipe})
    (row,) = scorer.score([case])
    assert row[label].fallback is None
    assert row[label].turns == (1.0,) * 4
    assert row[label].predicted == tuple(t for begin, end in case.answers for t in case.following_ids[begin:end])
    wrong = replace(case.later[1], answer_ids=((case.later[1].answer_ids[0] + 1) % model.config.vocab_size,))
    (row,) = scorer.score([replace(case, later=(case.later[0], wrong))])
    assert row[label].turns == (1.0, 1.0, 0.0)
    assert row[label].score == pytest.approx(2 / 3)


@pytest.mark.parametrize("lookahead", [False], indirect=True)
def test_recipes_that_differ_are_asked_the_same(model, conversation):
    """Between the turns stand the case's answers, not those of each recipe: what one says does not depend on others,
    nor on what it would have said before."""
    case = conversation(RECIPES["exact"])
    together = Scorer(model, {}, RECIPES).score([case, replace(case, later=case.later[:1])])
    assert together[0]["exact"].turns == (1.0,) * 4
    for label, recipe in RECIPES.items():
        (alone,) = Scorer(model, {}, {label: recipe}).score([case])
        assert alone[label].predicted == together[0][label].predicted
        asked = len(case.answer_ids) + len(case.later[0].answer_ids)
        assert together[1][label].predicted == together[0][label].predicted[:asked]
