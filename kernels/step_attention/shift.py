"""Tables of a sequence that has sealed blocks in place: some numbers of its block are others, but what was there before
lies where it did."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from .blocks import MIN_SPLIT_KEYS, Block, split_rows

Numbers = NDArray[np.int64]

# fields of an item, of a choice and of a tail, see `blocks`
_ROW, _BEGIN, _END, _LIMIT, _FIRST, _K0 = 0, 1, 2, 3, 4, 8
_SECOND = slice(17, 24)
_LANDMARKS, _CHOICE_SECOND = 0, slice(5, 9)
_TAIL_FIRST = 2


@dataclass(frozen=True)
class Shift:
    """What a sequence's block says after sealing, where every layer holds what it did and has sealed as much.

    Attributes:
        tails: int64 [L], addresses of the keys of the tails.
        first: position of the tails' first rows.
        sinks: int64 [L], addresses of the keys of sinks that move with the tails; or None.
        sinks_first: position of their first rows.
        num_grown: rows that are sealed as a segment of their own, in each layer.
        grown: int64 [L], addresses of their keys, where they are a region that is read whole; or None.
        second: int64 [L, 7], fields of items that say where the second segment lies, of which parts are read; or None.
        choices: int64 [L, 4], fields of choices that do; or None.
        most_chunks: of all segments, in any layer.
    """

    tails: Numbers
    first: int
    sinks: Numbers | None = None
    sinks_first: int = 0
    num_grown: int = 0
    grown: Numbers | None = None
    second: Numbers | None = None
    choices: Numbers | None = None
    most_chunks: int = 0


def shifted(block: Block, shift: Shift) -> Block | None:
    """The block after sealing, as `sequence_block` would make it; None where it has items that are not there yet. Those
    of its tables that stay as they are remain the same tensors."""
    items, found = {}, np.zeros(len(shift.tails), dtype=np.int64)
    for key, table in block.items.items():
        numbers = table.numpy()
        own = _chosen(numbers, shift) if key.chosen else _whole(numbers, shift, found)
        items[key] = table if own is numbers else torch.from_numpy(own)
    if shift.grown is not None and not (found == 1).all():
        return None
    choices = dict(block.choices)
    if shift.choices is not None:
        for kind, table in choices.items():
            own = table.numpy().copy()
            held = own[:, 0, _LANDMARKS] != 0
            own[held, 0, _CHOICE_SECOND] = shift.choices[held]
            choices[kind] = torch.from_numpy(own)
    tails = {}
    for dtype, table in block.tails.items():
        own = table.numpy().copy()
        own[:, 0, _TAIL_FIRST] = shift.first
        tails[dtype] = torch.from_numpy(own)
    most_chunks = max(block.most_chunks, shift.most_chunks)
    return replace(block, items=items, choices=choices, tails=tails, most_chunks=most_chunks)


def _chosen(numbers: Numbers, shift: Shift) -> Numbers:
    """Items of chosen chunks."""
    if shift.second is None:
        return numbers
    own = numbers.copy()
    layers, places = np.nonzero(own[..., _ROW] >= 0)
    own[layers, places, _SECOND] = shift.second[layers]
    return own


def _whole(numbers: Numbers, shift: Shift, found: Numbers) -> Numbers:
    """Items of regions that are read whole; counts each layer's last item of the grown rows in `found`."""
    own, keys = numbers.copy(), numbers[..., _K0]
    tails = keys == shift.tails[:, None]
    own[tails, _LIMIT] = own[tails, _FIRST] = shift.first
    changed = tails.any()
    if shift.sinks is not None:
        sinks = keys == shift.sinks[:, None]
        own[sinks, _FIRST] = shift.sinks_first
        changed |= sinks.any()
    if shift.grown is not None and split_rows(shift.num_grown) == MIN_SPLIT_KEYS:
        begin = (shift.num_grown - 1) // MIN_SPLIT_KEYS * MIN_SPLIT_KEYS
        last = (keys == shift.grown[:, None]) & (numbers[..., _BEGIN] == begin)
        own[last, _END] = shift.num_grown
        found += last.sum(axis=1)
        changed |= last.any()
    return own if changed else numbers
