"""Which layers prompts that begin alike can share the beginning of, and how much of a prompt that is.

Free of torch: gateways foretell by it what a found beginning saves.
"""

from __future__ import annotations

from .layout import layer_layout
from .recipe import Recipe


def num_shared_layers(recipe: Recipe, num_tokens: int, num_layers: int) -> int:
    """The first layers, which every row of a prompt passes; at least 1.

    Args:
        recipe: resolved.
    """
    layer = 1
    while layer < num_layers and layer_layout(recipe, num_tokens, layer).num_rows == num_tokens:
        layer += 1
    return layer


def shared_share(recipe: Recipe, num_tokens: int, num_layers: int) -> float:
    """The share that the shared layers have of a prompt's rows, each counted in every layer that it passes; 0 to 1.

    Args:
        recipe: resolved.
    """
    shared = num_shared_layers(recipe, num_tokens, num_layers)
    deep = sum(layer_layout(recipe, num_tokens, layer).num_rows for layer in range(shared, num_layers))
    return shared * num_tokens / (shared * num_tokens + deep)
