"""Generated rows of a sequence as they are kept elsewhere, so that another cache over the same prompt can go on from
them.

What is kept is what went into the tails, before anything was sealed: a cache that is given the same rows in the same
order seals the same blocks, bit for bit, whatever the recipe does to them. Rows that were recalled lie beside what was
packed and depend on what was there when they came, so they are kept, too (`recall`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import FrameMismatch
from .interfaces import EncodedLayer, Part
from .recall import NAMES as RECALLED
from .spec import ModelShape

if TYPE_CHECKING:
    from .segment import Tail

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def saved_rows(tails: Sequence[Tail], begin: int, end: int) -> list[EncodedLayer]:
    """Copies of the rows at positions begin ≤ p < end of every layer's tail; see `SequenceCache.rows`."""
    assert all(tail.begin <= begin < end <= tail.end for tail in tails), "rows are kept before they are sealed"
    rows = []
    for tail in tails:
        used = slice(begin - tail.begin, end - tail.begin)
        rows += [held[used] for held in tail.rows()]
    copies = torch.stack(rows).unbind(0)  # one launch on a GPU
    return [
        EncodedLayer(layer, {Part.TAIL: {"k": copies[2 * layer], "v": copies[2 * layer + 1]}})
        for layer in range(len(tails))
    ]


def first_rows(layers: Sequence[EncodedLayer], begin: int, count: int) -> list[EncodedLayer]:
    """The first `count` of rows that begin at position `begin`, with what those have recalled."""
    return [
        EncodedLayer(one.layer, {part: _first(group, begin, count) for part, group in one.tensors.items()})
        for one in layers
    ]


def _first(group: Mapping[str, Tensor], begin: int, count: int) -> dict[str, Tensor]:
    own = {name: t[:count] for name, t in group.items() if name not in RECALLED}
    if RECALLED[0] not in group:
        return own
    chunks = group[RECALLED[0]]
    if chunks.dim() != 2 or chunks.shape[1] != 2:
        raise FrameMismatch(f"recalled rows are named by a tensor of shape {tuple(chunks.shape)}, not [n, 2]")
    kept, all_chunks = int((chunks[:, 1] < begin + count).sum()), max(1, len(chunks))
    more = {name: group[name][: len(group[name]) // all_chunks * kept] for name in RECALLED if name in group}
    return own | more if kept else own


def check_rows(
    tails: Sequence[Tail],
    begin: int,
    layers: Sequence[EncodedLayer],
    shape: ModelShape,
    others: Sequence[str] = (),
) -> int:
    """How many rows each of the layers has that are to follow what the tails hold.

    Args:
        others: names of tensors that may be there besides, of any number of rows.

    Raises:
        FrameMismatch: see `SequenceCache.put_rows`.
    """
    if [encoded.layer for encoded in layers] != list(range(len(tails))):
        raise FrameMismatch(f"rows of {len(layers)} layers are here, not one of each of {len(tails)} in order")
    num_rows = -1
    for tail, encoded in zip(tails, layers, strict=True):
        group = encoded.tensors.get(Part.TAIL, {})
        if set(encoded.tensors) != {Part.TAIL} or set(group) - set(others) != {"k", "v"}:
            raise FrameMismatch(f"layer {encoded.layer}: rows have other tensors than k and v of the tail")
        num_rows = len(group["k"]) if num_rows < 0 else num_rows
        for name, rows in group.items():
            wanted = (len(rows) if name in others else num_rows, shape.num_kv_heads, shape.head_dim)
            if name == RECALLED[0]:
                continue  # who puts them back looks at it
            if tuple(rows.shape) != wanted or not num_rows or rows.dtype not in _dtypes(tail):
                allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in _dtypes(tail))
                raise FrameMismatch(
                    f"layer {encoded.layer}: rows {name} are {rows.dtype} {tuple(rows.shape)}, "
                    f"expected {allowed} {wanted}"
                )
        if tail.end != begin:
            raise FrameMismatch(f"layer {encoded.layer}: rows begin at {begin}, the cache ends at {tail.end}")
    return num_rows


def _dtypes(tail: Tail) -> tuple[torch.dtype, ...]:
    """What rows of a tail may be: one that holds none yet takes what comes."""
    return _FLOATS if tail.dtype is None else (tail.dtype,)


def put_saved_rows(tails: Sequence[Tail], layers: Sequence[EncodedLayer], begin: int, end: int) -> None:
    """Append rows begin ≤ i < end of what `saved_rows` gave."""
    for tail, encoded in zip(tails, layers, strict=True):
        group = encoded.tensors[Part.TAIL]
        tail.append(group["k"][begin:end], group["v"][begin:end])
