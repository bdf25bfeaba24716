"""Floating-point operations of a prompt by the shapes of its matrix products; a multiply-add counts as two.

Norms, rotations, activations and compression are left out: they are bound by bandwidth, and the fraction of the matrix
rate that a run reaches should pay for them.
"""

from __future__ import annotations

from ..compression.recipe import ModelShape, Recipe
from ..models.config import ModelConfig


def prompt_flops(config: ModelConfig, shape: ModelShape, recipe: Recipe | None, num_tokens: int) -> float:
    """Operations of one prompt up to its first token.

    Args:
        recipe: resolved; rows that it does not propagate are not counted, and of the last layer only what the first
            token depends on. None = a model that takes all rows through all layers, as transformers does.
    """
    total = 2.0 * config.hidden_size * config.vocab_size
    for layer in range(config.num_layers):
        rows = num_tokens
        if recipe is not None:
            rows = recipe.propagation.rows_at(layer, num_tokens, recipe.retrieval.chunk, recipe.window.sinks)
        is_last = layer + 1 == config.num_layers
        rows_on = 1 if is_last and recipe is not None else rows
        total += _layer_flops(config, rows, rows_on, shape.layer_windows[layer])
    return total


def _layer_flops(config: ModelConfig, rows: int, rows_on: int, window: int | None) -> float:
    """One layer: keys and values of all rows, everything else of the last `rows_on` of them."""
    width = config.num_heads * config.head_dim
    qkv = config.hidden_size * (width + 2 * config.num_kv_heads * config.head_dim)
    rest = config.hidden_size * width + 3 * config.hidden_size * config.intermediate_size
    pairs = _attended(rows, window) - _attended(rows - rows_on, window)
    return 2.0 * (rows * qkv + rows_on * rest) + 4.0 * width * pairs


def _attended(rows: int, window: int | None) -> float:
    """Pairs of a row and one that it sees, causally and within a sliding window."""
    if window is None or rows <= window:
        return rows * (rows + 1) / 2
    return window * (window + 1) / 2 + (rows - window) * window
