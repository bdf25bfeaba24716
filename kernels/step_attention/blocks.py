"""One sequence's part of the tables that tell a step's kernels where rows lie; built on the host.

A sequence's block is made once and reused until its tensors move: a row is appended in place, so only sealing, a tail
that grows and a sequence that joins or leaves make work. Addresses stand in for tensors: whoever builds a table keeps
the views that it was built from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from ..hot_set import HOT_FIELDS, HotKey, hot_fields
from .packed import Chunks, Kept, Layout, Packed, Region, View

MIN_SPLIT_KEYS = 256
MAX_SPLITS = 64
SPLIT_UNIT = 128

ITEM_FIELDS, CHOICE_FIELDS, TAIL_FIELDS = 25, 15, 4
OUT_FIELD = 7
Key = TypeVar("Key")
_IDLE_ITEM = [-1] + [0] * (ITEM_FIELDS - 1)


@dataclass(frozen=True)
class AttendKey:
    """Items that one launch serves.

    Attributes:
        hot: some layers of the sequence have their values in a hot set; each item says whether its own has.
        by_position: rows beyond the query's position are hidden, whether or not the layer has a window.
    """

    keys: Layout
    values: Layout
    chunk: int
    rotates: bool
    chosen: bool
    hot: bool = False
    by_position: bool = False


@dataclass(frozen=True)
class ChoiceKey:
    """Sequences whose chunks one launch scores."""

    dtype: torch.dtype
    has_scale: bool
    chunk: int
    hides: bool


@dataclass(frozen=True)
class RecallKey:
    """Sequences whose rows come back by the same launches, see `recalled`.

    Attributes:
        layer: T, behind which they come back.
        chunk: rows a chunk.
        most: chunks that one row brings back, at most; rounded up.
        width: columns of a hidden row.
        bits, group: how hidden rows are packed.
        choice: what chunks are scored by in layer T.
    """

    layer: int
    chunk: int
    most: int
    width: int
    bits: int
    group: int
    choice: ChoiceKey

    @property
    def num_rows(self) -> int:
        """That a sequence has room for in a step."""
        return self.most * self.chunk


@dataclass(frozen=True)
class RecallBlock:
    """The part of a sequence's block that its rows which come back need.

    Attributes:
        job: int64 [JOB_FIELDS], see `recalled`; for row 0.
        block: what one of those rows attends to and where it goes, as if it were a sequence of its own.
        num_hidden: chunks that may come back.
    """

    key: RecallKey
    job: Tensor
    block: Block
    num_hidden: int


@dataclass
class Block:
    """One sequence's part of the tables, all layers.

    Attributes:
        items: int64 [L, n, ITEM_FIELDS], for row 0; places of partial results count from 0 in every layer.
        choices: int64 [L, 1, CHOICE_FIELDS].
        hots: int64 [L, 1, HOT_FIELDS].
        tails: int64 [L, 1, TAIL_FIELDS].
        num_items: of all keys together, idle ones included.
        most_chunks, most_chosen, most_hidden, most_slots: in any layer.
        recall: of a sequence whose rows come back within the step.
    """

    items: dict[AttendKey, Tensor] = field(default_factory=dict)
    choices: dict[ChoiceKey, Tensor] = field(default_factory=dict)
    hots: dict[HotKey, Tensor] = field(default_factory=dict)
    tails: dict[torch.dtype, Tensor] = field(default_factory=dict)
    num_items: int = 0
    most_chunks: int = 0
    most_chosen: int = 0
    most_hidden: int = 0
    most_slots: int = 0
    recall: RecallBlock | None = None

    @property
    def shape(self) -> tuple[object, ...]:
        """What says where in a step's tables the numbers of a row go."""
        sizes = tuple((key, table.shape[1]) for key, table in self.items.items())
        recall = None if self.recall is None else (self.recall.key, self.recall.block.shape)
        return (sizes, tuple(self.choices), tuple(self.hots), tuple(self.tails), self.num_items, recall)


