"""How many bytes a request will hold, known before any of it exists. Free of torch."""

from __future__ import annotations

from .codec_slots import Specs
from .layout import (
    TAIL_ROWS,
    Part,
    grown_tier,
    layer_layout,
    layer_specs,
    outliers_are_indexed,
    recall_plan,
    sealed_end,
)
from .placement import Placement, hidden_placement, host_placement
from .spec import ModelShape, Recipe

_NATIVE = {2: "bfloat16", 4: "float32"}


def bound_nbytes(
    recipe: Recipe,
    shape: ModelShape,
    num_prompt_tokens: int,
    num_new: int,
    num_choices: int,
    itemsize: int,
    page_nbytes: int | None = None,
) -> int:
    """Upper bound of what the caches of a request will ever hold on the device; what admission reserves.

    Args:
        num_new: rows that a choice will append, at most.
        num_choices: caches over the same prompt.
        itemsize: bytes of one number in the compute dtype, 2 or 4.
        page_nbytes: of pages of host memory that values may lie in, None = there are none.

    It holds when rows are appended in runs of at most `rows_until_seal`.
    """
    native = _NATIVE[itemsize]
    total = _hidden_away(recipe, shape, num_prompt_tokens, page_nbytes)
    plan = recall_plan(recipe, num_prompt_tokens)
    total += 0 if plan is None else num_choices * plan.state_nbytes
    for layer in range(shape.num_layers):
        place = _placement(recipe, shape, num_prompt_tokens, layer, native, page_nbytes)
        total += _shared_nbytes(recipe, shape, num_prompt_tokens, layer, native, place)
        total += num_choices * _own_nbytes(recipe, shape, num_prompt_tokens, layer, num_new, native, place)
    return total


def host_pages(recipe: Recipe, shape: ModelShape, num_prompt_tokens: int, itemsize: int, page_nbytes: int) -> int:
    """Pages of host memory that a prompt takes in all layers; its choices share them."""
    places = (
        _placement(recipe, shape, num_prompt_tokens, layer, _NATIVE[itemsize], page_nbytes)
        for layer in range(shape.num_layers)
    )
    plan = recall_plan(recipe, num_prompt_tokens)
    hidden = None if plan is None else hidden_placement(recipe, shape, plan, page_nbytes)
    return sum(place.num_pages for place in (*places, hidden) if place is not None)


def encoded_nbytes(recipe: Recipe, shape: ModelShape, num_prompt_tokens: int, itemsize: int) -> int:
    """Bytes of all encoded layers of a prompt: what is sent, without headers."""
    return sum(
        _nbytes(group)
        for layer in range(shape.num_layers)
        for group in layer_specs(recipe, shape, num_prompt_tokens, layer, _NATIVE[itemsize]).values()
    )


def _hidden_away(recipe: Recipe, shape: ModelShape, num_tokens: int, page_nbytes: int | None) -> int:
    """What it changes on the device, in bytes, that hidden rows lie in host memory; 0 where they do not."""
    plan = recall_plan(recipe, num_tokens)
    place = None if plan is None or page_nbytes is None else hidden_placement(recipe, shape, plan, page_nbytes)
    if plan is None or place is None:
        return 0
    rows = plan.num_hidden * plan.chunk
    packed = recipe.propagation.hidden_codec.tensor_specs(rows, 1, shape.hidden_size, "native")
    return place.table_nbytes - _nbytes(packed)


def _placement(
    recipe: Recipe, shape: ModelShape, num_tokens: int, layer: int, native: str, page_nbytes: int | None
) -> Placement | None:
    return None if page_nbytes is None else host_placement(recipe, shape, num_tokens, layer, native, page_nbytes)


def _shared_nbytes(
    recipe: Recipe, shape: ModelShape, num_tokens: int, layer: int, native: str, place: Placement | None
) -> int:
    specs = layer_specs(recipe, shape, num_tokens, layer, native)
    table_nbytes = 0
    if place is not None:
        del specs[Part.VALUES]
        table_nbytes = place.table_nbytes
    tail = specs.pop(Part.TAIL, {})
    sinks = {name: spec for name, spec in tail.items() if name.startswith("sink_")}
    at = layer_layout(recipe, num_tokens, layer)
    num_chunks = at.num_sealed // recipe.retrieval.chunk
    # where the demoted rows lie is known from where the kept ones do, but the cache holds it
    index_width = shape.num_kv_heads if at.per_head else 1
    index_nbytes = 4 * at.num_demoted * index_width
    landmarks = recipe.retrieval.landmark_specs(num_chunks, shape.num_kv_heads, shape.head_dim)
    if shape.layer_windows[layer] is not None or outliers_are_indexed(recipe, num_tokens, layer):
        # where outliers lie is known from their chunks, but kernels read it row by row
        index_nbytes += 4 * shape.num_kv_heads * min(recipe.retrieval.outliers, num_chunks) * recipe.retrieval.chunk
    index_nbytes += table_nbytes
    return index_nbytes + _nbytes(sinks) + _nbytes(landmarks) + sum(_nbytes(group) for group in specs.values())


def _own_nbytes(
    recipe: Recipe, shape: ModelShape, num_tokens: int, layer: int, num_new: int, native: str, place: Placement | None
) -> int:
    heads, dim, window = shape.num_kv_heads, shape.head_dim, recipe.window
    begin = sealed_end(recipe, num_tokens, num_tokens)
    num_tail, num_grown = num_tokens - begin + num_new, 0
    grown: list[Specs] = []
    if window.seal_block:
        num_tail = min(num_tail, window.local_rows(num_tokens) + recipe.block)
        num_grown = sealed_end(recipe, num_tokens, num_tokens + num_new) - begin
    if num_grown and not recipe.budget.fixed:
        tier = recipe.tiers()[grown_tier(recipe, layer_layout(recipe, num_tokens, layer))]
        grown = [
            tier.key_codec.tensor_specs(num_grown, heads, dim, native),
            tier.value_codec.tensor_specs(num_grown, heads, dim, native),
            recipe.retrieval.landmark_specs(num_grown // recipe.retrieval.chunk, heads, dim),
        ]
    capacity = -(-num_tail // TAIL_ROWS) * TAIL_ROWS
    itemsize = 2 if window.dtype == "bfloat16" or native == "bfloat16" else 4
    hot_nbytes = 0 if place is None else place.hot_nbytes
    plan, num_exact = recall_plan(recipe, num_tokens), capacity
    if plan is not None and layer > plan.layer:
        num_exact += plan.num_slots * plan.chunk
    kept_nbytes = heads * (4 * recipe.retrieval.selected_chunks(num_tokens) + 8) if _keeps_choice(recipe) else 0
    return hot_nbytes + kept_nbytes + 2 * num_exact * heads * dim * itemsize + sum(_nbytes(specs) for specs in grown)


def _keeps_choice(recipe: Recipe) -> bool:
    return recipe.retrieval.needs_grid and recipe.retrieval.select_every > 1


def _nbytes(specs: Specs) -> int:
    return sum(spec.nbytes for spec in specs.values())
