"""Positions that share a choice: who chooses, who follows, and that company does not matter."""

from __future__ import annotations

import pytest
import torch

from kvsluice.compression import bound_nbytes
from kvsluice.compression.kept_choice import KeptChoice
from kvsluice.compression.recipe import get_recipe, resolve
from kvsluice.errors import InvalidRecipe

SLOTS = (
    '{"retrieval": {"kind": "chunks", "chunk": 4, "outliers": 3, "budget_tokens": 24, "budget_rate": 0.05, '
    '"landmark_bits": 8, "select_every": %d}}'
)


def caches(lab, every: int, count: int):
    """Of one prompt of 501 tokens and its recipe."""
    shape = lab.make_shape(heads=4, kv_heads=2, dim=32, layers=2)
    prompt = lab.make_prompt(shape, 501, 140, 3)
    recipe = resolve(get_recipe("sluice-full", SLOTS % every), shape, 501, lab.PROFILE).recipe
    assert recipe.retrieval.select_every == every
    encoded, _ = lab.prefill(recipe, prompt)
    return prompt, recipe, [lab.load(recipe, prompt, encoded) for _ in range(count)]


def test_the_first_row_of_a_block_chooses_for_all():
    kept = KeptChoice(1, 2, 4, torch.device("cpu"))
    positions = torch.tensor([5, 6, 8, 9])
    chosen = torch.tensor([[[1, 2]], [[3, 4]], [[5, 6]], [[7, 0]]])
    valid = torch.tensor([[[True, True]], [[True, False]], [[True, False]], [[True, True]]])
    got, of_them = kept.settle(positions, chosen, valid)
    assert got.tolist() == [[[1, 2]], [[1, 2]], [[5, 6]], [[5, 6]]]
    assert of_them.tolist() == [[[True, True]], [[True, True]], [[True, False]], [[True, False]]]
    twin = kept.copy()
    got, of_them = kept.settle(torch.tensor([11, 12]), chosen[:2], None)
    assert (got.tolist(), of_them.tolist()) == ([[[5, 6]], [[3, 4]]], [[[True, False]], [[True, True]]])
    got, _ = twin.settle(torch.tensor([10]), chosen[3:], None)
    assert got.tolist() == [[[5, 6]]]


def test_rows_do_not_depend_on_how_many_run_together(lab):
    prompt, _, (one, other) = caches(lab, 4, 2)
    singles = lab.decode(one, prompt, 501, 641)
    together = lab.decode(other, prompt, 501, 641, run=37)
    for a, b in zip(singles, together, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_shared_choice_is_another_one_than_each_row_would_make(lab):
    prompt, _, (shared,) = caches(lab, 4, 1)
    _, _, (own,) = caches(lab, 1, 1)
    a, b = lab.decode(shared, prompt, 501, 505), lab.decode(own, prompt, 501, 505)
    for layer, other in zip(a, b, strict=True):
        same = [torch.equal(one, two) for one, two in zip(layer, other, strict=True)]
        assert same == [True, False, False, True], "positions 501 and 504 choose, 502 and 503 follow"


def test_what_is_kept_is_counted(lab):
    prompt, recipe, (cache,) = caches(lab, 8, 1)
    lab.decode(cache, prompt, 501, 641, run=16)
    assert cache.nbytes() <= bound_nbytes(recipe, prompt.shape, 501, 140, 1, 4)
    extra = sum(t.nbytes for layer in cache._layers.values() for t in layer.kept.tensors())
    plain = resolve(get_recipe("sluice-full", SLOTS % 1), prompt.shape, 501, lab.PROFILE).recipe
    assert extra == bound_nbytes(recipe, prompt.shape, 501, 1, 1, 4) - bound_nbytes(plain, prompt.shape, 501, 1, 1, 4)


@pytest.mark.parametrize("every", [0, 3, 32])
def test_other_numbers_are_refused(every):
    with pytest.raises(InvalidRecipe, match=r"recipe\.retrieval\.select_every: got .*1, 2, 4, 8, 16"):
        get_recipe("sluice-full", SLOTS % every)
