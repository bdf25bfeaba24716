"""What the prefill engine counts is what its matrix products take: by hand, by torch's own count, and as foretold."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kvsluice.compression.recipe import get_recipe, recipe_names, resolve
from kvsluice.compression.subspace import leading_subspace
from kvsluice.compression.subspace_plan import subspace_flops
from kvsluice.services.model_shape import model_shape
from kvsluice.services.prefill.engine import PrefillJob
from kvsluice.services.prefill.flops import FlopCount, prompt_flops

LINEAR = (torch.ops.aten.mm, torch.ops.aten.addmm)
SCORES = (torch.ops.aten.bmm,)
# of the tiny model: hidden 64, 4 heads and 2 KV heads of 16, MLP 96, vocabulary 97, 4 layers
QKV, REST, HEAD = 64 * (64 + 2 * 32), 64 * 64 + 3 * 64 * 96, 64 * 97
PROFILE = {"tsp_layer": 1, "tsp_rate": 0.25}  # the published rate of FastKV, a fifth, is not the profile's


def triangle(num_rows: int) -> float:
    return num_rows * (num_rows + 1) / 2


@pytest.fixture
def counted(model, prefill, prompt, sink, sampling):
    """counted(recipe, length) -> the recipe as it ran, the engine's count, and torch's by operation."""

    def run(recipe, length: int, chunk: int = 16, max_tokens: int = 8):
        resolved = resolve(recipe, model_shape(model.config), length, PROFILE)
        assert resolved.fallback_reason is None
        engine, count = prefill.engine(chunk=chunk, pack=3 * chunk), FlopCount()
        job = PrefillJob("a", 1, prompt(length), resolved.recipe, sampling.greedy(max_tokens))
        with FlopCounterMode(display=False) as torchs:
            engine.submit(job, sink("a"), count=count)
            prefill.run(engine)
        return resolved.recipe, count.flops, torchs.get_flop_counts()["Global"]

    return run


def of(counts, operations) -> float:
    return float(sum(counts.get(operation, 0) for operation in operations))


def test_exact_takes_what_a_hand_counts(counted):
    n = 77
    _, flops, torchs = counted(get_recipe("exact"), n)
    last = n * QKV + REST
    assert flops.linear == 2 * (3 * n * (QKV + REST) + last + HEAD)
    assert flops.attention == 4 * 64 * (3 * triangle(n) + n)
    assert (flops.scoring, flops.factoring) == (0, 0)
    assert flops.linear == of(torchs, LINEAR)


def test_rows_that_go_no_further_take_nothing(counted):
    """FastKV: all rows up to layer 1, a fifth of them from there on; 8 queries score the rows of layer 1, and those of
    each layer once more to choose what is kept, in two passes over the keys."""
    n, deep = 200, 40
    _, flops, torchs = counted(get_recipe("fastkv"), n)
    last = deep * QKV + REST
    assert flops.linear == 2 * (2 * n * (QKV + REST) + deep * (QKV + REST) + last + HEAD)
    assert flops.attention == 4 * 64 * (2 * triangle(n) + triangle(deep) + deep)
    scored = [8 * rows - 28 + 8 * (rows - 8) for rows in (n, n, n, deep, deep)]
    assert flops.scoring == 2 * 64 * sum(scored)
    assert flops.linear == of(torchs, LINEAR)
    # torch multiplies the triangle of later keys, too, before it is masked: 28 pairs each time
    assert of(torchs, SCORES) == flops.scoring + 2 * 64 * 28 * 5


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("chunk", [64, 2048])
def test_the_engine_counts_what_was_foretold(model, counted, name, chunk):
    shape = model_shape(model.config)
    recipe, flops, _ = counted(get_recipe(name), 1100, chunk)
    foretold = prompt_flops(model.config, shape, recipe, 1100)
    for part in ("linear", "attention", "scoring", "factoring"):
        assert getattr(flops, part) == pytest.approx(getattr(foretold, part), rel=1e-12), part


@pytest.mark.parametrize(
    "key_codec",
    [{"kind": "lowrank", "rank": 12}, {"kind": "lowrank", "rank": 12, "bits": 8}, {"kind": "lowrank", "rank": 32}],
)
def test_factors_take_what_torch_counts(counted, key_codec):
    slots = {"key_codec": key_codec}
    _, flops, torchs = counted(get_recipe("lowrank", json.dumps(slots)), 300)
    rank = key_codec["rank"]
    # torch does not count Cholesky factors and triangular solves
    uncounted = 4 * 4 * (rank**3 / 3 + 32 * rank**2) if rank < 32 else 0
    assert flops.linear + flops.factoring - uncounted == pytest.approx(of(torchs, LINEAR), rel=1e-12)


def test_layers_that_are_packed_together_are_factored_together(counted):
    _, flops, torchs = counted(get_recipe("xkv"), 600)
    assert flops.factoring > 0
    assert flops.linear + 0.9 * flops.factoring < of(torchs, LINEAR) <= flops.linear + flops.factoring


def test_a_leading_subspace_takes_six_products_and_four_factors():
    gram = torch.eye(40, dtype=torch.float64)
    with FlopCounterMode(display=False) as torchs:
        leading_subspace(gram, 10)
    counted = of(torchs.get_flop_counts()["Global"], LINEAR)
    assert subspace_flops(40, 10) == counted + 4 * (10**3 / 3 + 40 * 10**2)


def test_an_answer_of_one_token_packs_no_last_layer(counted):
    _, whole, _ = counted(get_recipe("fastkv"), 200)
    _, short, _ = counted(get_recipe("fastkv"), 200, max_tokens=1)
    assert short.linear == whole.linear
    assert whole.scoring - short.scoring == 2 * 64 * (8 * 40 - 28 + 8 * 32)


def test_a_prompt_that_shares_its_packs_takes_what_it_takes_alone(model, prefill, prompt, sink, sampling):
    shape, engine = model_shape(model.config), prefill.engine(chunk=16, pack=48)
    jobs = []
    for name, length, recipe in (("a", 200, "fastkv"), ("b", 90, "exact")):
        resolved = resolve(get_recipe(recipe), shape, length, PROFILE).recipe
        jobs.append((PrefillJob(name, 1, prompt(length), resolved, sampling.greedy()), FlopCount()))
    for job, count in jobs:
        engine.submit(job, sink(job.request_id), count=count)
    prefill.run(engine)
    for job, count in jobs:
        foretold = prompt_flops(model.config, shape, job.recipe, len(job.prompt_ids))
        assert count.flops.total == pytest.approx(foretold.total, rel=1e-12)
