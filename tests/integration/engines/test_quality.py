"""Decode steps redone with full attention: the figures, and that nothing depends on them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kvsluice.compression.recipe import get_recipe


def sparse(budget_tokens: int, outliers: int = 0):
    recipe = get_recipe("sluice-full")
    retrieval = recipe.retrieval.to_dict() | {"budget_tokens": budget_tokens, "budget_rate": 0.001}
    window = recipe.window.to_dict() | {"local": 16, "seal_block": 16}
    slots = {"retrieval": retrieval | {"outliers": outliers}, "window": window}
    return get_recipe("sluice-full", json.dumps(slots))


def run(bench, encoded, rate: float):
    made = bench(quality_sample_rate=rate)
    made.start("a", encoded)
    made.run()
    return made


def test_no_token_and_no_count_depends_on_redone_steps(bench, encode, prompt, sampling):
    encoded = encode(prompt(300), sampling.drawn(60, n=2, seed=3), sparse(16))
    without, with_all = run(bench, encoded, 0.0), run(bench, encoded, 1.0)
    for choice in range(2):
        assert with_all.tokens("a", choice) == without.tokens("a", choice)
    assert with_all.events[-1] == without.events[-1]  # what was held and read
    quiet, seen = without.engine.figures.quality, with_all.engine.figures
    assert quiet.divergence == {} and not quiet.skipped
    divergence = seen.quality.divergence[encoded.recipe.name]
    assert sum(divergence.counts) == sum(seen.batch.counts) >= 59  # one row a step
    assert divergence.total > 1e-3 * sum(divergence.counts)
    assert not seen.quality.skipped


@pytest.mark.parametrize("outliers", [0, 3])
def test_a_step_that_chose_every_chunk_is_what_it_is_redone_as(bench, encode, prompt, sampling, outliers):
    encoded = encode(prompt(300), sampling.drawn(60, n=2, seed=3), sparse(16, outliers))
    retrieval = replace(encoded.recipe.retrieval, budget_tokens=4096)  # the layers are the same
    quality = run(
        bench, replace(encoded, recipe=replace(encoded.recipe, retrieval=retrieval)), 1.0
    ).engine.figures.quality
    count = sum(quality.divergence[encoded.recipe.name].counts)
    assert count >= 59  # blocks of the answer were sealed on the way
    assert quality.agreements[encoded.recipe.name] == count
    assert quality.divergence[encoded.recipe.name].total < 1e-6 * count


def test_a_share_is_a_share_and_what_cannot_be_redone_is_counted(bench, encode, prompt, sampling):
    made = bench(quality_sample_rate=0.25)
    for number, recipe in enumerate(("exact", "snapkv")):
        encoded = encode(prompt(600), sampling.greedy(41), recipe)
        assert encoded.recipe.name == recipe
        made.start(str(number), encoded)
        made.run()
    skipped = made.engine.figures.quality.skipped
    assert skipped == {("exact", "attends_to_all"): 10, ("snapkv", "rows_dropped"): 10}


def test_a_comparison_that_fails_costs_no_more_than_itself(bench, encode, prompt, sampling, monkeypatch):
    encoded = encode(prompt(300), sampling.drawn(6, seed=3), sparse(16))
    wanted = run(bench, encoded, 0.0).tokens("a")
    made = bench(quality_sample_rate=1.0)
    monkeypatch.setattr(made.engine.runner.probe, "_compare", lambda sampled: 1 / 0)
    made.start("a", encoded)
    made.run()
    assert made.tokens("a") == wanted
    assert made.engine.figures.quality.skipped == {(encoded.recipe.name, "failed"): 5}
