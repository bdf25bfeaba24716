"""Tables that tell a step's kernels where every sequence's rows lie; built on the host when something has moved.

A sequence's block is made once and reused until its tensors move: a row is appended in place, so only sealing, a tail
that grows and a sequence that joins or leaves make work. Addresses stand in for tensors: whoever builds a table keeps
the views that it was built from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from ..hot_set import HOT_FIELDS, HotKey, hot_fields
from .packed import Chunks, Kept, Layout, Packed, Region, View

MIN_SPLIT_KEYS = 256
MAX_SPLITS = 64
SPLIT_UNIT = 128

ITEM_FIELDS, CHOICE_FIELDS, TAIL_FIELDS = 25, 15, 4
_ROW, _OUT = 0, 7
_MOSTS = ("most_chunks", "most_chosen", "most_hidden", "most_slots")
Key = TypeVar("Key")
_IDLE_ITEM = [-1] + [0] * (ITEM_FIELDS - 1)


@dataclass(frozen=True)
class AttendKey:
    """Items that one launch serves.

    Attributes:
        hot: some layers of the sequence have their values in a hot set; each item says whether its own has.
    """

    keys: Layout
    values: Layout
    chunk: int
    rotates: bool
    chosen: bool
    hot: bool = False


@dataclass(frozen=True)
class ChoiceKey:
    """Sequences whose chunks one launch scores."""

    dtype: torch.dtype
    has_scale: bool
    chunk: int
    hides: bool


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

    @property
    def shape(self) -> tuple[object, ...]:
        """What says where in a step's tables the numbers of a row go."""
        sizes = tuple((key, table.shape[1]) for key, table in self.items.items())
        return (sizes, tuple(self.choices), tuple(self.hots), tuple(self.tails), self.num_items)


