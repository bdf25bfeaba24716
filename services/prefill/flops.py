"""Floating-point operations of prefill by the shapes of its matrix products; a multiply-add counts as two.

The engine adds up what it ran, work item by work item and layer by layer (`FlopCount`); `prompt_flops` says the same of
a prompt that nobody has run. Norms, rotations, activations and quantization are left out: they are bound by bandwidth.
Of a model whose heads lie on several ranks, this is what all of them do together.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...compression.flops import causal_pairs, factoring_flops, mass_flops, scoring_flops
from ...compression.recipe import ModelShape, Recipe
from ...models.config import ModelConfig


@dataclass(frozen=True)
class Flops:
    """Operations by what they are for.

    Attributes:
        linear: the model's linear maps, its head's of the last row included.
        attention: queries by keys and weights by values, over the pairs of rows that attend.
        scoring: queries by keys once more, to choose rows.
        factoring: factors of rows and what they are found by.
    """

    linear: float = 0.0
    attention: float = 0.0
    scoring: float = 0.0
    factoring: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.linear + other.linear,
            self.attention + other.attention,
            self.scoring + other.scoring,
            self.factoring + other.factoring,
        )

    @property
    def of_model(self) -> float:
        """What the model itself takes."""
        return self.linear + self.attention

    @property
    def total(self) -> float:
        """All of them."""
        return self.of_model + self.scoring + self.factoring


class FlopCount:
    """What one prompt has taken so far; the engine adds to it.

    Attributes:
        flops: so far.
    """

    def __init__(self) -> None:
        self.flops = Flops()

    def add(self, more: Flops) -> None:
        """Something has run."""
        self.flops += more


def item_flops(
    config: ModelConfig, shape: ModelShape, recipe: Recipe | None, layer: int, num_rows: int, begin: int, end: int
) -> Flops:
    """Rows [begin, end) of the `num_rows` that pass a layer: keys and values of all of them, everything else of those
    whose output anything depends on.

    Args:
        recipe: resolved; None = every row goes on from every layer, as in transformers.
    """
    width, hidden = config.num_heads * config.head_dim, config.hidden_size
    first = begin if recipe is None or layer + 1 < config.num_layers else max(begin, num_rows - 1)
    qkv = hidden * (width + 2 * config.num_kv_heads * config.head_dim)
    rest = hidden * width + 3 * hidden * config.intermediate_size
    window = shape.layer_windows[layer]
    pairs = causal_pairs(end, window) - causal_pairs(first, window) if first < end else 0.0
    seen = causal_pairs(end, window) - causal_pairs(begin, window)
    return Flops(
        linear=2.0 * ((end - begin) * qkv + max(0, end - first) * rest),
        attention=4.0 * width * pairs,
        scoring=0.0 if recipe is None else mass_flops(recipe, shape, seen),
    )


def layer_flops(shape: ModelShape, recipe: Recipe, layer: int, num_tokens: int) -> Flops:
    """What choosing and packing the rows of a finished layer takes.

    Args:
        recipe: resolved.
        num_tokens: of the prompt.
    """
    return Flops(
        scoring=scoring_flops(recipe, shape, layer, num_tokens),
        factoring=factoring_flops(recipe, shape, layer, num_tokens),
    )


def head_flops(config: ModelConfig) -> Flops:
    """The logits of the last row."""
    return Flops(linear=2.0 * config.hidden_size * config.vocab_size)


def prompt_flops(config: ModelConfig, shape: ModelShape, recipe: Recipe | None, num_tokens: int) -> Flops:
    """Operations of one prompt, its packed layers included.

    Args:
        recipe: resolved; rows that it does not propagate are not counted, and of the last layer only what the first
            token depends on. None = a model that takes all rows through all layers, as transformers does.
    """
    total = head_flops(config)
    for layer in range(config.num_layers):
        rows = num_tokens
        if recipe is not None:
            rows = recipe.propagation.rows_at(layer, num_tokens, recipe.retrieval.chunk, recipe.window.sinks)
            total += layer_flops(shape, recipe, layer, num_tokens)
        total += item_flops(config, shape, recipe, layer, rows, 0, rows)
    return total
