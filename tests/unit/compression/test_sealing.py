"""Blocks of many choices that are sealed together, against each that is sealed by itself."""

from __future__ import annotations

import pytest
import torch

from kvsluice.compression import bound_nbytes
from kvsluice.compression.recipe import get_recipe, resolve
from kvsluice.compression.sealing import own_angles, prepare_seals, settle_tails
from kvsluice.kernels.dispatch import TRITON, forced
from kvsluice.kernels.step_attention import sequence_block, shifted

FEW = '{"retrieval": {"kind": "chunks", "chunk": 4, "outliers": 0, "budget_tokens": 64, "budget_rate": 0.05, '
CODECS = {
    "lowrank": '"key_codec": {"kind": "lowrank", "rank": 12, "bits": 8}}',
    "affine": '"key_codec": {"kind": "affine", "bits": 4, "axis": "channel", "group": 32}}',
}
RECIPES = {
    "sluice lowrank": ("sluice", FEW + '"landmark_bits": 8}, ' + CODECS["lowrank"]),
    "sluice channel": ("sluice-full", FEW + '"landmark_bits": 16}, ' + CODECS["affine"]),
    "kivi": ("kivi", ""),
    "mikv": ("mikv", '{"budget": {"kind": "uniform", "rate": 0.4, "recent": 0.5}}'),
    "fp8": ("fp8", ""),
    "streaming": ("streaming", ""),
}
START, NEW = 380, 78
ATTENDS = 13  # rows between those that are attended from, which takes the most time here


class Choice:
    """One choice of a prompt, sealed by itself, and one that is sealed with others."""

    def __init__(self, lab, name: str, shape, num_tokens: int, seed: int = 0) -> None:
        self.lab = lab
        self.prompt = lab.make_prompt(shape, num_tokens, NEW, seed)
        self.recipe = resolve(get_recipe(*RECIPES[name]), shape, num_tokens, lab.PROFILE | {"tsp_layer": 0}).recipe
        assert self.recipe.window.seal_block
        encoded, _ = lab.prefill(self.recipe, self.prompt)
        self.alone, self.together = (lab.load(self.recipe, self.prompt, encoded) for _ in range(2))
        self.most = bound_nbytes(self.recipe, shape, num_tokens, NEW, 1, 4)
        self.position, self.last = num_tokens, num_tokens + NEW - 2

    def step(self, caches) -> list:
        """Append one row to each cache, and attend from some."""
        at = torch.tensor([self.position])
        outs = []
        for cache in caches:
            cache.seal(self.position)
            if self.position % ATTENDS == 0:
                outs.append(self.lab.step(cache, self.prompt, self.position, self.position + 1))
                continue
            for layer in range(self.prompt.shape.num_layers):
                cache.append(layer, *(getattr(self.prompt, name)[layer][at] for name in ("k_pre", "k", "v")), at)
        self.position += 1
        return outs

    def check(self) -> None:
        """Both hold the same rows, packed by the same rules, and no more than was reserved."""
        assert self.together.nbytes() <= self.most
        for one, other in zip(self.alone.layers(), self.together.layers(), strict=True):
            assert (one.tail.begin, one.tail.num_rows) == (other.tail.begin, other.tail.num_rows)
            for mine, theirs in zip(one.tail.rows(), other.tail.rows(), strict=True):
                assert torch.equal(mine, theirs)
            if one.grown is not None:
                assert one.grown.num_rows == other.grown.num_rows
                for name in ("keys", "values", "summary"):
                    _check_tensors(getattr(one.grown, name), getattr(other.grown, name))


def _check_tensors(wanted, found) -> None:
    assert list(wanted) == list(found)
    for name, tensor in wanted.items():
        other = found[name]
        assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype)
        if tensor.dtype in (torch.uint8, torch.int8):
            # sums in another order move few numbers over the edge between two codes, of which a byte holds several
            assert (tensor != other).float().mean() < 0.02
        else:
            torch.testing.assert_close(tensor.float(), other.float(), rtol=1e-2, atol=1e-3)


