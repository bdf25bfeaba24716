"""What one decode step attends to, as the tensors that hold it. Free of Triton."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..hot_set import HotView

Kind = Literal["dense", "channel", "token", "float8", "lowrank"]


@dataclass(frozen=True)
class Layout:
    """How rows of keys or values are packed; what a compiled kernel is made for.

    Attributes:
        kind: `dense` floating-point rows; integers with a scale and minimum per group of a `channel`'s rows or of a
            `token`'s channels, as `quantize` packs them; `float8` e4m3 with one scale; `lowrank` factor rows that are
            multiplied by a basis.
        dtype: of dense rows.
        bits: of integers; 16 for factor rows that are bfloat16.
        group: elements that share a scale.
        rank: columns of factor rows.
        balanced: channels were multiplied by a factor each before they were packed.
    """

    kind: Kind
    dtype: torch.dtype | None = None
    bits: int = 16
    group: int = 0
    rank: int = 0
    balanced: bool = False

    def alignment(self, head_dim: int) -> int:
        """Bytes, up to 16, by which every row of a head is aligned where the first one is; kernels rely on it."""
        if self.kind == "lowrank":
            row_bytes = self.rank * self.bits // 8
        elif self.dtype is not None:
            row_bytes = head_dim * self.dtype.itemsize
        else:
            row_bytes = head_dim * (8 if self.kind == "float8" else self.bits) // 8
        return math.gcd(16, row_bytes)


@dataclass(frozen=True)
class Packed:
    """Rows of keys or values.

    Attributes:
        tensors: contiguous; dense and float8: rows [n, Hkv, d]; integers: codes, scale and minimum as `quantize` gives
            them for [n, Hkv, d]; lowrank: rows [n, rank] bfloat16, or codes, scale and minimum of those.
        basis: what all rows share: lowrank bfloat16 [rank, Hkv, d], float8 float32 [1], balanced float32 [1, Hkv, d].
    """

    layout: Layout
    tensors: tuple[Tensor, ...]
    basis: Tensor | None = None


@dataclass(frozen=True)
class Region:
    """Rows of one layer of one sequence that lie together.

    Attributes:
        num_rows: how many there are, or room for where `grows`.
        first: position of the first row; they are consecutive unless there is an `index`.
        index: int32 [chunks], ids of chunks whose rows are at positions id * chunk + 0, 1, …, the same for all heads;
            or int32 [n, Hkv], positions of each KV head's rows.
        rotates: keys are rotated at their position when they are read.
        grows: the rows end at the query's own position.
        by_position: rows count only at positions up to the query's own; those that are not there are beyond all.
    """

    keys: Packed
    values: Packed
    num_rows: int
    first: int
    index: Tensor | None = None
    rotates: bool = False
    grows: bool = False
    by_position: bool = False


@dataclass(frozen=True)
class Kept:
    """What a layer of a sequence attends to until the next choice is due, see `compression.kept_choice`.

    Attributes:
        chunks: int32 [Hkv, num_chosen].
        state: int32 [Hkv, 2], how many of them count, and the position of a row that attended to them or -1.
        every: positions a block, of which the first row chooses.
    """

    chunks: Tensor
    state: Tensor
    every: int


@dataclass(frozen=True)
class Chunks:
    """Rows of one layer of one sequence of which each query attends to the best chunks.

    Attributes:
        segments: one or two regions, laid end to end, packed alike, whose rows are whole chunks.
        landmarks: of every segment, means of its chunks [n, Hkv, d], floating point or int8.
        scales: of int8 landmarks, [n, Hkv].
        num_chosen: how many chunks a query attends to.
        hidden: int32 [O, Hkv], chunks that are not chosen, as they are attended to anyway; or None.
        hot: where the first segment's values lie in host memory: its values are then those of the hot set, [slots *
            chunk, Hkv, …].
        kept: what was chosen last, where not every row chooses; or None.
    """

    segments: tuple[Region, ...]
    landmarks: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    num_chosen: int
    hidden: Tensor | None = None
    hot: HotView | None = None
    kept: Kept | None = None

    @property
    def num_rows(self) -> int:
        return sum(segment.num_rows for segment in self.segments)


@dataclass(frozen=True)
class View:
    """All that one sequence attends to in one layer.

    Attributes:
        regions: those that every query reads whole.
        chunks: those that a query reads parts of.
        chunk: rows a chunk.
        window: width of the layer's sliding window in positions, or None.
        tail: where the next rows go: keys and values [capacity, Hkv, d]; the position of their first row; whether keys
            go there before RoPE.
    """

    regions: tuple[Region, ...]
    chunks: Chunks | None
    chunk: int
    window: int | None
    tail: Tail = field(repr=False)


@dataclass(frozen=True)
class Tail:
    """Where a sequence's next rows go.

    Attributes:
        k, v: [capacity, Hkv, d].
        first: position of row 0.
        unrotated: whether keys are kept before RoPE.
    """

    k: Tensor
    v: Tensor
    first: int
    unrotated: bool
