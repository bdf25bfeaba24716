"""Floating-point operations of the matrix products of compression, by shapes; a multiply-add counts as two.

Scores are products of queries and keys; factors are what `CodecFilling.flops` says. Pooling, choosing, quantizing and
copying rows are left out: they are bound by bandwidth. Free of torch.
"""

from __future__ import annotations

from .layout import layer_layout
from .spec import ModelShape, Recipe

PASSES = 2  # over the keys, of attention's weights as scores: the softmax's denominators come first


def causal_pairs(num_rows: int, window: int | None) -> float:
    """Pairs of one of `num_rows` rows and a row that it sees, itself included.

    Args:
        window: how many rows at most it sees; None = all before it. Where rows were left out between, a sliding window
            of positions holds fewer rows, so this is the most.
    """
    if window is None or num_rows <= window:
        return num_rows * (num_rows + 1) / 2
    return window * (window + 1) / 2 + (num_rows - window) * window


def mass_flops(recipe: Recipe, shape: ModelShape, pairs: float) -> float:
    """Operations of summing up the attention that rows receive, over so many pairs of a row and one that it sees; 0
    where the recipe does not ask for it."""
    if not (recipe.budget.needs_scores and recipe.scorer.wants_mass):
        return 0.0
    return PASSES * 2.0 * shape.num_heads * shape.head_dim * pairs


def scoring_flops(recipe: Recipe, shape: ModelShape, layer: int, num_tokens: int) -> float:
    """Operations of the scores that a finished layer's rows get from its last queries.

    Args:
        recipe: resolved.
        num_tokens: of the prompt.
    """
    at = layer_layout(recipe, num_tokens, layer)
    total = 0.0
    if at.num_rows != layer_layout(recipe, num_tokens, layer + 1).num_rows:
        total += _window_flops(shape, layer, at.num_rows, recipe.propagation.window)
    evicts = at.num_sealed < at.num_rows - at.num_sinks - at.num_tail
    if evicts and at.num_sealed + at.num_demoted and not recipe.scorer.wants_mass:
        total += _window_flops(shape, layer, at.num_rows, recipe.scorer.window)
    return total


def _window_flops(shape: ModelShape, layer: int, num_rows: int, num_queries: int) -> float:
    """Operations of `window_saliency`: the denominators take all keys, the weights those before the queries."""
    window = shape.layer_windows[layer]
    pairs = causal_pairs(num_rows, window) - causal_pairs(num_rows - num_queries, window)
    return 2.0 * shape.num_heads * shape.head_dim * (PASSES * pairs - causal_pairs(num_queries, window))


def factoring_flops(recipe: Recipe, shape: ModelShape, layer: int, num_tokens: int) -> float:
    """Operations of a finished layer's codecs; of layers that are packed together, with the last of them.

    Args:
        recipe: resolved.
        num_tokens: of the prompt.
    """
    at = layer_layout(recipe, num_tokens, layer)
    if not at.num_sealed + at.num_demoted:
        return 0.0
    group = recipe.sharing.group(layer, shape.num_layers)
    joins, heads, dim = recipe.sharing.layers > 1, shape.num_kv_heads, shape.head_dim
    total = 0.0
    for tier, rows in zip(recipe.tiers(), (at.num_sealed, at.num_demoted), strict=False):
        for codec, joined in ((tier.key_codec, joins), (tier.value_codec, joins and recipe.sharing.values)):
            if not joined:
                total += codec.flops(rows, heads, dim)
            elif layer == group[-1]:
                together = codec.joined(len(group))
                assert together is not None, "checked with the recipe"
                total += together.flops(rows, len(group) * heads, dim)
    return total
