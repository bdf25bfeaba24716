"""Launches of the sealing kernels. Nothing here waits for the device."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ...step_attention import Layout
from ...step_attention.triton.launch import DTYPES, KINDS
from ..op import SealKey
from .landmarks import summarize_blocks
from .rows import KEYS, ROWS, VALUES, pack_factors, pack_rows, project_rows, shift_rows

TILE = 16  # the least side of a matrix product
TILE_ROWS = 32
FACTORS = 2048  # a program packs
MOVE_WORDS = 64


def seal_blocks(key: SealKey, table: Tensor, cos: Tensor, sin: Tensor) -> None:
    """See `op.seal_blocks`."""
    with torch.cuda.device_of(table):
        _pack(key, table, key.keys, ROWS.value, KEYS.value)
        _pack(key, table, key.values, ROWS.value + 1, VALUES.value)
        if key.landmark_bits:
            rows = min(TILE_ROWS, key.num_rows)
            summarize_blocks[(len(table), key.num_kv_heads, key.num_rows // rows)](
                table, cos, sin, K=_layout(key.keys, key.head_dim), H=(key.head_dim, key.num_kv_heads, 1),
                CHUNK=key.chunk, LANDMARK_BITS=key.landmark_bits, ROTATES=key.rotates, BLOCK_N=rows,
                BLOCK_H=max(TILE, triton.next_power_of_2(key.head_dim // 2)), WIDE=triton.knobs.runtime.interpret,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip


def _pack(key: SealKey, table: Tensor, layout: Layout, source: int, field: int) -> None:
    tail, numbers = DTYPES[key.dtype], _layout(layout, key.head_dim)
    if layout.kind != "lowrank":
        columns = triton.next_power_of_2(key.head_dim)
        rows = min(key.num_rows, max(TILE_ROWS, layout.group if layout.kind == "channel" else 0))
        span = layout.group if layout.kind == "channel" else min(layout.group or columns, columns)
        pack_rows[(len(table), key.num_kv_heads, key.num_rows // rows)](
            table, SOURCE=source, FIELD=field, TAIL=tail, L=numbers, H=(key.head_dim, key.num_kv_heads, 1),
            BLOCK_R=rows, BLOCK_D=columns, SPAN=span, num_warps=4 if rows <= TILE_ROWS else 8, enable_fp_fusion=False,
        )  # fmt: skip
        return
    factors = torch.empty(len(table), key.num_rows, layout.rank, dtype=torch.float32, device=table.device)
    rows, width = min(TILE_ROWS, key.num_rows), key.num_kv_heads * key.head_dim
    # products of two bfloat16 numbers are exact in float32; other rows are multiplied in float32
    wide = triton.knobs.runtime.interpret or key.dtype != torch.bfloat16
    project_rows[(len(table), triton.cdiv(layout.rank, 32), key.num_rows // rows)](
        table, factors, SOURCE=source, FIELD=field, TAIL=tail, WIDTH=width, RANK_SIZE=layout.rank,
        NUM_ROWS=key.num_rows, BLOCK_R=rows, BLOCK_K=32, BLOCK_C=64, WIDE=wide,
        num_warps=4 if key.dtype == torch.bfloat16 else 8,  # fewer would spill registers
    )  # fmt: skip
    columns = max(8, triton.next_power_of_2(layout.rank))
    rows = min(key.num_rows, max(1, FACTORS // columns))
    pack_factors[(len(table), key.num_rows // rows)](
        table, factors, FIELD=field, L=numbers, NUM_ROWS=key.num_rows, BLOCK_R=rows, BLOCK_K=columns,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _layout(layout: Layout, head_dim: int) -> tuple[Any, ...]:
    """As the tiles take it: blocks of keys begin at multiples of `TILE_ROWS` of a job."""
    sharing = math.gcd(layout.group, TILE_ROWS) if layout.kind == "channel" else 1
    numbers = (layout.bits, layout.group, layout.rank, layout.balanced, layout.alignment(head_dim), sharing)
    return (KINDS[layout.kind], DTYPES[layout.dtype], *numbers)


def move_rows(table: Tensor, row_nbytes: int, least: int) -> None:
    """See `op.move_rows`."""
    words = row_nbytes // 8
    rows = min(TILE_ROWS, 1 << (least.bit_length() - 1))
    with torch.cuda.device_of(table):
        shift_rows[(len(table), triton.cdiv(words, MOVE_WORDS))](
            table, WORDS=words, BLOCK_R=rows, BLOCK_W=MOVE_WORDS, num_warps=4
        )
