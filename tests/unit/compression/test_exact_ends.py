"""The exact rows at both ends: what they are kept in, whatever the prompt leaves of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvsluice.compression import bound_nbytes
from kvsluice.compression import slots as s
from kvsluice.compression.recipe import get_recipe, resolve


@pytest.mark.parametrize("dtype", ["native", "bfloat16"])
@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("num_tokens", [63, 64, 65])
def test_exact_ends_keep_their_dtype_whatever_the_prompt_leaves(
    dtype: str, block: int, num_tokens: int, lab: Any
) -> None:
    ends = s.ExactEnds(local=0, seal_block=block, dtype=dtype)
    shape = lab.make_shape(heads=2, kv_heads=1, dim=8, layers=2)
    effective = resolve(replace(get_recipe("exact"), window=ends), shape, num_tokens, {}).recipe
    assert effective.window == (ends if num_tokens >= block else get_recipe("exact").window)
    prompt = lab.make_prompt(shape, num_tokens, 150)
    cache = lab.load(effective, prompt, lab.prefill(effective, prompt)[0])
    outs = lab.decode(cache, prompt, num_tokens, num_tokens + 150, run=7)
    tail = {t.dtype for layer in cache._layers.values() for t in layer.tail.tensors()}
    assert tail == {torch.bfloat16 if effective.window.dtype == "bfloat16" else torch.float32}
    assert cache.nbytes() <= bound_nbytes(effective, shape, num_tokens, 150, 1, 4)
    expected = lab.dense(prompt, 1, torch.arange(num_tokens), num_tokens + 149)
    assert torch.allclose(outs[1][-1], expected, atol=2e-2 if dtype == "bfloat16" else 2e-5)


def test_the_last_row_is_never_packed_ahead(lab):
    """A device may still be writing it."""
    shape = lab.make_shape()
    prompt = lab.make_prompt(shape, 704, 64)
    recipe = resolve(get_recipe("fp8"), shape, 704, lab.PROFILE).recipe
    encoded, _ = lab.prefill(recipe, prompt)
    cache = lab.load(recipe, prompt, encoded)
    assert recipe.window.local == 0 and recipe.block == 32
    for position in range(704, 736):
        lab.step(cache, prompt, position, position + 1)
        assert cache.prepare_seal(768, 99) == 0
    lab.step(cache, prompt, 736, 737)  # late, so that there is a row behind the block
    assert cache.prepare_seal(768, 99) == shape.num_layers


@pytest.mark.parametrize("name", ["kivi", "sluice", "lowrank", "mikv", "streaming", "exact"])
def test_a_block_that_is_packed_ahead_is_the_one_that_is_sealed(lab, name):
    shape = lab.make_shape()
    prompt = lab.make_prompt(shape, 700, 200)
    recipe = resolve(get_recipe(name), shape, 700, lab.PROFILE).recipe
    encoded, _ = lab.prefill(recipe, prompt)
    plain, ahead = (lab.load(recipe, prompt, encoded) for _ in range(2))
    most = bound_nbytes(recipe, shape, 700, 200, 1, 4)
    packed = 0
    for position in range(700, 900):
        for cache in (plain, ahead):
            cache.seal(position)
        for one, other in zip(
            lab.step(plain, prompt, position, position + 1),
            lab.step(ahead, prompt, position, position + 1),
            strict=True,
        ):
            assert torch.equal(one, other)
        packed += ahead.prepare_seal(899, 1 + position % 3)
        assert ahead.nbytes() <= most
    assert plain.nbytes() == ahead.nbytes()
    assert (packed > 0) == (recipe.window.seal_block > 0 and not recipe.budget.fixed)
