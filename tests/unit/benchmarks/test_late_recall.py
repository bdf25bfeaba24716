"""Late recall beside early: both hold the same rows, and early recall of everything is `exact`."""

from __future__ import annotations

import json

import pytest
import torch

from kvsluice.benchmarks.late_recall import Distributions, measure, propagated, recalled_rows, selection, summary
from kvsluice.compression.propagation import Tsp
from kvsluice.compression.recipe import get_recipe
from kvsluice.evals.suites import Case
from kvsluice.models.config import config_from_hf
from kvsluice.models.model import Model
from kvsluice.models.weights import random_weights

T, NUM_LAYERS, TOKENS = 1, 4, 300
TSP = {"kind": "tsp", "layer": T, "rate": 0.3, "window": 8, "kernel": 3, "recall": 0.4, "recall_step": 8}
RECIPE = get_recipe("exact", json.dumps({"propagation": TSP}))


@pytest.fixture(scope="module")
def model() -> Model:
    config = config_from_hf(
        {
            "model_type": "llama",
            "num_hidden_layers": NUM_LAYERS,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 97,
            "max_position_embeddings": 1024,
        }
    )
    return Model(config, random_weights(config, torch.float32, torch.device("cpu"), 3), fingerprint="tiny")


@pytest.fixture(scope="module")
def case() -> Case:
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(97, (TOKENS + 12,), generator=draw).tolist()
    return Case(tuple(ids[:TOKENS]), tuple(ids[TOKENS:]), "all")


def says(model: Model, case: Case, recipe, forced=None) -> torch.Tensor:
    with selection(forced):
        return Distributions(model, {}, {recipe.name: recipe}).run(case)


def test_rows_that_are_forced_go_on_and_the_selection_is_given_back(model, case):
    chosen = Tsp.select
    every = torch.arange(TOKENS)
    whole = propagated(RECIPE, recall=0.0, rate=0.999)
    exact, without = says(model, case, get_recipe("exact")), says(model, case, propagated(RECIPE, recall=0.0))
    # a rate a little below 1 makes room for all rows but a few, and forcing all of those is `exact` but for them
    kept = every[-whole.propagation.rows_at(T + 1, TOKENS, whole.retrieval.chunk, whole.window.sinks) :]
    forced = says(model, case, whole, kept)
    assert (forced - exact).abs().mean() < 0.3 * (without - exact).abs().mean()
    assert Tsp.select is chosen


def test_late_and_early_hold_the_same_rows(model, case):
    scorer = Distributions(model, {}, {"late": RECIPE})
    with selection() as seen:
        scorer.run(case)
    back = recalled_rows(scorer.sequence, RECIPE.retrieval.chunk)
    assert 0 < len(back) <= 0.4 * TOKENS and not set(back.tolist()) & set(seen[0].tolist())
    one = measure(model, {}, RECIPE, "random", case)
    assert one.recalled == len(back)
    assert set(one.nats) == {"without to exact", "late to exact", "early to exact", "late to early"}
    assert min(one.nats.values()) > 0, "four different computations"
    assert one.nats["early to exact"] < one.nats["without to exact"], "more rows went on"


def test_nothing_is_said_of_a_sample_that_recalls_nothing(model, case):
    assert measure(model, {}, propagated(RECIPE, recall=1e-6), "random", case) is None


def test_means_have_intervals(model, case):
    one = measure(model, {}, RECIPE, "random", case)
    row = summary([one, one])["late to early"]["nats"]
    assert row["low"] == row["mean"] == row["high"] == pytest.approx(one.nats["late to early"])