def split_rows(num_rows: int) -> int:
    """Keys an item: a function of the region alone, so that sums associate alike in any company."""
    return max(MIN_SPLIT_KEYS, -(-num_rows // (MAX_SPLITS * SPLIT_UNIT)) * SPLIT_UNIT)


def sequence_block(views: Sequence[View]) -> Block:
    """The block of a sequence from its view of every layer."""
    block = Block()
    items: list[dict[AttendKey, list[list[int]]]] = []
    choices: list[dict[ChoiceKey, list[int]]] = []
    hots: list[dict[HotKey, list[int]]] = []
    # one key for all layers: with two, items would lie otherwise than without a hot set, and sums associate otherwise
    any_hot = any(view.chunks is not None and view.chunks.hot is not None for view in views)
    for view in views:
        items.append(_layer_items(view, any_hot))
        choices.append({} if view.chunks is None else {_choice_key(view): _choice(view.chunks)})
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
        table[:, :, _OUT] = torch.arange(block.num_items, block.num_items + most)
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


def _layer_items(view: View, any_hot: bool) -> dict[AttendKey, list[list[int]]]:
    out: dict[AttendKey, list[list[int]]] = {}
    for region in view.regions:
        key = AttendKey(region.keys.layout, region.values.layout, view.chunk, region.rotates, False)
        split = MIN_SPLIT_KEYS if region.grows else split_rows(region.num_rows)
        for begin in range(0, region.num_rows, split):
            out.setdefault(key, []).append(_item(region, begin, min(begin + split, region.num_rows)))
    if view.chunks is not None:
        first = view.chunks.segments[0]
        key = AttendKey(first.keys.layout, first.values.layout, view.chunk, first.rotates, True, any_hot)
        num_rows = min(view.chunks.num_chosen * view.chunk, view.chunks.num_rows)
        split = split_rows(num_rows)
        for begin in range(0, num_rows, split):
            item = _item(first, begin, min(begin + split, num_rows))
            out.setdefault(key, []).append(item[:16] + _second(view.chunks))
    return out


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


def _choice_key(view: View) -> ChoiceKey:
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


@dataclass(frozen=True)
class Place:
    """Where the numbers of one row are in a step's tables.

    Attributes:
        first: its first partial result.
        starts: its first item in every table of items.
        shape: of its block.
    """

    first: int
    starts: Mapping[AttendKey, int]
    shape: tuple[object, ...]


@dataclass(frozen=True)
class Tables:
    """The tables of one step.

    Attributes:
        items: int64 [L, W, ITEM_FIELDS] by key.
        choices: int64 [L, rows, CHOICE_FIELDS] by key.
        hots: int64 [L, rows, HOT_FIELDS] by key.
        tails: int64 [L, rows, TAIL_FIELDS] by the dtype of the tails.
        ranges: int64 [rows, 2], every row's first partial result and how many it has.
        num_items: partial results of a layer.
        most_chunks, most_chosen, most_hidden, most_slots: of any row.
        places: of every row that is not idle.
    """

    items: Mapping[AttendKey, Tensor]
    choices: Mapping[ChoiceKey, Tensor]
    hots: Mapping[HotKey, Tensor]
    tails: Mapping[torch.dtype, Tensor]
    ranges: Tensor
    num_items: int
    most_chunks: int
    most_chosen: int
    most_hidden: int
    most_slots: int
    places: tuple[Place, ...]

    @property
    def num_rows(self) -> int:
        return len(self.ranges)

    def put(self, row: int, block: Block) -> bool:
        """Write another block in a row's place. False where it has another shape or needs more room."""
        place = self.places[row]
        mosts = ((getattr(self, name), getattr(block, name)) for name in _MOSTS)
        if block.shape != place.shape or any(own < new for own, new in mosts):
            return False
        for key, table in block.items.items():
            start = place.starts[key]
            self.items[key][:, start : start + table.shape[1]] = _placed(table, row, place.first)
        for own, new in ((self.choices, block.choices), (self.hots, block.hots), (self.tails, block.tails)):
            for name, numbers in new.items():  # type: ignore[attr-defined]
                own[name][:, row] = numbers[:, 0]  # type: ignore[index]
        return True

    def copy_rows(self, other: Tables, rows: Sequence[int]) -> None:
        """Take over the numbers of some rows of tables that have the same places."""
        for row in rows:
            place = self.places[row]
            for key, count in place.shape[0]:  # type: ignore[attr-defined]
                span = slice(place.starts[key], place.starts[key] + count)
                self.items[key][:, span].copy_(other.items[key][:, span], non_blocking=True)
            for mine, theirs in ((self.choices, other.choices), (self.hots, other.hots), (self.tails, other.tails)):
                for name, table in mine.items():  # type: ignore[attr-defined]
                    table[:, row].copy_(theirs[name][:, row], non_blocking=True)  # type: ignore[index]

    @property
    def signature(self) -> tuple[object, ...]:
        """What a captured step depends on besides the numbers in the tables."""
        sizes = [(key, table.shape[1]) for key, table in self.items.items()]
        mosts = (self.num_items, self.most_chunks, self.most_chosen, self.most_hidden, self.most_slots)
        return (self.num_rows, *sizes, *self.choices, *self.hots, *self.tails, *mosts)

    def padded(self, num_rows: int) -> Tables:
        """The same with idle rows and items up to round sizes, so that few different steps have to be captured."""

        def filled(table: Tensor, size: int, idle: int, column: int) -> Tensor:
            more = table.new_zeros(table.shape[0], size - table.shape[1], table.shape[2])
            more[:, :, column] = idle
            return torch.cat((table, more), dim=1)

        def more_items(table: Tensor) -> Tensor:
            more = filled(table, _round(table.shape[1], 16), -1, _ROW)
            more[:, table.shape[1] :, _OUT] = -1
            return more

        ranges = torch.cat((self.ranges, self.ranges.new_zeros(num_rows - self.num_rows, 2)))
        return replace(
            self,
            items={key: more_items(table) for key, table in self.items.items()},
            choices={key: filled(table, num_rows, 0, 0) for key, table in self.choices.items()},
            hots={key: filled(table, num_rows, 0, 0) for key, table in self.hots.items()},
            tails={key: filled(table, num_rows, -1, 2) for key, table in self.tails.items()},
            ranges=ranges,
            num_items=_round(self.num_items, 64),
            most_chunks=_round(self.most_chunks, 1024) if self.choices else 0,
            most_chosen=_round(self.most_chosen, 64) if self.choices else 0,
            most_hidden=_round(self.most_hidden, 16) if self.most_hidden else 0,
            most_slots=_round(self.most_slots, 64),
        )

    def copy_(self, other: Tables) -> None:
        """Take over the numbers of tables of the same signature."""
        self.ranges.copy_(other.ranges, non_blocking=True)
        own = (self.items, self.choices, self.hots, self.tails)
        new = (other.items, other.choices, other.hots, other.tails)
        for mine, theirs in zip(own, new, strict=True):
            for key, table in mine.items():  # type: ignore[attr-defined]
                table.copy_(theirs[key], non_blocking=True)  # type: ignore[index]

    def to(self, device: torch.device) -> Tables:
        """The same on a device."""
        return self._mapped(lambda table: table.to(device, non_blocking=True))

    def clone(self) -> Tables:
        """Tables of their own."""
        return self._mapped(Tensor.clone)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Tables:
        return replace(
            self,
            items={key: change(table) for key, table in self.items.items()},
            choices={key: change(table) for key, table in self.choices.items()},
            hots={key: change(table) for key, table in self.hots.items()},
            tails={key: change(table) for key, table in self.tails.items()},
            ranges=change(self.ranges),
        )


def step_tables(blocks: Sequence[Block]) -> Tables:
    """The tables of a step whose row i belongs to the sequence of blocks[i]."""
    first, ranges, places = 0, [], []
    items: dict[AttendKey, list[Tensor]] = {}
    sizes: Counter[AttendKey] = Counter()
    for row, block in enumerate(blocks):
        places.append(Place(first, {key: sizes[key] for key in block.items}, block.shape))
        for key, table in block.items.items():
            items.setdefault(key, []).append(_placed(table, row, first))
            sizes[key] += table.shape[1]
        ranges.append((first, block.num_items))
        first += block.num_items
    num_layers = next(iter(blocks[0].tails.values())).shape[0]

    def by_row(pick: Callable[[Block], Mapping], idle: list[int]) -> dict:  # type: ignore[type-arg]
        nothing = torch.tensor(idle, dtype=torch.int64).expand(num_layers, 1, len(idle))
        # in an order of their own, so that the order of sequences makes no other shape
        keys = sorted({key for block in blocks for key in pick(block)}, key=repr)
        return {key: torch.cat([pick(block).get(key, nothing) for block in blocks], dim=1) for key in keys}

    return Tables(
        items={key: torch.cat(items[key], dim=1) for key in sorted(items, key=repr)},
        choices=by_row(lambda block: block.choices, [0] * CHOICE_FIELDS),
        hots=by_row(lambda block: block.hots, [0] * HOT_FIELDS),
        tails=by_row(lambda block: block.tails, [0, 0, -1, 0]),
        ranges=torch.tensor(ranges, dtype=torch.int64),
        num_items=first,
        most_chunks=max(block.most_chunks for block in blocks),
        most_chosen=max(block.most_chosen for block in blocks),
        most_hidden=max(block.most_hidden for block in blocks),
        most_slots=max(block.most_slots for block in blocks),
        places=tuple(places),
    )


def _placed(table: Tensor, row: int, first: int) -> Tensor:
    """A block's items for a row whose partial results begin at `first`."""
    own = table.clone()
    own[:, :, _ROW] = torch.where(own[:, :, _ROW] < 0, -1, row)
    own[:, :, _OUT] += first
    return own


def _round(size: int, least: int) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (size - 1).bit_length()) if size else least
