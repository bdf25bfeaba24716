"""`attention_mass` as two kernels: the softmax's denominators, a tile of queries each, and the column sums, a tile of
keys each. No score leaves the chip."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_QUERIES = 64
BLOCK_KEYS = 64


def attention_mass(q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor, window: int | None) -> Tensor:
    """See `op.attention_mass`."""
    num_rows, num_heads, d = q.shape
    num_keys, num_kv_heads, _ = k.shape
    mass = torch.zeros(num_kv_heads, num_keys, dtype=torch.float32, device=q.device)
    if num_rows == 0 or num_keys == 0:
        return mass
    if not (q.is_cuda and q.dtype == k.dtype):  # else products of two bfloat16 numbers are exact in float32
        q, k = q.float(), k.float()
    lse = torch.empty(num_heads, num_rows, dtype=torch.float32, device=q.device)
    shape = {
        "GROUP": num_heads // num_kv_heads,
        "D": d,
        "D_PAD": max(16, triton.next_power_of_2(d)),
        "ROWS": BLOCK_QUERIES,
        "KEYS": BLOCK_KEYS,
        "HAS_WINDOW": window is not None,
    }
    common = (num_rows, num_keys, 1.0 / math.sqrt(d), window or 0, *q.stride(), *k.stride())
    tiles = triton.cdiv(num_rows, BLOCK_QUERIES)
    _denominators[(tiles, num_heads)](q, k, q_positions, k_positions, lse, *common, **shape)
    _column_sums[(triton.cdiv(num_keys, BLOCK_KEYS), num_kv_heads)](
        q, k, q_positions, k_positions, lse, mass, *common, **shape
    )
    return mass


@triton.jit
def _tile(
    q,
    k,
    q_positions,
    k_positions,
    row,
    key,
    query_head,
    num_rows,
    num_keys,
    scale,
    window,
    q_row,
    q_head,
    q_dim,
    k_key,
    k_head,
    k_dim,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Masked scores [rows, keys] of one query head."""
    dims = tl.arange(0, D_PAD)
    is_dim, is_row, is_key = dims < D, row < num_rows, key < num_keys
    queries = tl.load(
        q + row[:, None].to(tl.int64) * q_row + query_head * q_head + dims[None, :] * q_dim,
        mask=is_row[:, None] & is_dim[None, :],
        other=0,
    )
    keys = tl.load(
        k + key[None, :].to(tl.int64) * k_key + (query_head // GROUP) * k_head + dims[:, None] * k_dim,
        mask=is_key[None, :] & is_dim[:, None],
        other=0,
    )
    scores = tl.dot(queries, keys, input_precision="ieee") * scale
    q_at = tl.load(q_positions + row, mask=is_row, other=-1)
    k_at = tl.load(k_positions + key, mask=is_key, other=0)
    seen = is_key[None, :] & is_row[:, None] & (k_at[None, :] <= q_at[:, None])
    if HAS_WINDOW:
        seen &= k_at[None, :] > q_at[:, None] - window
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _denominators(
    q,
    k,
    q_positions,
    k_positions,
    lse,
    num_rows,
    num_keys,
    scale,
    window,
    q_row,
    q_head,
    q_dim,
    k_key,
    k_head,
    k_dim,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    query_head = tl.program_id(1)
    last = tl.max(tl.load(q_positions + row, mask=row < num_rows, other=-1), axis=0)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for begin in range(0, num_keys, KEYS):
        # positions ascend, so a block that begins after the last query is not seen at all
        if tl.load(k_positions + begin) <= last:
            key = begin + tl.arange(0, KEYS)
            scores = _tile(
                q,
                k,
                q_positions,
                k_positions,
                row,
                key,
                query_head,
                num_rows,
                num_keys,
                scale,
                window,
                q_row,
                q_head,
                q_dim,
                k_key,
                k_head,
                k_dim,
                GROUP,
                D,
                D_PAD,
                HAS_WINDOW,
            )
            new_peak = tl.maximum(peak, tl.max(scores, axis=1))
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            total = total * tl.exp(peak - shift) + tl.sum(tl.exp(scores - shift[:, None]), axis=1)
            peak = new_peak
    tl.store(lse + query_head * num_rows + row, peak + tl.log(tl.where(total == 0.0, 1.0, total)), mask=row < num_rows)


@triton.jit
def _column_sums(
    q,
    k,
    q_positions,
    k_positions,
    lse,
    mass,
    num_rows,
    num_keys,
    scale,
    window,
    q_row,
    q_head,
    q_dim,
    k_key,
    k_head,
    k_dim,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    first_key = tl.program_id(0) * KEYS
    key = first_key + tl.arange(0, KEYS)
    head = tl.program_id(1)
    first_position = tl.load(k_positions + first_key)
    sums = tl.zeros((KEYS,), tl.float32)
    for begin in range(0, num_rows, ROWS):
        row = begin + tl.arange(0, ROWS)
        if tl.max(tl.load(q_positions + row, mask=row < num_rows, other=-1), axis=0) >= first_position:
            for member in range(GROUP):
                query_head = head * GROUP + member
                scores = _tile(
                    q,
                    k,
                    q_positions,
                    k_positions,
                    row,
                    key,
                    query_head,
                    num_rows,
                    num_keys,
                    scale,
                    window,
                    q_row,
                    q_head,
                    q_dim,
                    k_key,
                    k_head,
                    k_dim,
                    GROUP,
                    D,
                    D_PAD,
                    HAS_WINDOW,
                )
                total = tl.load(lse + query_head * num_rows + row, mask=row < num_rows, other=0)
                sums += tl.sum(tl.exp(scores - total[:, None]), axis=0)
    tl.store(mass + head * num_keys + key, sums, mask=key < num_keys)
