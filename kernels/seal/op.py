"""Checks and dispatch of what sealing does on the device.

    tail [block, Hkv, d]  ──pack──>  codes, scales, factor rows  ──decode, rotate, average──>  landmarks

A job is one block of one layer of one sequence. Its tensors are named by address, so that one launch serves all jobs
that are packed alike, and what a job gives does not depend on the others. The numbers are those of `quantize` and
`compression.retrieval`: landmarks describe the packed rows, not the exact ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dispatch import REFERENCE, TRITON, Modules, backend, require
from ..step_attention import Layout

_IMPLEMENTATIONS = Modules(__package__, REFERENCE, TRITON)

SEAL_FIELDS = 13
MOVE_FIELDS = 3
_MOST_ROWS = 128
_MOST_RANK = 2048
_TAILS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SealKey:
    """Blocks that are packed alike.

    Attributes:
        keys, values: how rows are packed.
        dtype: of the tails' rows.
        num_rows: of a block.
        chunk: rows a landmark.
        landmark_bits: 8, 16, or 0 where there are no landmarks.
        rotates: keys are packed before RoPE, so landmarks are rotated.
    """

    keys: Layout
    values: Layout
    dtype: torch.dtype
    num_rows: int
    chunk: int
    landmark_bits: int
    rotates: bool
    num_kv_heads: int
    head_dim: int


def serves(key: SealKey) -> bool:
    """Whether the kernels pack such blocks."""
    rows = key.num_rows
    fits = 16 <= rows <= _MOST_ROWS and rows & (rows - 1) == 0 and rows % key.chunk == 0
    fits = fits and key.head_dim % 16 == 0 and key.dtype in _TAILS
    return fits and _packs(key.keys, rows) and _packs(key.values, rows)


def _packs(layout: Layout, num_rows: int) -> bool:
    if layout.kind == "dense":
        return layout.dtype in _TAILS
    if layout.kind == "lowrank":
        return layout.rank <= _MOST_RANK and (layout.bits == 16 or layout.rank % 2 == 0)
    if layout.kind == "channel":
        return num_rows % layout.group == 0
    return True


def seal_blocks(key: SealKey, table: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Pack one block a job and write what attention reads of it. Waits for nothing.

    Args:
        table: int64 [jobs, SEAL_FIELDS], the addresses of: the block's first row in the tails of keys and of values;
            then not an address but the row of `cos` and `sin` at which the block's angles begin; the packed keys
            (three, 0 where there are fewer) and what they share, the values likewise, each at the block's first row;
            its first landmark and landmark's scale.
        cos, sin: float32 [angles, d], both halves alike; empty unless `key.rotates`.

    Raises:
        ValueError: tensors of other shapes, or a key that is not served.
    """
    require(serves(key), f"{key} is not served")
    require(table.dtype == torch.int64 and table.dim() == 2, f"table is {table.dtype} {tuple(table.shape)}")
    require(table.shape[1] == SEAL_FIELDS and table.is_contiguous(), f"table is not [jobs, {SEAL_FIELDS}]")
    require(cos.shape == sin.shape and cos.is_contiguous() and sin.is_contiguous(), "cos and sin differ")
    require(not key.rotates or cos.shape[-1] == key.head_dim, f"angles are {tuple(cos.shape)}, not [n, {key.head_dim}]")
    if len(table):
        backend(table.device, _IMPLEMENTATIONS).seal_blocks(key, table, cos, sin)


def move_rows(table: Tensor, row_nbytes: int, least: int) -> None:
    """Move rows to the front of the tensors that hold them. Waits for nothing.

    Args:
        table: int64 [tensors, MOVE_FIELDS]: the address of a tensor's first row, the first row to move, how many.
        row_nbytes: a multiple of 8.
        least: the lowest first row to move; above 0.

    Raises:
        ValueError: numbers that do not fit.
    """
    require(table.dtype == torch.int64 and table.dim() == 2, f"table is {table.dtype} {tuple(table.shape)}")
    require(table.shape[1] == MOVE_FIELDS and table.is_contiguous(), f"table is not [tensors, {MOVE_FIELDS}]")
    require(row_nbytes % 8 == 0 and least > 0, f"rows of {row_nbytes} bytes from row {least}")
    if len(table):
        backend(table.device, _IMPLEMENTATIONS).move_rows(table, row_nbytes, least)
