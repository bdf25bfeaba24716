"""Tables that tell a step's kernels where every sequence's rows lie: the blocks of its sequences side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..hot_set import HOT_FIELDS, HotKey
from .blocks import CHOICE_FIELDS as CHOICE_FIELDS
from .blocks import ITEM_FIELDS as ITEM_FIELDS
from .blocks import OUT_FIELD, Block, RecallKey
from .blocks import TAIL_FIELDS as TAIL_FIELDS
from .blocks import AttendKey as AttendKey
from .blocks import ChoiceKey as ChoiceKey
from .recalled import JOB_FIELDS, JOB_ROW

Numbers = NDArray[np.int64]

_ROW = 0
_MOSTS = ("most_chunks", "most_chosen", "most_hidden", "most_slots")


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
        recalls: of the rows that come back within the step, by key.
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
    recalls: Mapping[RecallKey, RecallTables] = field(default_factory=dict)

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
            _place(self.items[key].numpy()[:, start : start + table.shape[1]], table.numpy(), row, place.first)
        for own, new in ((self.choices, block.choices), (self.hots, block.hots), (self.tails, block.tails)):
            for name, numbers in new.items():  # type: ignore[attr-defined]
                own[name].numpy()[:, row] = numbers.numpy()[:, 0]  # type: ignore[index]
        return block.recall is None or self.recalls[block.recall.key].put(row, block)

    def copy_rows(self, other: Tables, rows: Sequence[int]) -> None:
        """Take over the numbers of some rows of tables on the host that have the same places."""
        columns: dict[AttendKey, list[int]] = {}
        for row in rows:
            place = self.places[row]
            for key, count in place.shape[0]:  # type: ignore[attr-defined]
                columns.setdefault(key, []).extend(range(place.starts[key], place.starts[key] + count))
        for key, own in columns.items():
            _copy_columns(self.items[key], other.items[key], own)
        for mine, theirs in ((self.choices, other.choices), (self.hots, other.hots), (self.tails, other.tails)):
            for name, table in mine.items():  # type: ignore[attr-defined]
                _copy_columns(table, theirs[name], rows)  # type: ignore[index]
        for recall, recalled in self.recalls.items():
            recalled.copy_rows(other.recalls[recall], rows)

    @property
    def signature(self) -> tuple[object, ...]:
        """What a captured step depends on besides the numbers in the tables."""
        sizes = [(key, table.shape[1]) for key, table in self.items.items()]
        mosts = (self.num_items, self.most_chunks, self.most_chosen, self.most_hidden, self.most_slots)
        recalls = [(key, recalled.signature) for key, recalled in self.recalls.items()]
        return (self.num_rows, *sizes, *self.choices, *self.hots, *self.tails, *mosts, *recalls)

    def padded(self, num_rows: int, least_items: int = 16) -> Tables:
        """The same with idle rows and items up to round sizes, so that few different steps have to be captured.

        Args:
            least_items: of every key.
        """

        def filled(table: Tensor, size: int, idle: int, column: int) -> Tensor:
            more = table.new_zeros(table.shape[0], size - table.shape[1], table.shape[2])
            more[:, :, column] = idle
            return torch.cat((table, more), dim=1)

        def more_items(table: Tensor) -> Tensor:
            more = filled(table, _round(table.shape[1], least_items), -1, _ROW)
            more[:, table.shape[1] :, OUT_FIELD] = -1
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
            recalls={key: recalled.padded() for key, recalled in self.recalls.items()},
        )

    def repeated(self, times: int) -> Tables:
        """Tables on a device of `times` rows for each of these, row r * num_rows + i of which is the r-th of row i.
        Waits for nothing."""
        again = torch.arange(times, device=self.ranges.device)[:, None]

        def more_items(table: Tensor) -> Tensor:
            out = table[:, None].repeat(1, times, 1, 1)
            for column, step in ((_ROW, self.num_rows), (OUT_FIELD, self.num_items)):
                numbers = out[..., column]
                numbers += torch.where(numbers >= 0, again * step, 0)
            return out.flatten(1, 2)

        def more_rows(table: Tensor) -> Tensor:
            return table.repeat(1, times, 1)

        ranges = self.ranges.repeat(times, 1)
        ranges[:, 0] += (again * self.num_items).expand(-1, self.num_rows).flatten()
        return replace(
            self,
            items={key: more_items(table) for key, table in self.items.items()},
            choices={key: more_rows(table) for key, table in self.choices.items()},
            tails={key: more_rows(table) for key, table in self.tails.items()},
            ranges=ranges,
            num_items=times * self.num_items,
        )

    def copy_(self, other: Tables) -> None:
        """Take over the numbers of tables of the same signature."""
        self.ranges.copy_(other.ranges, non_blocking=True)
        own = (self.items, self.choices, self.hots, self.tails)
        new = (other.items, other.choices, other.hots, other.tails)
        for mine, theirs in zip(own, new, strict=True):
            for key, table in mine.items():  # type: ignore[attr-defined]
                table.copy_(theirs[key], non_blocking=True)  # type: ignore[index]
        for recall, recalled in self.recalls.items():
            recalled.copy_(other.recalls[recall])

    def placed_as(self, other: Tables) -> Tables:
        """The same tensors, said to hold the rows of other tables where those do."""
        recalls = {key: own.placed_as(other.recalls[key]) for key, own in self.recalls.items()}
        return replace(self, places=other.places, recalls=recalls)

    def to(self, device: torch.device) -> Tables:
        """The same on a device."""
        return self.mapped(lambda table: table.to(device, non_blocking=True))

    def clone(self) -> Tables:
        """Tables of their own."""
        return self.mapped(Tensor.clone)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Tables:
        """The same with other tensors."""
        return replace(
            self,
            items={key: change(table) for key, table in self.items.items()},
            choices={key: change(table) for key, table in self.choices.items()},
            hots={key: change(table) for key, table in self.hots.items()},
            tails={key: change(table) for key, table in self.tails.items()},
            ranges=change(self.ranges),
            recalls={key: recalled.mapped(change) for key, recalled in self.recalls.items()},
        )


@dataclass(frozen=True)
class RecallTables:
    """Of the sequences of a step whose rows come back by the same launches.

    Attributes:
        jobs: int64 [n, JOB_FIELDS], see `recalled`; row -1 for idle ones.
        tables: of one row that came back to each of them.
        members: their rows in the step.
        num_hidden: chunks that there is room for.
    """

    jobs: Tensor
    tables: Tables
    members: tuple[int, ...]
    num_hidden: int

    @classmethod
    def of(cls, blocks: Sequence[Block], members: Sequence[int]) -> RecallTables:
        """From the blocks of a step."""
        own = [block.recall for block in (blocks[row] for row in members) if block.recall is not None]
        jobs = torch.stack([one.job for one in own])
        jobs[:, JOB_ROW] = torch.tensor(members)
        most = max(one.num_hidden for one in own)
        return cls(jobs, step_tables([one.block for one in own]), tuple(members), most)

    def put(self, row: int, block: Block) -> bool:
        """See `Tables.put`."""
        recall, at = block.recall, self.members.index(row)
        assert recall is not None, "blocks of one shape have the same key"
        if recall.num_hidden > self.num_hidden or not self.tables.put(at, recall.block):
            return False
        self.jobs[at] = recall.job
        self.jobs[at, JOB_ROW] = row
        return True

    def copy_rows(self, other: RecallTables, rows: Sequence[int]) -> None:
        """See `Tables.copy_rows`."""
        own = [at for at, row in enumerate(self.members) if row in rows]
        self.tables.copy_rows(other.tables, own)
        _copy_columns(self.jobs[None], other.jobs[None], own)

    @property
    def signature(self) -> tuple[object, ...]:
        """See `Tables.signature`."""
        return (self.num_hidden, *self.tables.signature)

    def padded(self) -> RecallTables:
        """See `Tables.padded`."""
        size = _round(len(self.jobs), 1)
        idle = self.jobs.new_zeros(size - len(self.jobs), JOB_FIELDS)
        idle[:, JOB_ROW] = -1
        jobs, most = torch.cat((self.jobs, idle)), _round(self.num_hidden, 1024)
        # each of them has many rows, and idle items as often
        return replace(self, jobs=jobs, tables=self.tables.padded(size, 1), num_hidden=most)

    def copy_(self, other: RecallTables) -> None:
        """See `Tables.copy_`."""
        self.jobs.copy_(other.jobs, non_blocking=True)
        self.tables.copy_(other.tables)

    def placed_as(self, other: RecallTables) -> RecallTables:
        """See `Tables.placed_as`."""
        return replace(self, members=other.members, tables=self.tables.placed_as(other.tables))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> RecallTables:
        """See `Tables.mapped`."""
        return replace(self, jobs=change(self.jobs), tables=self.tables.mapped(change))


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
    members: dict[RecallKey, list[int]] = {}
    for row, block in enumerate(blocks):
        if block.recall is not None:
            members.setdefault(block.recall.key, []).append(row)

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
        recalls={key: RecallTables.of(blocks, members[key]) for key in sorted(members, key=repr)},
    )


def _placed(table: Tensor, row: int, first: int) -> Tensor:
    """A block's items for a row whose partial results begin at `first`."""
    own = torch.empty_like(table)
    _place(own.numpy(), table.numpy(), row, first)
    return own


def _place(out: Numbers, items: Numbers, row: int, first: int) -> None:
    """Write a block's items for a row whose partial results begin at `first`."""
    out[...] = items
    out[..., _ROW][items[..., _ROW] >= 0] = row
    out[..., OUT_FIELD] += first


def _copy_columns(own: Tensor, new: Tensor, columns: Sequence[int]) -> None:
    """Columns of int64 [L, n, fields] from the host: two copies and a kernel, however many they are."""
    if not len(columns):
        return
    at = torch.tensor(columns)
    if not own.is_cuda:
        own[:, at] = new[:, at]
        return
    picked = torch.empty(new.shape[0], len(columns), new.shape[2], dtype=torch.int64, pin_memory=True)
    torch.index_select(new, 1, at, out=picked)
    places, numbers = at.pin_memory().to(own.device, non_blocking=True), picked.to(own.device, non_blocking=True)
    own.index_copy_(1, places, numbers)


def _round(size: int, least: int) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (size - 1).bit_length()) if size else least
