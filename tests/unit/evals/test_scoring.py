"""Teacher forcing must say what generation does, and what transformers does."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from kvsluice.compression.recipe import get_recipe, resolve
from kvsluice.errors import InternalError
from kvsluice.evals import scoring
from kvsluice.evals.against import Reference
from kvsluice.evals.outcomes import Outcome, score_of
from kvsluice.evals.pipeline import LocalPipeline
from kvsluice.evals.scoring import Scorer
from kvsluice.evals.suites import Case, NeedleGrid, Perplexity, Ruler, Unit
from kvsluice.models.checkpoint import DEFAULT_MODEL
from kvsluice.models.profiles import load_profile
from kvsluice.models.sampling import SamplingParams
from kvsluice.services.framing import FrameMeter
from kvsluice.services.model_shape import model_shape
from kvsluice.services.prefill.flops import prompt_flops


def sealing_sluice():
    """`sluice` that seals generated rows after few, so that an answer crosses several blocks, and reads few rows."""
    sluice = get_recipe("sluice")
    window = sluice.window.to_dict() | {"local": 16, "seal_block": 8}
    retrieval = sluice.retrieval.to_dict() | {"budget_tokens": 256}
    return get_recipe("sluice", json.dumps({"window": window, "retrieval": retrieval}))


RECIPES = {
    "exact": get_recipe("exact"),
    "kivi-2bit": get_recipe("kivi-2bit"),
    "fastkv": get_recipe("fastkv"),
    "sluice": sealing_sluice(),
    "streaming": get_recipe("streaming"),
}


@pytest.fixture(scope="module")
def profile(longctx):
    return load_profile(DEFAULT_MODEL, model_shape(longctx.config))


@pytest.fixture(scope="module")
def scorer(longctx, profile) -> Scorer:
    return Scorer(longctx, profile, RECIPES)


@pytest.fixture(scope="module")
def cases(encode, topics) -> list[Case]:
    ruler, niah = Ruler(encode, topics, 0), NeedleGrid(encode, topics, 0, [0.5])
    units = [Unit(600, 0, "niah_multikey_1"), Unit(560, 0, "quote")]
    return [niah.case(Unit(480, 0, "needle", 0.5)), *(ruler.case(unit) for unit in units)]


@pytest.fixture(scope="module")
def outcomes(scorer, cases) -> list[dict[str, Outcome]]:
    return scorer.score(cases)


@pytest.fixture(scope="module")
def reference(longctx) -> Reference:
    return Reference(DEFAULT_MODEL, longctx.dtype, longctx.device)


@pytest.mark.parametrize("index", range(3))
def test_an_answer_scores_one_iff_generation_says_it(longctx, profile, cases, outcomes, index):
    case, scored = cases[index], outcomes[index]
    pipeline = LocalPipeline(longctx, profile)
    sampling = SamplingParams(max_tokens=len(case.answer_ids), temperature=0.0, ignore_eos=True)
    requests = [(case.prompt_ids, recipe, sampling) for recipe in RECIPES.values()]
    for label, answer in zip(RECIPES, pipeline.generate_many(requests), strict=True):
        generated, outcome = tuple(answer.token_ids[0]), scored[label]
        assert (generated == case.answer_ids) == (outcome.score == 1.0), label
        # up to the first wrong token both have seen the same, so both say the same
        pairs = zip(outcome.predicted, case.answer_ids, strict=True)
        same = next((at + 1 for at, (said, wanted) in enumerate(pairs) if said != wanted), len(generated))
        assert generated[:same] == outcome.predicted[:same], label
        # frames carry the request's id, which has another length there
        assert outcome.payload_bytes == pytest.approx(answer.stats.payload_bytes, rel=1e-3)
        assert outcome.fallback == answer.resolved.fallback_reason


def test_right_and_wrong_answers_both_occur(outcomes):
    assert outcomes[0]["exact"].score == 1.0
    assert {outcome.score for row in outcomes for outcome in row.values()} > {0.0, 1.0}
    assert {outcome.fallback for row in outcomes for outcome in row.values()} == {None}


def test_samples_and_recipes_that_run_together_score_as_alone(longctx, profile, cases, outcomes):
    alone = Scorer(longctx, profile, {"sluice": RECIPES["sluice"]}).score(cases[2:])
    assert alone[0]["sluice"] == outcomes[2]["sluice"]


def test_layers_that_go_through_no_frames_give_the_same(longctx, profile, cases):
    """The first sample of a recipe goes through frames, later ones do not."""
    scorer = Scorer(longctx, profile, RECIPES)
    first, second = scorer.score(cases[:1]), scorer.score(cases[:1])
    assert first == second


def test_a_meter_that_disagrees_with_frames_is_told(longctx, profile, cases, monkeypatch):
    monkeypatch.setattr(FrameMeter, "measure_rest", lambda self: 1)
    with pytest.raises(InternalError, match=r"frames of \d+ bytes were counted as \d+"):
        Scorer(longctx, profile, {"exact": RECIPES["exact"]}).score(cases[:1])


def test_bytes_are_those_of_the_cache(longctx, cases, outcomes):
    shape = model_shape(longctx.config)
    fp32_bytes = 2 * shape.bf16_kv_bytes(len(cases[0].prompt_ids))
    assert fp32_bytes < outcomes[0]["exact"].payload_bytes < 1.01 * fp32_bytes
    # the cache's room grows by 64 rows at a time
    assert fp32_bytes <= outcomes[0]["exact"].resident_bytes <= fp32_bytes + 2 * shape.bf16_kv_bytes(64)
    assert outcomes[0]["kivi-2bit"].resident_bytes < 0.5 * fp32_bytes


def test_operations_of_prefill_are_those_of_the_recipe_that_ran(longctx, profile, scorer, cases, outcomes):
    shape = model_shape(longctx.config)
    for case, row in zip(cases, outcomes, strict=True):
        for label, outcome in row.items():
            ran = resolve(RECIPES[label], shape, len(case.prompt_ids), profile).recipe
            foretold = prompt_flops(longctx.config, shape, ran, len(case.prompt_ids)).total
            assert outcome.prefill_flops == pytest.approx(foretold, rel=1e-12), label
    assert outcomes[0]["fastkv"].prefill_flops < 0.7 * outcomes[0]["exact"].prefill_flops


def test_a_prompt_too_short_for_a_recipe_says_so(scorer):
    (row,) = scorer.score([Case((1, 2, 3), (4, 5), "all")])
    assert row["exact"].fallback is None
    assert row["sluice"].fallback
    assert row["sluice"].predicted == row["exact"].predicted


def test_an_answer_of_one_token_is_judged_by_prefill_alone(scorer):
    (row,) = scorer.score([Case((1, 2, 3), (4,), "all")])
    assert len(row["exact"].predicted) == 1


def test_exact_scores_as_transformers_and_perplexity_too(longctx, reference, topics, cases, outcomes):
    for case, row in zip(cases, outcomes, strict=True):
        score = row["exact"].score
        assert reference.judge(case, row["exact"]) == {"score": score, "turns": [score], "difference": None}
    case = Perplexity(topics, 0, 60).case(Unit(256, 0, "python-topics"))
    (row,) = Scorer(longctx, {}, {"exact": get_recipe("exact")}).score([case])
    assert row["exact"].predicted == ()
    # fp32 rounding of a log-probability, see evals.parity
    assert math.isclose(reference.judge(case, row["exact"])["score"], row["exact"].score, abs_tol=1e-4)


def test_a_difference_to_transformers_is_found_where_it_stands(reference, cases, outcomes):
    case, right = cases[0], outcomes[0]["exact"]
    predicted = list(right.predicted)
    predicted[2] += 1
    wrong = replace(right, predicted=tuple(predicted))
    found = reference.judge(case, wrong)["difference"]
    assert (found["token"], found["answer"], found["exact"]) == (2, case.answer_ids[2], predicted[2])
    assert found["transformers"] == right.predicted[2]
    assert 0 < found["gap"] <= found["exact_gap"]


@pytest.mark.parametrize("rule", ["all", "nll"])
def test_logits_that_are_not_finite_are_no_score(longctx, monkeypatch, rule):
    scorer = Scorer(longctx, {}, {"exact": get_recipe("exact")})
    plain = scoring.forward_rows
    monkeypatch.setattr(scoring, "forward_rows", lambda *given: plain(*given).fill_(math.nan))
    with pytest.raises(InternalError, match="exact: decoding gave logits that are not finite"):
        scorer.score([Case((1, 2, 3), (4, 5, 6), rule)])


@pytest.mark.parametrize(
    ("rule", "predicted", "score"), [("all", (7, 8, 9), 1), ("all", (7, 8, 0), 0), ("share", (7, 8, 0), 2 / 3)]
)
def test_scores_of_answers(rule, predicted, score):
    assert score_of(Case((1,), (7, 8, 9), rule), predicted) == score
