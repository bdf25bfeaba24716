"""Which rows of a layer lie where, for a resolved recipe and a prompt's length. Free of torch.

Everything goes by original position, on one grid for all layers (block = `Recipe.block`, B):

    position  0        sinks                    sealed_end = floor((N - local) / B) * B      N
              [ sinks  | sealed: packed by the codecs | tail: exact .......................... ] generated rows ...
                exact    rows that are here and kept    later sealed in blocks [bB, (b+1)B)

Below TSP's layer all N rows are here, above it the selected ones; a budget keeps some of the sealed rows, while
sinks and tail are always whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from .codec_slots import Specs, TensorSpec
from .spec import ModelShape, Recipe

NEVER = 1 << 30  # rows until a seal that never comes


class Part(IntEnum):
    """Which part of a layer's cache a tensor belongs to; the numbers are those of `frame.proto`'s Kind."""

    KEYS = 1
    VALUES = 2
    BASIS = 3
    OUTLIERS = 4
    POSITIONS = 5
    HIDDEN = 6
    TAIL = 7


@dataclass(frozen=True)
class LayerLayout:
    """Row counts of one layer of one prompt.

    Attributes:
        num_rows: rows that pass the layer.
        num_sinks, num_sealed, num_tail: rows of its regions, `num_sealed` per KV head.
        sealed_end: position at which the tail starts.
        contiguous: the sealed rows are all positions of [sinks, sealed_end).
        per_head: each KV head has sealed rows of its own.
    """

    num_rows: int
    num_sinks: int
    num_sealed: int
    num_tail: int
    sealed_end: int
    contiguous: bool
    per_head: bool


def sealed_end(recipe: Recipe, next_position: int) -> int:
    """Position up to which rows are sealed when the next row will have `next_position`."""
    return max(0, (next_position - recipe.window.local) // recipe.block * recipe.block)


def rows_until_seal(recipe: Recipe, num_tokens: int, position: int) -> int:
    """Rows from `position` on that may be appended before a block is due to be sealed."""
    if not recipe.window.seal_block:
        return NEVER
    block, local = recipe.block, recipe.window.local
    first_end = sealed_end(recipe, num_tokens) + block
    due = max((position - local) // block * block + block, first_end) + local
    return max(1, due - position)


def layer_layout(recipe: Recipe, num_tokens: int, layer: int) -> LayerLayout:
    """Regions of one layer of a prompt of `num_tokens`."""
    sinks, chunk = recipe.window.sinks, recipe.retrieval.chunk
    end = sealed_end(recipe, num_tokens)
    num_rows = recipe.propagation.rows_at(layer, num_tokens, chunk, sinks)
    num_tail = num_tokens - end
    kept = recipe.budget.kept_rows(num_rows, num_tokens)
    num_sealed = max(0, kept - sinks - num_tail)
    return LayerLayout(
        num_rows=num_rows,
        num_sinks=sinks,
        num_sealed=num_sealed,
        num_tail=num_tail,
        sealed_end=end,
        contiguous=num_sealed == end - sinks,
        per_head=num_sealed < end - sinks and not recipe.budget.head_shared,
    )


def layer_specs(recipe: Recipe, shape: ModelShape, num_tokens: int, layer: int, native: str) -> dict[Part, Specs]:
    """Every tensor of one encoded layer, in the order in which it is sent. `native` is the compute dtype."""
    at = layer_layout(recipe, num_tokens, layer)
    heads, dim, chunk = shape.num_kv_heads, shape.head_dim, recipe.retrieval.chunk
    exact = native if recipe.window.dtype == "native" else recipe.window.dtype
    specs: dict[Part, Specs] = {}
    if at.num_sealed:
        specs[Part.BASIS] = recipe.key_codec.basis_specs(heads, dim)
        specs[Part.KEYS] = recipe.key_codec.tensor_specs(at.num_sealed, heads, dim, native)
        specs[Part.VALUES] = recipe.value_codec.tensor_specs(at.num_sealed, heads, dim, native)
        if at.per_head:
            specs[Part.POSITIONS] = {"rows": TensorSpec("int32", (at.num_sealed, heads))}
        elif not at.contiguous:
            specs[Part.POSITIONS] = {"chunks": TensorSpec("int32", (at.num_sealed // chunk,))}
        outliers = min(recipe.retrieval.outliers, at.num_sealed // chunk)
        if outliers:
            rows = TensorSpec(exact, (outliers * chunk, heads, dim))
            specs[Part.OUTLIERS] = {"chunks": TensorSpec("int32", (outliers, heads)), "k": rows, "v": rows}
    ends = (("sink_k", at.num_sinks), ("sink_v", at.num_sinks), ("k", at.num_tail), ("v", at.num_tail))
    specs[Part.TAIL] = {name: TensorSpec(exact, (rows, heads, dim)) for name, rows in ends if rows}
    return {part: group for part, group in specs.items() if group}


def tail_is_unrotated(recipe: Recipe) -> bool:
    """Whether the tail holds keys before RoPE, because they will be sealed by a codec of that domain."""
    return recipe.window.seal_block > 0 and recipe.key_codec.domain == "pre_rope"


def short_reason(recipe: Recipe, num_layers: int, num_tokens: int) -> str | None:
    """Why a prompt is too short for a recipe on a model of `num_layers`, or None."""
    window, retrieval = recipe.window, recipe.retrieval
    end = sealed_end(recipe, num_tokens)
    if end <= window.sinks:
        return f"{num_tokens} tokens are no more than the {window.sinks + window.local} exact ones at both ends"
    if recipe.propagation.too_short(num_tokens, retrieval.chunk, window.sinks):
        return f"{num_tokens} tokens leave nothing to select beside the window of {recipe.propagation.window}"
    if recipe.budget.evicts:
        kept = recipe.budget.kept_rows(num_tokens, num_tokens)
        if kept <= max(recipe.scorer.window, num_tokens - end) + window.sinks:
            return f"{num_tokens} tokens leave a budget of {kept}, no more than the window of {recipe.scorer.window}"
    if retrieval.needs_grid:
        attended = (retrieval.selected_chunks(num_tokens) + retrieval.outliers) * retrieval.chunk
        if end - window.sinks <= attended:
            return f"{num_tokens} tokens are no more than the {attended} that a step attends to"
    fewest = min(layer_layout(recipe, num_tokens, layer).num_sealed for layer in range(num_layers))
    for codec in (recipe.key_codec, recipe.value_codec):
        if fewest < codec.min_rows():
            return f"{num_tokens} tokens leave a layer {fewest} rows to pack, fewer than the rank, {codec.min_rows()}"
    return None
