"""Whether a layer's values may lie in host memory, and how much of each memory that takes. Free of torch.

A query of a recipe with retrieval reads a few of the chunks, and much the same ones from step to step. Landmarks, keys'
factors and whatever is read whole stay on the device; values, the larger half of what is read in parts, may lie in
pages of host memory, with a hot set on the device (ShadowKV, arXiv 2410.21465 §4.3; the hot set keeps chunks for as
long as they are wanted, not for one step).
"""

from __future__ import annotations

from dataclasses import dataclass

from .layout import layer_layout
from .propagation_slots import RecallPlan
from .spec import ModelShape, Recipe

HOT_SLOTS_PER_CHUNK = 2  # slots for every chunk that a query attends to
MOST_SLOTS = (1 << 15) - 1  # their numbers are int16
RECORD_ALIGNMENT = 16


@dataclass(frozen=True)
class Placement:
    """Where one layer's values lie.

    Attributes:
        num_chunks: of the prompt's sealed rows.
        num_slots: chunks of each KV head that the device holds.
        page_chunks: whole chunks a page.
        num_pages: of host memory.
        hot_nbytes: on the device, for each choice.
        table_nbytes: on the device, for all choices.
    """

    num_chunks: int
    num_slots: int
    page_chunks: int
    num_pages: int
    hot_nbytes: int
    table_nbytes: int


def host_placement(
    recipe: Recipe, shape: ModelShape, num_tokens: int, layer: int, native: str, page_nbytes: int
) -> Placement | None:
    """How a layer's values lie in pages of host memory; None where they stay on the device: the recipe reads all of
    them, packs them in groups that are no chunks, or the hot set would hold nearly all, or more than it can number.

    Args:
        native: the compute dtype.
        page_nbytes: of one page.
    """
    retrieval, codec, heads = recipe.retrieval, recipe.value_codec, shape.num_kv_heads
    if not retrieval.needs_grid or not codec.by_row or recipe.sharing.layers > 1 or recipe.evicted.keeps:
        return None
    chunk, num_chunks = retrieval.chunk, layer_layout(recipe, num_tokens, layer).num_sealed // retrieval.chunk
    row_nbytes = [spec.nbytes for spec in codec.tensor_specs(1, 1, shape.head_dim, native).values()]
    record_nbytes = -(-chunk * sum(row_nbytes) // RECORD_ALIGNMENT) * RECORD_ALIGNMENT
    page_chunks = page_nbytes // (heads * record_nbytes)
    num_slots = HOT_SLOTS_PER_CHUNK * retrieval.selected_chunks(num_tokens)
    hot_nbytes = heads * (num_slots * (chunk * sum(row_nbytes) + 8) + 4 + 2 * num_chunks)
    everywhere = heads * num_chunks * chunk * sum(row_nbytes)
    if not page_chunks or any(nbytes % 2 for nbytes in row_nbytes) or hot_nbytes >= everywhere:
        return None
    if num_slots > MOST_SLOTS:
        return None
    num_pages = -(-num_chunks // page_chunks)
    return Placement(num_chunks, num_slots, page_chunks, num_pages, hot_nbytes, 8 * num_pages)


def hidden_placement(recipe: Recipe, shape: ModelShape, plan: RecallPlan, page_nbytes: int) -> Placement | None:
    """How hidden rows that may be recalled lie in pages of host memory, as values do, without a hot set; None where
    they stay on the device, because a page holds no chunk of them or they are of odd size."""
    specs = recipe.propagation.hidden_codec.tensor_specs(1, 1, shape.hidden_size, "native")
    row_nbytes = [spec.nbytes for spec in specs.values()]
    record_nbytes = -(-plan.chunk * sum(row_nbytes) // RECORD_ALIGNMENT) * RECORD_ALIGNMENT
    page_chunks = page_nbytes // record_nbytes
    if not page_chunks or any(nbytes % 2 for nbytes in row_nbytes):
        return None
    num_pages = -(-plan.num_hidden // page_chunks)
    return Placement(plan.num_hidden, 0, page_chunks, num_pages, 0, 8 * num_pages)
