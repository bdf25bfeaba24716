"""`attention_mass` as two kernels: the softmax's denominators, a tile of queries each, and the column sums, a tile of
keys each. No score leaves the chip."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_partial.triton import TILE, dot, multipliable, visible_keys

TILE_PAIRS = 64  # queries times heads that tensor cores multiply at once
ENOUGH_PROGRAMS = 512  # where tiles of queries are fewer, their keys are split
MIN_SPLIT_KEYS = 512


@triton.jit(do_not_specialize=["num_rows", "num_keys", "split_keys", "window"])
def _denominators(
    q_ptr, k_ptr, q_at_ptr, k_at_ptr, first_ptr, stop_ptr, lse_ptr, q_strides, k_strides,
    num_rows, num_keys, split_keys, window, scale,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, TILE_ROWS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """lse [splits, c, H]. Grid: tiles of rows, KV heads, splits. A tile sees keys first..stop only."""
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pairs, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    rows = (tile * TILE_ROWS + pairs // GROUP).to(tl.int64)
    heads = (kv_head * GROUP + pairs % GROUP).to(tl.int64)
    used = (pairs < TILE_ROWS * GROUP) & (rows < num_rows)
    q_at = rows[:, None] * q_strides[0] + heads[:, None] * q_strides[1] + dims[None, :] * q_strides[2]
    q = tl.load(q_ptr + q_at, mask=used[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    rows_at = tl.load(q_at_ptr + rows, mask=used, other=0)
    k_ptr += kv_head.to(tl.int64) * k_strides[1]
    begin, end = split * split_keys, tl.minimum((split + 1) * split_keys, tl.load(stop_ptr + tile).to(tl.int32))
    if HAS_WINDOW:
        begin = tl.maximum(begin, tl.load(first_ptr + tile).to(tl.int32))
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(begin, end, BLOCK_N):
        index = start + tl.arange(0, BLOCK_N)
        inside, keys = index < end, index.to(tl.int64)
        k_tile = k_ptr + keys[:, None] * k_strides[0] + dims[None, :] * k_strides[2]
        k = tl.load(k_tile, mask=inside[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        visible = visible_keys(k_at_ptr, None, 1, 0, rows_at, keys, inside, window, HAS_WINDOW)
        scores = tl.where(visible, dot(q, tl.trans(k)) * scale, float("-inf"))
        next_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(next_peak == float("-inf"), 0.0, next_peak)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(scores - shift[:, None]), 1)
        peak = next_peak
    pair = (split.to(tl.int64) * num_rows + rows) * (tl.num_programs(1) * GROUP) + heads
    tl.store(lse_ptr + pair, peak + tl.log(tl.where(total > 0, total, 1.0)), mask=used)


@triton.jit(do_not_specialize=["num_columns", "num_heads", "window"])
def _column_sums(
    q_ptr, k_ptr, q_at_ptr, k_at_ptr, first_ptr, stop_ptr, lse_ptr, mass_ptr, q_strides, k_strides,
    num_columns, num_heads, window, scale,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, HAS_WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """mass [H / SPAN, columns]. Grid: tiles of keys, groups of SPAN query heads. Rows first..stop see a tile."""
    tile, span = tl.program_id(0), tl.program_id(1)
    index, dims = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside, keys, is_dim = index < num_columns, index.to(tl.int64), (dims < HEAD_DIM)[None, :]
    k_ptr += (span * SPAN // GROUP).to(tl.int64) * k_strides[1]
    k_tile = k_ptr + keys[:, None] * k_strides[0] + dims[None, :] * k_strides[2]
    columns = tl.trans(tl.load(k_tile, mask=inside[:, None] & is_dim, other=0.0))
    begin, end = tl.load(first_ptr + tile).to(tl.int32) * SPAN, tl.load(stop_ptr + tile).to(tl.int32) * SPAN
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_M):
        pairs = start + tl.arange(0, BLOCK_M)
        used, rows, heads = pairs < end, (pairs // SPAN).to(tl.int64), (span * SPAN + pairs % SPAN).to(tl.int64)
        q_tile = q_ptr + rows[:, None] * q_strides[0] + heads[:, None] * q_strides[1] + dims[None, :] * q_strides[2]
        q = tl.load(q_tile, mask=used[:, None] & is_dim, other=0.0)
        rows_at = tl.load(q_at_ptr + rows, mask=used, other=0)
        lse = tl.load(lse_ptr + rows * num_heads + heads, mask=used, other=0.0)
        visible = visible_keys(k_at_ptr, None, 1, 0, rows_at, keys, inside, window, HAS_WINDOW) & used[:, None]
        scores = tl.where(visible, dot(q, columns) * scale, float("-inf"))
        sums += tl.exp(scores - tl.where(lse == float("-inf"), 0.0, lse)[:, None])
    tl.store(mass_ptr + span.to(tl.int64) * num_columns + keys, tl.sum(sums, 0), mask=inside)


def attention_mass(q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor, window: int | None) -> Tensor:
    """See `op.attention_mass`."""
    return column_mass(q, k, q_positions, k_positions, window, q.shape[1] // k.shape[1], k.shape[0])


def column_mass(
    q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor, window: int | None, span: int, num_columns: int
) -> Tensor:
    """Attention that the first keys receive, summed over the queries and over `span` query heads.

    Args:
        q: [c, H, d].
        k: [m, Hkv, d].
        q_positions, k_positions: int64 [c] and [m], ascending.
        span: divides the GQA group.
        num_columns: how many of the keys.

    Returns:
        float32 [H / span, num_columns].
    """
    if len(q) == 0 or num_columns == 0:
        return torch.zeros(q.shape[1] // span, num_columns, dtype=torch.float32, device=q.device)
    q, k = multipliable(q), multipliable(k)
    q_positions, k_positions = q_positions.contiguous(), k_positions.contiguous()
    lse = _row_lse(q, k, q_positions, k_positions, window)
    mass = torch.empty(q.shape[1] // span, num_columns, dtype=torch.float32, device=q.device)
    shape = _shape(q, k, len(q) * span, window)
    tiles = -(-num_columns // shape["BLOCK_N"])
    at = k_positions[:num_columns]
    first = torch.searchsorted(q_positions, at[:: shape["BLOCK_N"]].contiguous())
    if window is None:
        stop = torch.full_like(first, len(q))
    else:
        last = torch.cat((at[shape["BLOCK_N"] - 1 :: shape["BLOCK_N"]], at[-1:]))[:tiles]
        stop = torch.searchsorted(q_positions, last + window)
    with torch.cuda.device_of(q):
        _column_sums[(tiles, len(mass))](
            q, k, q_positions, k_positions, first, stop, lse, mass, q.stride(), k.stride(),
            num_columns, q.shape[1], window or 0, 1 / math.sqrt(q.shape[2]), SPAN=span, **shape,
        )  # fmt: skip
    return mass


def _row_lse(q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor, window: int | None) -> Tensor:
    """Log of each row's sum of exponentials, float32 [c, H]."""
    num_rows, num_heads, _ = q.shape
    num_keys, num_kv_heads, _ = k.shape
    shape = _shape(q, k, num_rows * (num_heads // num_kv_heads), window)
    tile_rows = shape["BLOCK_M"] // shape["GROUP"]
    tiles = -(-num_rows // tile_rows)
    last = torch.cat((q_positions[tile_rows - 1 :: tile_rows], q_positions[-1:]))[:tiles]
    stop = torch.searchsorted(k_positions, last, right=True)
    first = None
    if window is not None:
        first = torch.searchsorted(k_positions, q_positions[::tile_rows] - window, right=True)
    splits = min(-(-num_keys // MIN_SPLIT_KEYS), max(1, ENOUGH_PROGRAMS // (tiles * num_kv_heads)))
    lse = torch.empty(splits, num_rows, num_heads, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _denominators[(tiles, num_kv_heads, splits)](
            q, k, q_positions, k_positions, first, stop, lse, q.stride(), k.stride(), num_rows, num_keys,
            -(-num_keys // splits), window or 0, 1 / math.sqrt(q.shape[2]), TILE_ROWS=tile_rows, **shape,
        )  # fmt: skip
    return lse[0] if splits == 1 else torch.logsumexp(lse, dim=0)


def _shape(q: Tensor, k: Tensor, num_pairs: int, window: int | None) -> dict[str, int | bool]:
    """What both kernels are compiled for."""
    group, d = q.shape[1] // k.shape[1], q.shape[2]
    block_d = max(TILE, triton.next_power_of_2(d))
    # float32 products run on ordinary units from registers: small blocks keep them from spilling
    exact = q.dtype != k.dtype or q.dtype == torch.float32
    block_m = TILE if exact else max(TILE, min(TILE_PAIRS, triton.next_power_of_2(num_pairs)))
    large = exact and block_d > 64
    return {
        "HEAD_DIM": d, "GROUP": group, "HAS_WINDOW": window is not None,
        "BLOCK_M": max(block_m, triton.next_power_of_2(group)), "BLOCK_N": 32 if large else 64, "BLOCK_D": block_d,
        "num_warps": 8 if large else 4, "num_stages": 2,
    }  # fmt: skip
