"""A decode step through the batched kernels: the tokens that sequences give one by one, whatever their recipes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from kvsluice.compression.cache import RecipeCache
from kvsluice.compression.recipe import get_recipe
from kvsluice.errors import InternalError
from kvsluice.evals.pipeline import LocalPipeline
from kvsluice.kernels.dispatch import TRITON
from kvsluice.models.sampling import SamplingParams
from kvsluice.services.decode import step as step_module
from kvsluice.services.decode.engine import FinishedEvent

SMALL = '{"retrieval": {"kind": "chunks", "chunk": 4, "outliers": 0, "budget_tokens": 32, "landmark_bits": 8}}'
RECIPES = ("exact", get_recipe("sluice", SMALL), "streaming", "kivi", "exact")
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture
def kernels(monkeypatch) -> Iterator[Callable[[], int]]:
    """Steps take the batched path, as on a GPU. Gives how many did."""
    taken = []
    compute = step_module.StepComputation.__call__

    def counted(self, inputs, tables):
        taken.append(tables.num_rows)
        return compute(self, inputs, tables)

    monkeypatch.setattr(step_module, "runs", lambda name, device: name == TRITON)
    monkeypatch.setattr(step_module.StepComputation, "__call__", counted)
    yield lambda: len(taken)


@pytest.fixture
def model(make_model):
    """The interpreter takes its time for every layer."""
    return make_model(2)


@pytest.fixture
def lookahead() -> bool:
    return True


def answers(model, prompt, requests) -> list[list[list[int]]]:
    pipeline = LocalPipeline(model, {"tsp_layer": 0, "fastkv_layer": 0})
    done = [one.token_ids for one in pipeline.generate_many(requests)]
    pipeline.check_integrity()
    return done


def test_a_mixed_batch_says_what_its_sequences_say_one_by_one(make_model, prompt, monkeypatch, kernels) -> None:
    model = make_model(2, hidden_size=128)
    requests = [(prompt(180 + 7 * seed, seed), recipe, GREEDY) for seed, recipe in enumerate(RECIPES)]
    with monkeypatch.context() as plain:
        plain.setattr(step_module, "runs", lambda name, device: False)
        expected = answers(model, prompt, requests)
    assert kernels() == 0
    assert answers(model, prompt, requests) == expected
    assert kernels() >= 11


def test_choices_that_share_a_prompt_have_tails_of_their_own(make_model, prompt, monkeypatch, kernels) -> None:
    model = make_model(2, hidden_size=128)
    drawn = SamplingParams(max_tokens=8, temperature=1.0, seed=5, n=3, ignore_eos=True)
    requests = [(prompt(90), "exact", drawn)]
    with monkeypatch.context() as plain:
        plain.setattr(step_module, "runs", lambda name, device: False)
        expected = answers(model, prompt, requests)
    assert len({tuple(ids) for ids in expected[0]}) > 1
    assert answers(model, prompt, requests) == expected


def test_a_packing_that_the_kernels_do_not_read_runs_beside_the_others(
    make_model, prompt, monkeypatch, kernels
) -> None:
    model = make_model(2, hidden_size=128)
    requests = [(prompt(150, seed), recipe, GREEDY) for seed, recipe in enumerate(("exact", "kivi", "exact"))]
    with monkeypatch.context() as plain:
        plain.setattr(step_module, "runs", lambda name, device: False)
        expected = answers(model, prompt, requests)
    serves = step_module.serves
    monkeypatch.setattr(
        step_module,
        "serves",
        lambda views, *rest: (
            serves(views, *rest)
            and not any(region.keys.layout.kind == "channel" for view in views for region in view.regions)
        ),
    )
    assert answers(model, prompt, requests) == expected
    assert kernels() >= 11


def test_a_sequence_without_room_for_its_row_fails_alone(bench, encode, prompt, sampling, monkeypatch, kernels) -> None:
    requests = {"goes on": encode(prompt(30), sampling.drawn(5)), "fails": encode(prompt(35, 1), sampling.drawn(5))}
    alone = bench()
    alone.start("goes on", requests["goes on"])
    with monkeypatch.context() as plain:
        plain.setattr(step_module, "runs", lambda name, device: False)
        alone.run()
    b = bench()
    for name, encoded in requests.items():
        b.start(name, encoded)
    reserve, steps = RecipeCache.reserve, []

    def short_of_memory(self, num_rows, like) -> None:
        if self._kit.num_prompt_tokens == 35 and len(steps) > 1:
            raise RuntimeError("secret")
        reserve(self, num_rows, like)

    monkeypatch.setattr(RecipeCache, "reserve", short_of_memory)
    while b.engine.has_work:
        steps.append(b.step())
    assert isinstance(b.ended("fails").error, InternalError) and len(b.tokens("fails")) == 2
    assert isinstance(b.ended("goes on"), FinishedEvent)
    assert b.tokens("goes on") == alone.tokens("goes on")
    assert kernels() == 4