def split_rows(num_rows: int, least: int = MIN_SPLIT_KEYS) -> int:
    """Keys an item: a function of the region alone, so that sums associate alike in any company."""
    return max(least, -(-num_rows // (MAX_SPLITS * SPLIT_UNIT)) * SPLIT_UNIT)


def sequence_block(views: Sequence[View], least_split: int = 0) -> Block:
    """The block of a sequence from its view of every layer.

    Args:
        least_split: keys an item, at least. Rows that are many need no more programs, and each item has a result.
    """
    block = Block()
    items: list[dict[AttendKey, list[list[int]]]] = []
    choices: list[dict[ChoiceKey, list[int]]] = []
    hots: list[dict[HotKey, list[int]]] = []
    # one key for all layers: with two, items would lie otherwise than without a hot set, and sums associate otherwise
    any_hot = any(view.chunks is not None and view.chunks.hot is not None for view in views)
    for view in views:
        items.append(_layer_items(view, any_hot, least_split))
        choices.append({} if view.chunks is None else {choice_key(view): _choice(view.chunks)})
        hot = None if view.chunks is None else view.chunks.hot
        hots.append({} if hot is None else {hot.key: hot_fields(hot)})
        block.most_slots = max(block.most_slots, 0 if hot is None else hot.num_slots)
        if view.chunks is not None:
            num_chunks = view.chunks.num_rows // view.chunk
            block.most_chunks = max(block.most_chunks, num_chunks)
            block.most_chosen = max(block.most_chosen, min(view.chunks.num_chosen, num_chunks))
            block.most_hidden = max(block.most_hidden, 0 if view.chunks.hidden is None else len(view.chunks.hidden))
    for key in dict.fromkeys(key for layer in items for key in layer):
        lists = [layer.get(key, []) for layer in items]
        most = max(map(len, lists))
        padded = [own + [_IDLE_ITEM] * (most - len(own)) for own in lists]
        table = torch.tensor(padded, dtype=torch.int64)
        table[:, :, OUT_FIELD] = torch.arange(block.num_items, block.num_items + most)
        block.num_items += most
        block.items[key] = table
    block.choices, block.hots = _by_layer(choices, CHOICE_FIELDS), _by_layer(hots, HOT_FIELDS)
    tails = [
        [view.tail.k.data_ptr(), view.tail.v.data_ptr(), view.tail.first, int(view.tail.unrotated)] for view in views
    ]
    block.tails[views[0].tail.k.dtype] = torch.tensor(tails, dtype=torch.int64)[:, None]
    return block


def _by_layer(layers: Sequence[Mapping[Key, list[int]]], num_fields: int) -> dict[Key, Tensor]:
    """int64 [L, 1, fields] of every key; zeros for layers that do not have it."""
    keys = dict.fromkeys(key for layer in layers for key in layer)
    idle = [0] * num_fields
    return {key: torch.tensor([[layer.get(key, idle)] for layer in layers], dtype=torch.int64) for key in keys}


def _layer_items(view: View, any_hot: bool, least: int) -> dict[AttendKey, list[list[int]]]:
    out: dict[AttendKey, list[list[int]]] = {}
    for region in view.regions:
        key = attend_key(region, view.chunk)
        split = MIN_SPLIT_KEYS if region.grows else max(split_rows(region.num_rows), least)
        for begin in range(0, region.num_rows, split):
            out.setdefault(key, []).append(_item(region, begin, min(begin + split, region.num_rows)))
    if view.chunks is not None:
        first = view.chunks.segments[0]
        key = attend_key(first, view.chunk, chosen=True, hot=any_hot)
        num_rows = min(view.chunks.num_chosen * view.chunk, view.chunks.num_rows)
        split = max(split_rows(num_rows, SPLIT_UNIT), least)  # chosen keys are few, and take long to be read
        for begin in range(0, num_rows, split):
            item = _item(first, begin, min(begin + split, num_rows))
            out.setdefault(key, []).append(item[:16] + _second(view.chunks))
    return out


def attend_key(region: Region, chunk: int, chosen: bool = False, hot: bool = False) -> AttendKey:
    """What serves a region."""
    return AttendKey(region.keys.layout, region.values.layout, chunk, region.rotates, chosen, hot, region.by_position)


def _item(region: Region, begin: int, end: int) -> list[int]:
    index = region.index
    per_head = index is not None and index.dim() == 2
    keys, values = _addresses(region.keys), _addresses(region.values)
    limit = region.first if region.grows else -1
    place = [0 if index is None else index.data_ptr(), int(per_head), 0]
    basis = [0 if one is None else one.data_ptr() for one in (region.keys.basis, region.values.basis)]
    own = [0, begin, end, limit, region.first, *place, *keys, basis[0], *values, basis[1]]
    return own + [0] * (ITEM_FIELDS - len(own))


def _second(chunks: Chunks) -> list[int]:
    """The fields of the second segment, or the first one's again where there is none, which is never reached; whether
    the first one's values are in a hot set."""
    first, second = chunks.segments[0], chunks.segments[-1]
    hot = int(chunks.hot is not None)
    return [first.num_rows, second.first, *_addresses(second.keys), *_addresses(second.values), hot]


def _addresses(packed: Packed) -> list[int]:
    found = [tensor.data_ptr() for tensor in packed.tensors]
    return found + [0] * (3 - len(found))


def choice_key(view: View) -> ChoiceKey:
    """What scores a view's chunks."""
    assert view.chunks is not None
    return ChoiceKey(
        view.chunks.landmarks[0].dtype, bool(view.chunks.scales), view.chunk, view.chunks.hidden is not None
    )


def _choice(chunks: Chunks) -> list[int]:
    first, second = chunks.segments[0], chunks.segments[-1]
    has_second = len(chunks.segments) > 1
    scales = [scale.data_ptr() for scale in chunks.scales] or [0]
    chunk = first.num_rows // len(chunks.landmarks[0])
    hidden = chunks.hidden
    return [
        chunks.landmarks[0].data_ptr(),
        scales[0],
        len(chunks.landmarks[0]),
        0 if first.index is None else first.index.data_ptr(),
        first.first // chunk,
        chunks.landmarks[-1].data_ptr(),
        scales[-1],
        len(chunks.landmarks[1]) if has_second else 0,
        second.first // chunk,
        chunks.num_chosen,
        0 if hidden is None else hidden.data_ptr(),
        0 if hidden is None else len(hidden),
        *_kept(chunks.kept),
    ]


def _kept(kept: Kept | None) -> list[int]:
    """The fields of what was chosen last."""
    return [0, 0, 1] if kept is None else [kept.chunks.data_ptr(), kept.state.data_ptr(), kept.every]