def run(choices, steps: int, most_layers: int = 1000) -> None:
    """Steps of all choices; the ones sealed together are packed ahead as a step of the engine does."""
    for _ in range(steps):
        caches = [choice.together for choice in choices]
        outs = [choice.step((choice.alone, choice.together)) for choice in choices]
        for alone, together in filter(None, outs):
            for one, other in zip(alone, together, strict=True):
                torch.testing.assert_close(one, other, atol=2e-3, rtol=1e-2)
        with forced(TRITON):
            settle_tails(caches)
            angles = own_angles(choices[0].alone._kit)
            prepare_seals(caches, [choice.last for choice in choices], most_layers, angles, [])


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_sealed_together_is_what_each_seals(name, lab):
    shape = lab.make_shape(dim=16, layers=2)
    choices = [Choice(lab, name, shape, START + 21 * seed, seed) for seed in range(2)]
    run(choices, NEW - 1)
    for choice in choices:
        choice.check()
        assert choice.alone.counter.bytes_read == choice.together.counter.bytes_read


def test_choices_of_different_recipes(lab):
    shape = lab.make_shape(dim=32, layers=2)
    choices = [Choice(lab, name, shape, START + i, i) for i, name in enumerate(RECIPES)]
    run(choices, 70, most_layers=3)
    for choice in choices:
        choice.check()


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_heads_of_other_sizes(dim, kv_heads, lab):
    shape = lab.make_shape(heads=2, kv_heads=kv_heads, dim=dim, layers=2)
    choices = [Choice(lab, name, shape, START, i) for i, name in enumerate(("sluice lowrank", "sluice channel"))]
    run(choices, 40)
    for choice in choices:
        choice.check()


@pytest.mark.parametrize("name", ["sluice lowrank", "sluice channel", "kivi"])
def test_the_bits_depend_neither_on_company_nor_on_when(name, lab):
    """Packed ahead with another, packed when it is due, and packed in a choice that was forked on the way."""
    shape = lab.make_shape(dim=32, layers=2)
    one, other = (Choice(lab, name, shape, START, 1) for _ in range(2))
    company = Choice(lab, "sluice lowrank", shape, START + 5, 2)
    fork = None
    for step in range(NEW - 1):
        if step == 30:
            fork = one.together.fork()
        with forced(TRITON):
            for choice in (one, other, company):
                choice.together.seal(choice.position)
            if fork is not None:
                fork.seal(one.position)
        if fork is not None:
            one.step((fork,))
            one.position -= 1
        for choice in (one, other, company):
            choice.step((choice.together,))
        with forced(TRITON):
            caches = [one.together, company.together]
            settle_tails(caches)
            prepare_seals(caches, [one.last, company.last], 1000, own_angles(one.alone._kit), [])
            assert fork is None or fork.sealing() is not None
    for layers in zip(one.together.layers(), other.together.layers(), fork.layers(), strict=True):
        wanted = layers[0].grown
        assert wanted.num_rows >= 32
        for layer in layers[1:]:
            for part in ("keys", "values", "summary"):
                for name_, tensor in getattr(wanted, part).items():
                    assert torch.equal(tensor.view(torch.uint8), getattr(layer.grown, part)[name_].view(torch.uint8))
    assert one.together.nbytes() <= one.most and fork.nbytes() <= one.most


@pytest.mark.parametrize("name", RECIPES)
def test_tables_are_brought_up_to_date_as_they_would_be_made_anew(name, lab):
    shape = lab.make_shape(dim=32, layers=2)
    choice = Choice(lab, name, shape, 620)  # so many that no layer has fewer rows than are chosen
    cache, block, moves, num_shifts = choice.together, None, None, 0
    for _ in range(NEW - 1):
        choice.step((cache,))
        with forced(TRITON):
            settle_tails([cache])
            cache.reserve(1, choice.prompt.k[0][:1])
            shift = cache.shift() if block is not None and moves == cache.moves else None
            prepare_seals([cache], [choice.last], 1000, own_angles(choice.alone._kit), [])
        counted = cache._read_nbytes
        wanted = sequence_block(cache.views())
        found = None if shift is None else shifted(block, shift)
        if found is not None:
            num_shifts += 1
            assert counted == cache._read_nbytes
            assert found.shape == wanted.shape
            for ours, theirs in (
                (found.items, wanted.items),
                (found.choices, wanted.choices),
                (found.tails, wanted.tails),
            ):
                assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
            assert (found.most_chunks, found.most_chosen) == (wanted.most_chunks, wanted.most_chosen)
        block, moves = wanted if found is None else found, cache.moves
    assert num_shifts > 10
