"""Which rows of a layer lie where, for a resolved recipe and a prompt's length. Free of torch.

Everything goes by original position, on one grid for all layers (block = `Recipe.block`, B):

    position  0        sinks                    sealed_end = floor((N - local) / B) * B      N
              [ sinks  | sealed: packed by the codecs | tail: exact .......................... ] generated rows ...
                exact    rows that are here and kept    later sealed in blocks [bB, (b+1)B)

Below TSP's layer all N rows are here, above it the selected ones; a budget keeps some of the sealed rows, and those
that it does not keep are gone or stay as a second tier of lower precision. Sinks and tail are always whole.

Rows that do not pass TSP's layer may be kept as they are behind it, to be recalled in decode: `Part.HIDDEN` of it.

Layers that share (`Recipe.sharing`) have the packed rows in the first of them, each with a basis of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from .codec_slots import CodecFilling, Specs, TensorSpec
from .propagation_slots import RecallPlan
from .spec import ModelShape, Recipe, Tier

NEVER = 1 << 30  # rows until a seal that never comes
TAIL_ROWS = 64  # a tail's capacity is a multiple of this


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
        num_demoted: rows per KV head between sinks and tail that stay at lower precision.
        sealed_end: position at which the tail starts.
        contiguous: the sealed rows are all positions of [sinks, sealed_end).
        per_head: each KV head has sealed rows of its own.
    """

    num_rows: int
    num_sinks: int
    num_sealed: int
    num_demoted: int
    num_tail: int
    sealed_end: int
    contiguous: bool
    per_head: bool


