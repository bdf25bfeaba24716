"""What the methods' papers claim about keys and values, on the real model: orderings of the loss on natural text.

Text is python's own help, whose wording the adapter partly saw: that shifts all losses, not their order. Margins seen
when this was written are several times those asked for.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from kvsluice.compression.recipe import Recipe, get_recipe
from kvsluice.evals.scoring import Scorer
from kvsluice.evals.suites import Case
from kvsluice.evals.texts import python_topics, token_ids
from kvsluice.models.loader import load_model
from kvsluice.models.profiles import load_profile
from kvsluice.models.tokenizer import load_tokenizer

MODEL = "smollm2-135m-longctx"
CONTEXT, SCORED = 640, 96


def affine(bits: int, axis: str) -> dict[str, Any]:
    return {"kind": "affine", "bits": bits, "axis": axis, "group": 32}


def variant(name: str, **slots: Any) -> Recipe:
    return get_recipe(name, json.dumps(slots))


TWO_BITS = {"kind": "demote", "key_bits": 2, "value_bits": 2}
RECIPES = {
    "exact": get_recipe("exact"),
    "kivi": get_recipe("kivi"),
    "kivi-2bit": get_recipe("kivi-2bit"),
    "2-bit keys per token": variant("kivi-2bit", key_codec=affine(2, "token")),
    "2-bit values per channel": variant("kivi-2bit", value_codec=affine(2, "channel")),
    "keys 4, values 2": variant("kivi", value_codec=affine(2, "token")),
    "keys 2, values 4": variant("kivi", key_codec=affine(2, "channel")),
    "layers joined": get_recipe("xkv"),
    "layers alone": variant("xkv", sharing={"kind": "none"}),
    "demoted to 4": get_recipe("mikv"),
    "demoted to 2": variant("mikv", evicted=TWO_BITS),
    "demoted to 2, balanced": variant("mikv", evicted=TWO_BITS | {"balanced": True}),
}


@pytest.fixture(scope="module")
def loss() -> dict[str, float]:
    """Nats a token of every recipe, on the same text."""
    torch.set_num_threads(1)
    model, tokenizer = load_model(MODEL), load_tokenizer(MODEL)
    ids = token_ids(tokenizer.encode, python_topics()[:20_000])[1000 : 1000 + CONTEXT + SCORED + 1]
    case = Case(tuple(ids[:CONTEXT]), tuple(ids[CONTEXT:]), "nll")
    (outcomes,) = Scorer(model, load_profile(MODEL, model.config), RECIPES).score([case])
    assert all(outcome.fallback is None for outcome in outcomes.values())
    return {label: outcome.score for label, outcome in outcomes.items()}


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("better", "worse", "margin"),
    [
        pytest.param("kivi-2bit", "2-bit keys per token", 0.1, id="KIVI: keys want groups along channels"),
        pytest.param("kivi-2bit", "2-bit values per channel", 0.03, id="KIVI: values want groups along tokens"),
        pytest.param("keys 4, values 2", "keys 2, values 4", 0.05, id="KVTuner: keys matter more than values"),
        pytest.param("layers joined", "layers alone", 0.05, id="xKV: at equal rank a layer, joining layers loses less"),
        pytest.param("demoted to 2, balanced", "demoted to 2", 0.1, id="MiKV: balancing helps at 2 bits"),
    ],
)
def test_what_is_published_holds(loss: dict[str, float], better: str, worse: str, margin: float) -> None:
    assert loss[better] + margin < loss[worse]


@pytest.mark.parametrize("label", ["kivi", "demoted to 4", "keys 4, values 2"])
def test_four_bits_of_keys_cost_next_to_nothing(loss: dict[str, float], label: str) -> None:
    assert abs(loss[label] - loss["exact"]) < 0.05
