"""The decode step's attention over the caches of several sequences, against each cache by itself.

Only the first of two layers is attended to; its bytes are what the caches count as read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..compression import make_cache
from ..compression.interfaces import SequenceCache
from ..compression.recipe import ModelShape, Recipe, get_recipe, resolve
from ..kernels.dispatch import TRITON, runs
from ..kernels.rope import apply_rope
from ..kernels.step_attention import StepAttention, sequence_block, serves, step_tables
from ..models.rope import RotaryEmbedding
from .kernel_cases import Case, Inputs, folder
from .synthetic import SyntheticLayers

RECIPES = ("exact", "kivi", "sluice", "shadowkv")
SEQUENCES = (1, 8)
LAYERS = 2  # the fewest that recipes with selective propagation take


def step_cases(given: Inputs) -> Iterator[Case]:
    """One layer of a step, for the recipes that the prompt is long enough for."""
    config = given.config
    shape = ModelShape(LAYERS, config.num_heads, config.num_kv_heads, config.head_dim, 1 << 30, (None,) * LAYERS)
    for name in RECIPES:
        resolved = resolve(get_recipe(name), shape, given.num_tokens, {})
        if resolved.fallback_reason is None:
            for count in SEQUENCES:
                caches = [_cache(given, resolved.recipe, shape, index) for index in range(count)]
                yield _case(given, f"step_attention, {name} × {count}", caches)


def _cache(given: Inputs, recipe: Recipe, shape: ModelShape, index: int) -> SequenceCache:
    rotary = RotaryEmbedding(given.config.rope, shape.head_dim, given.device)

    def rope(x: Tensor, positions: Tensor) -> Tensor:
        return apply_rope(x, *rotary.tables(positions, given.num_tokens))

    cache = make_cache(recipe, shape, given.num_tokens, rope)
    generator = torch.Generator(given.device).manual_seed(given.seed + index)
    layers = SyntheticLayers(recipe, shape, given.num_tokens, given.dtype, generator)
    for layer in range(LAYERS):
        cache.add_layer(layers.layer(layer))
    row = given.random(1, shape.num_kv_heads, shape.head_dim)
    for layer in range(LAYERS):
        cache.append(layer, row, row, row, given.positions(given.num_tokens, given.num_tokens + 1))
    return cache


def _case(given: Inputs, name: str, caches: Sequence[SequenceCache]) -> Case:
    count = len(caches)
    q = given.queries(count)
    at = torch.full((count,), given.num_tokens, device=given.device)

    def alone() -> list[Tensor]:
        return [cache.attend(0, q[i : i + 1], at[i : i + 1]) for i, cache in enumerate(caches)]

    before = sum(cache.counter.bytes_read for cache in caches)
    alone()
    moved = sum(cache.counter.bytes_read for cache in caches) - before + 2 * q.nbytes
    together = _together(given, caches, q, at) if runs(TRITON, given.device) else None
    return Case(name, folder(StepAttention), together or alone, float(moved), reference=alone)


def _together(given: Inputs, caches: Sequence[SequenceCache], q: Tensor, at: Tensor) -> Callable[[], Tensor] | None:
    """The kernels' step over the caches, which it keeps alive; None where the kernels do not read their packing."""
    config = given.config
    for cache in caches:
        cache.reserve(1, given.random(1, config.num_kv_heads, config.head_dim))
    views = [cache.views() for cache in caches]
    # where angles depend on the prompt's length, the kernels do not rotate keys
    if not all(serves(one, config.head_dim, config.rope.kind != "dynamic") for one in views):
        return None
    tables = step_tables([sequence_block(one) for one in views]).to(given.device)
    frequencies = RotaryEmbedding(config.rope, config.head_dim, given.device).inverse_frequencies
    step = StepAttention(tables, config.num_kv_heads, frequencies, config.rope.attention_factor)

    def together(views: object = views) -> Tensor:
        return step.attend(0, q, at, None)

    return together
