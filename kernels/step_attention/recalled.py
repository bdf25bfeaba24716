"""Rows of a prompt that come back within a step, as its kernels are told of them. Built on the host.

    layer T   a row's attention says which chunks it wants: the best of those that are not here are brought back, and
              the oldest ones make room
    behind T  the step has so many more rows a sequence, whether any came back or not: those that did not are at
              position -1, see nothing and go nowhere

What is here lies in a ring: the n-th chunk that a sequence ever brought back has slot n modulo their number, and as the
oldest ones leave first, the chunks that are here follow each other. So where a chunk lies, and in which order rows are
added up, is a function of what was brought back, whoever ran the steps.

    state  int64 [STATE_FIELDS + 2 * slots]   counts of all chunks that ever came, see below; then of every slot the
                                              chunk's number and the position of the row that wanted it
    ids    int32 [slots]                      position // chunk of what a slot holds, or FAR, beyond all positions
    here   uint8 [chunks that may come back]  which of them are here
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import OUT_FIELD, Block, RecallBlock, RecallKey, attend_key, choice_key, sequence_block
from .packed import View

# fields of a state: how many chunks ever came; how many had before the last step; how many of the first ones have left,
# and had before it; its row's position, -1 = none; the last row that displaced what is not remembered any more, or -1
END, JOINED, FIRST, BEFORE, LAST, DISPLACED = range(6)
STATE_FIELDS = 6
FAR = 1 << 30
JOB_FIELDS, JOB_ROW = 17, 0
LEAST_SPLIT = 2048  # there are many rows, and the results of all their items are held at once


@dataclass(frozen=True)
class RecallView:
    """What one sequence may bring back.

    Attributes:
        layer: T.
        chunk: rows a chunk.
        most: chunks that one row brings back.
        capacity: chunks that are here at once.
        state, ids, here: see the module.
        chunks: int32 [n], ids of what may come back, ascending.
        first: id of the first chunk of layer T's sealed rows.
        packed: codes, scale and minimum of the hidden rows [n * chunk, 1, …] on the device, or None.
        pages, page_chunks: addresses of pages of host memory that they lie in otherwise, as `hot_set` has it, and how
            many chunks a page holds.
        bits, group, width: how rows of `width` columns are packed.
        deep: what a row that came back attends to, of every layer; nothing in those up to T.
    """

    layer: int
    chunk: int
    most: int
    capacity: int
    state: Tensor
    ids: Tensor
    here: Tensor
    chunks: Tensor
    first: int
    packed: tuple[Tensor, ...] | None
    pages: Tensor | None
    page_chunks: int
    bits: int
    group: int
    width: int
    deep: Sequence[View]


def recall_block(recall: RecallView, views: Sequence[View], block: Block) -> RecallBlock:
    """What a sequence's block says of rows that come back.

    Args:
        views, block: of the sequence.
    """
    view = views[recall.layer]
    assert view.chunks is not None, "layer T chooses chunks"
    most = 1 << (recall.most - 1).bit_length()
    choice = choice_key(view)
    key = RecallKey(recall.layer, recall.chunk, most, recall.width, recall.bits, recall.group, choice)
    any_hot = any(one.chunks is not None and one.chunks.hot is not None for one in views)
    chosen = block.items[attend_key(view.chunks.segments[0], view.chunk, chosen=True, hot=any_hot)]
    job = recall_job(recall, int(chosen[0, 0, OUT_FIELD]), chosen.shape[1])
    return RecallBlock(key, job, sequence_block(recall.deep, LEAST_SPLIT), len(recall.chunks))


def recall_job(recall: RecallView, first: int, count: int) -> Tensor:
    """What the kernels that bring rows back are told of a sequence, int64 [JOB_FIELDS].

    Args:
        first, count: partial results of the sequence's attention in layer T that are of chosen chunks.
    """
    rows = [0, 0, 0] if recall.packed is None else [tensor.data_ptr() for tensor in recall.packed]
    job = [
        0,
        recall.state.data_ptr(),
        recall.ids.data_ptr(),
        recall.here.data_ptr(),
        recall.chunks.data_ptr(),
        len(recall.chunks),
        recall.first,
        recall.most,
        recall.capacity,
        len(recall.ids),
        *rows,
        0 if recall.pages is None else recall.pages.data_ptr(),
        recall.page_chunks,
        first,
        count,
    ]
    assert len(job) == JOB_FIELDS, "as the kernels read it"
    return torch.tensor(job, dtype=torch.int64)
