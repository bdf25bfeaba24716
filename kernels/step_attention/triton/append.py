"""Writing a step's rows into the tails of their sequences."""

from __future__ import annotations

import triton
import triton.language as tl

TAIL_K, TAIL_V, TAIL_FIRST, UNROTATED = (tl.constexpr(i) for i in range(4))
TAIL_FIELDS: tl.constexpr = tl.constexpr(4)
TAIL_ADDRESSES = (0, 1)


@triton.jit
def append_rows(
    table_ptr, k_pre_ptr, k_ptr, v_ptr, positions_ptr, k_pre_strides, k_strides, v_strides,
    DTYPE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows [n, Hkv, d], strided, to their places. Grid: rows.

    table int64 [n, TAIL_FIELDS]: addresses of a row's tail, the position of its first row (below 0: the row goes
    nowhere), whether it keeps keys before RoPE. A row whose position is below the first one's goes nowhere, too.
    """
    row = tl.program_id(0).to(tl.int64)
    at = table_ptr + row * TAIL_FIELDS
    first = tl.load(at + TAIL_FIRST)
    position = tl.load(positions_ptr + row)
    if (first < 0) | (position < first):
        return
    heads, dims = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = (heads < NUM_KV_HEADS) & (dims < HEAD_DIM)
    place = (position - first) * (NUM_KV_HEADS * HEAD_DIM) + heads * HEAD_DIM + dims
    if tl.load(at + UNROTATED) != 0:
        source = k_pre_ptr + row * k_pre_strides[0] + heads * k_pre_strides[1] + dims * k_pre_strides[2]
    else:
        source = k_ptr + row * k_strides[0] + heads * k_strides[1] + dims * k_strides[2]
    k = tl.load(source, mask=mask)
    v = tl.load(v_ptr + row * v_strides[0] + heads * v_strides[1] + dims * v_strides[2], mask=mask)
    tl.store(tl.load(at + TAIL_K).to(tl.pointer_type(DTYPE)) + place, k.to(DTYPE), mask=mask)
    tl.store(tl.load(at + TAIL_V).to(tl.pointer_type(DTYPE)) + place, v.to(DTYPE), mask=mask)
