"""What prefill takes under a recipe: as the engine counted it, or as it follows from recipe and length."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kvsluice.compression.recipe import fill, get_recipe
from kvsluice.evals.costs import prefill_share
from kvsluice.evals.results import Cell, EvalResults, EvaluatedModel, EvaluatedRecipe
from kvsluice.models.checkpoint import DEFAULT_MODEL
from kvsluice.models.loader import load_config
from kvsluice.models.profiles import load_profile
from kvsluice.services.model_shape import model_shape
from kvsluice.services.prefill.flops import prompt_flops

LABELS = ("exact", "fastkv")


def filled(name: str):
    shape = model_shape(load_config(DEFAULT_MODEL))
    return fill(get_recipe(name), shape, load_profile(DEFAULT_MODEL, shape))


@pytest.fixture
def results() -> EvalResults:
    recipes = {}
    for label in LABELS:
        slots = json.loads(filled(label).to_json())
        recipes[label] = EvaluatedRecipe(slots.pop("name"), filled(label).fingerprint, slots)
    cells = [
        Cell(label, 8192, task, None, (1.0,) * samples, length, 1.0, 1.0, 1.0, 0)
        for label in LABELS
        for task, samples, length in (("vt", 3, 8000.0), ("quote", 1, 7000.4))
    ]
    model = EvaluatedModel(DEFAULT_MODEL, "f" * 64, None, "bfloat16")
    return EvalResults({}, "ruler", model, {}, recipes, tuple(cells), ())


def test_what_the_engine_counted_goes_before_what_follows_from_the_recipe(results):
    flops = {"exact": 8.0, "fastkv": 2.0}
    cells = [
        replace(cell, prefill_flops=flops[cell.recipe] * (1 if cell.task == "vt" else 5)) for cell in results.cells
    ]
    assert prefill_share(replace(results, cells=tuple(cells)), "fastkv", 8192) == 0.25
    assert prefill_share(replace(results, cells=tuple(cells[2:])), "fastkv", 8192) is None, "nothing to compare with"


def test_older_files_have_it_from_recipe_and_length(results):
    config = load_config(DEFAULT_MODEL)

    def flops(name: str, num_tokens: int) -> float:
        return prompt_flops(config, model_shape(config), filled(name), num_tokens).total

    assert prefill_share(results, "exact", 8192) == 1.0
    expected = [3 * flops(name, 8000) + flops(name, 7000) for name in LABELS]
    assert prefill_share(results, "fastkv", 8192) == pytest.approx(expected[1] / expected[0])


def test_samples_that_ran_exact_took_what_exact_takes(results):
    cells = [replace(cell, fallbacks=len(cell.scores) * (cell.recipe == "fastkv")) for cell in results.cells]
    assert prefill_share(replace(results, cells=tuple(cells)), "fastkv", 8192) == 1.0


def test_of_another_model_and_of_slots_that_are_no_more_nothing_is_known(results):
    other = replace(results, model=replace(results.model, name="a-model"))
    assert prefill_share(other, "fastkv", 8192) is None
    slots = dict(results.recipes["fastkv"].slots) | {"propagation": {"kind": "no longer there"}}
    recipes = dict(results.recipes) | {"fastkv": replace(results.recipes["fastkv"], slots=slots)}
    assert prefill_share(replace(results, recipes=recipes), "fastkv", 8192) is None