def sealed_end(recipe: Recipe, num_tokens: int, next_position: int) -> int:
    """Position up to which rows are sealed when the next row will have `next_position`, after a prompt of
    `num_tokens`."""
    return max(0, (next_position - recipe.window.local_rows(num_tokens)) // recipe.block * recipe.block)


def rows_until_seal(recipe: Recipe, num_tokens: int, position: int) -> int:
    """Rows from `position` on that may be appended before a block is due to be sealed."""
    if not recipe.window.seal_block:
        return NEVER
    block, local = recipe.block, recipe.window.local_rows(num_tokens)
    first_end = sealed_end(recipe, num_tokens, num_tokens) + block
    due = max((position - local) // block * block + block, first_end) + local
    return max(1, due - position)


def layer_layout(recipe: Recipe, num_tokens: int, layer: int) -> LayerLayout:
    """Regions of one layer of a prompt of `num_tokens`."""
    sinks, chunk = recipe.window.sinks, recipe.retrieval.chunk
    end = sealed_end(recipe, num_tokens, num_tokens)
    num_rows = recipe.propagation.rows_at(layer, num_tokens, chunk, sinks)
    num_tail = num_tokens - end
    between = num_rows - sinks - num_tail
    kept = recipe.budget.kept_rows(layer, num_rows, num_tokens, recipe.scorer.window)
    num_sealed = max(0, min(kept - sinks - num_tail, between))
    return LayerLayout(
        num_rows=num_rows,
        num_sinks=sinks,
        num_sealed=num_sealed,
        num_demoted=between - num_sealed if recipe.evicted.keeps else 0,
        num_tail=num_tail,
        sealed_end=end,
        contiguous=num_sealed == end - sinks,
        per_head=num_sealed < between and recipe.budget.heads == "own",
    )


def grown_tier(recipe: Recipe, at: LayerLayout) -> int:
    """Index of the tier that a layer's generated rows are sealed in: the lowest that it has."""
    return len(recipe.tiers()) - 1 if at.num_demoted else 0


def basis_name(tier: Tier, of_values: bool, name: str) -> str:
    """Name of a tensor that all rows of a tier share; keys, values and tiers have one part for theirs."""
    return f"{tier.prefix}{'value_' if of_values else ''}{name}"


def joined_codecs(recipe: Recipe, layer: int, num_layers: int) -> tuple[CodecFilling, CodecFilling]:
    """The key and value codecs of the kept rows of a layer, as wide as the group of layers that share there."""
    size = len(recipe.sharing.group(layer, num_layers))
    keys, values = recipe.key_codec, recipe.value_codec
    if recipe.sharing.layers > 1:
        keys = keys.joined(size) or keys
        values = (values.joined(size) or values) if recipe.sharing.values else values
    return keys, values


def layer_specs(recipe: Recipe, shape: ModelShape, num_tokens: int, layer: int, native: str) -> dict[Part, Specs]:
    """Every tensor of one encoded layer, in the order in which it is sent. `native` is the compute dtype."""
    at = layer_layout(recipe, num_tokens, layer)
    specs = _sealed_specs(recipe, shape, at, layer, native)
    chunk, heads, dim = recipe.retrieval.chunk, shape.num_kv_heads, shape.head_dim
    exact = native if recipe.window.dtype == "native" else recipe.window.dtype
    if at.num_sealed:
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
    specs[Part.HIDDEN] = hidden_specs(recipe, shape, num_tokens, layer)
    return {part: group for part, group in specs.items() if group}


def recall_plan(recipe: Recipe, num_tokens: int) -> RecallPlan | None:
    """What decode may recall of a prompt; None = nothing."""
    return recipe.propagation.recall_plan(num_tokens, recipe.retrieval.chunk, recipe.window.sinks)


def outliers_are_indexed(recipe: Recipe, num_tokens: int, layer: int) -> bool:
    """Whether rows of the prompt attend in this layer, which see outliers up to their own positions only."""
    plan = recall_plan(recipe, num_tokens)
    return plan is not None and layer > plan.layer


def hidden_specs(recipe: Recipe, shape: ModelShape, num_tokens: int, layer: int) -> Specs:
    """Rows behind a layer that are kept to be recalled, packed as those of one head, and the ids of their chunks."""
    plan = recall_plan(recipe, num_tokens)
    if plan is None or layer != plan.layer:
        return {}
    packed = recipe.propagation.hidden_codec.tensor_specs(plan.num_hidden * plan.chunk, 1, shape.hidden_size, "native")
    return {"chunks": TensorSpec("int32", (plan.num_hidden,)), **packed}


def _sealed_specs(recipe: Recipe, shape: ModelShape, at: LayerLayout, layer: int, native: str) -> dict[Part, Specs]:
    """Packed rows of all tiers and what they share."""
    heads, dim = shape.num_kv_heads, shape.head_dim
    specs: dict[Part, Specs] = {Part.BASIS: {}, Part.KEYS: {}, Part.VALUES: {}}
    leads = layer == recipe.sharing.group(layer, shape.num_layers)[0]
    for tier, num_rows in zip(recipe.tiers(), (at.num_sealed, at.num_demoted), strict=False):
        if not num_rows:
            continue
        codecs = tier.key_codec, tier.value_codec
        if not tier.prefix:
            codecs = joined_codecs(recipe, layer, shape.num_layers)
        shared = (recipe.sharing.layers > 1, recipe.sharing.layers > 1 and recipe.sharing.values)
        for part, codec, is_shared in zip((Part.KEYS, Part.VALUES), codecs, shared, strict=True):
            for name, spec in codec.basis_specs(heads, dim).items():
                specs[Part.BASIS][basis_name(tier, part is Part.VALUES, name)] = spec
            if leads or not is_shared:
                packed = codec.tensor_specs(num_rows, heads, dim, native)
                specs[part] |= {tier.prefix + name: spec for name, spec in packed.items()}
    return specs


def tail_is_unrotated(recipe: Recipe, at: LayerLayout) -> bool:
    """Whether a layer's tail holds keys before RoPE, because they will be sealed by a codec of that domain."""
    return recipe.window.seal_block > 0 and recipe.tiers()[grown_tier(recipe, at)].key_codec.domain == "pre_rope"


def sinks_are_unrotated(recipe: Recipe) -> bool:
    """Whether sinks are held before RoPE, because their positions move with the rows at the end."""
    return recipe.window.positions == "cache"


def short_reason(recipe: Recipe, shape: ModelShape, num_tokens: int) -> str | None:
    """Why a prompt is too short for a recipe on a model, or None."""
    window, retrieval = recipe.window, recipe.retrieval
    end = sealed_end(recipe, num_tokens, num_tokens)
    if end <= window.sinks:
        exact = window.sinks + window.local_rows(num_tokens)
        return f"{num_tokens} tokens leave no block of {recipe.block} beside the {exact} exact ones at both ends"
    if recipe.budget.fixed and not window.local and window.local_rate and window.local_rows(num_tokens) < recipe.block:
        local = window.local_rows(num_tokens)
        return f"{num_tokens} tokens leave {local} local rows, fewer than the {recipe.block} that are forgotten at once"
    if recipe.propagation.too_short(num_tokens, retrieval.chunk, window.sinks):
        return f"{num_tokens} tokens leave nothing to select beside the window of {recipe.propagation.window}"
    if recipe.budget.needs_scores:
        kept = min(
            recipe.budget.kept_rows(layer, num_tokens, num_tokens, recipe.scorer.window)
            for layer in range(shape.num_layers)
        )
        if kept <= max(recipe.scorer.window, num_tokens - end) + window.sinks:
            return f"{num_tokens} tokens leave a budget of {kept}, no more than what is kept at both ends"
    if retrieval.needs_grid:
        attended = (retrieval.selected_chunks(num_tokens) + retrieval.outliers) * retrieval.chunk
        if end - window.sinks <= attended:
            return f"{num_tokens} tokens are no more than the {attended} that a step attends to"
    if recipe.budget.fixed:
        return None
    for layer in range(shape.num_layers):
        rows = layer_layout(recipe, num_tokens, layer).num_sealed
        need = max(codec.min_rows() for codec in joined_codecs(recipe, layer, shape.num_layers))
        if rows < need:
            return f"{num_tokens} tokens leave a layer {rows} rows to pack, fewer than the rank, {need}"
    return None
