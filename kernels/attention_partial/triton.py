"""`attention_partial` and `merge_partials` compiled.

A program serves a tile of rows and the query heads of one KV head, over one split of the keys. The shape of a tile, the
number of splits and every order of summation depend on the keys alone, never on how many rows there are, so a row gets
the same bits in any company.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_SPLITS = 64
MIN_SPLIT_KEYS = 256
SPLIT_UNIT = 128
SPLIT_BYTES = 1 << 28  # of partial results before they are merged; more rows than that take several launches
TILE = 16  # the least that tensor cores multiply


@triton.jit
def dot(a, b):
    """float32 product of [M, K] and [K, N]: on tensor cores where both are of one 16-bit dtype, which loses nothing,
    and in full float32 otherwise."""
    if a.dtype == b.dtype:
        product = tl.dot(a, b, input_precision="ieee")
    else:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return product


@triton.jit
def _add_weighted(out, weights, v):
    """out + weights v, with float32 weights. 16-bit values meet the weights' upper and lower halves on tensor cores:
    16 bits of each weight count, not 8."""
    if v.dtype == tl.float32:
        out = tl.dot(weights, v, out, input_precision="ieee")
    else:
        upper = weights.to(v.dtype)
        lower = (weights - upper.to(tl.float32)).to(v.dtype)
        out = tl.dot(lower, v, tl.dot(upper, v, out))
    return out


@triton.jit
def visible_keys(at_ptr, valid_ptr, at_step, valid_step, rows_at, keys, inside, window, HAS_WINDOW: tl.constexpr):
    """bool [M, N] or [1, N]: which keys each row may see.

    `at_ptr` and `valid_ptr` point to the first key's position and validity, or are None.
    """
    visible = inside[None, :]
    if at_ptr is not None:
        at = tl.load(at_ptr + keys * at_step, mask=inside, other=0).to(tl.int64)
        visible = visible & (at[None, :] <= rows_at[:, None])
        if HAS_WINDOW:
            visible = visible & (at[None, :] > rows_at[:, None] - window)
    if valid_ptr is not None:
        visible = visible & (tl.load(valid_ptr + keys * valid_step, mask=inside, other=0) != 0)[None, :]
    return visible


@triton.jit
def _attend(
    q, k_ptr, v_ptr, k_steps, v_steps, at_ptr, valid_ptr, at_step, valid_step, rows_at, begin, end, window, scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """One softmax over the keys begin..end: out [M, D] and its log of the sum of exponentials [M]."""
    dims = tl.arange(0, BLOCK_D)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        index = start + tl.arange(0, BLOCK_N)
        inside = index < end
        keys = index.to(tl.int64)
        mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + keys[:, None] * k_steps[0] + dims[None, :] * k_steps[1], mask=mask, other=0)
        v = tl.load(v_ptr + keys[:, None] * v_steps[0] + dims[None, :] * v_steps[1], mask=mask, other=0)
        visible = visible_keys(at_ptr, valid_ptr, at_step, valid_step, rows_at, keys, inside, window, HAS_WINDOW)
        scores = tl.where(visible, dot(q, tl.trans(k)) * scale, float("-inf"))
        next_peak = tl.maximum(peak, tl.max(scores, 1))
        # a row that has seen nothing yet has no finite peak to subtract
        shift = tl.where(next_peak == float("-inf"), 0.0, next_peak)
        weights = tl.exp(scores - shift[:, None])
        kept = tl.exp(peak - shift)
        total = total * kept + tl.sum(weights, 1)
        out = _add_weighted(out * kept[:, None], weights, v)
        peak = next_peak
    seen = total > 0
    out = out / tl.where(seen, total, 1.0)[:, None]
    return out, tl.where(seen, peak + tl.log(tl.where(seen, total, 1.0)), float("-inf"))


@triton.jit(
    do_not_specialize=["num_rows", "num_keys", "split_keys", "window"], do_not_specialize_on_alignment=["rows_at_ptr"]
)
def _attend_split(
    q_ptr, k_ptr, v_ptr, at_ptr, valid_ptr, rows_at_ptr, out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, at_strides, valid_strides,
    num_rows, num_keys, split_keys, window, scale,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, TILE_ROWS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [splits, Q, H, d] and lse [splits, Q, H]. Grid: tiles of rows, KV heads, splits.

    Strides: q (row, head, channel); k and v (row, head, key, channel); positions and validity (row, head, key). Where a
    row stride is not 0, a tile has one row.
    """
    tile, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    num_heads = tl.num_programs(1) * GROUP
    pairs, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    rows, heads = tile * TILE_ROWS + pairs // GROUP, kv_head * GROUP + pairs % GROUP
    used = (pairs < TILE_ROWS * GROUP) & (rows < num_rows)
    mask = used[:, None] & (dims < HEAD_DIM)[None, :]
    q_at = rows[:, None] * q_strides[0] + heads[:, None] * q_strides[1] + dims[None, :] * q_strides[2]
    q = tl.load(q_ptr + q_at, mask=mask, other=0)
    rows_at = tl.load(rows_at_ptr + rows, mask=used, other=0).to(tl.int64)
    k_ptr += tile * k_strides[0] + kv_head * k_strides[1]
    v_ptr += tile * v_strides[0] + kv_head * v_strides[1]
    if at_ptr is not None:
        at_ptr += tile * at_strides[0] + kv_head * at_strides[1]
    if valid_ptr is not None:
        valid_ptr += tile * valid_strides[0] + kv_head * valid_strides[1]
    begin = split * split_keys
    out, lse = _attend(
        q, k_ptr, v_ptr, k_strides[2:], v_strides[2:], at_ptr, valid_ptr, at_strides[2], valid_strides[2], rows_at,
        begin, tl.minimum(begin + split_keys, num_keys), window, scale,
        HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, HAS_WINDOW,
    )  # fmt: skip
    pair = (split.to(tl.int64) * num_rows + rows) * num_heads + heads
    tl.store(out_ptr + pair[:, None] * HEAD_DIM + dims[None, :], out, mask=mask)
    tl.store(lse_ptr + pair, lse, mask=used)


@triton.jit(do_not_specialize=["num_splits"])
def _merge_splits(
    outs_ptr, lses_ptr, out_ptr, lse_ptr, num_splits,
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge [splits, pairs, d] and [splits, pairs] over the splits. Grid: pairs of a row and a head."""
    pair, num_pairs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    splits, dims = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    at = splits.to(tl.int64) * num_pairs + pair
    lses = tl.load(lses_ptr + at, mask=splits < num_splits, other=float("-inf"))
    peak = tl.max(lses, 0)
    weights = tl.exp(lses - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weights, 0)
    divisor = tl.where(total > 0, total, 1.0)
    mask = (splits < num_splits)[:, None] & (dims < HEAD_DIM)[None, :]
    outs = tl.load(outs_ptr + at[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0)
    out = tl.sum(outs * (weights / divisor)[:, None], 0)
    tl.store(out_ptr + pair * HEAD_DIM + dims, out, mask=dims < HEAD_DIM)
    tl.store(lse_ptr + pair, tl.where(total > 0, peak + tl.log(divisor), float("-inf")))


@triton.jit
def _merge_partials(outs, lses, out_ptr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Merge tuples of [pairs, d] and [pairs]. Grid: pairs of a row and a head."""
    pair, dims = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    peak = tl.load(lses[0] + pair)
    for i in tl.static_range(1, len(lses)):
        peak = tl.maximum(peak, tl.load(lses[i] + pair))
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.exp(tl.load(lses[0] + pair) - shift)
    for i in tl.static_range(1, len(lses)):
        total += tl.exp(tl.load(lses[i] + pair) - shift)
    divisor = tl.where(total > 0, total, 1.0)
    merged = tl.zeros([BLOCK_D], tl.float32)
    for i in tl.static_range(len(lses)):
        weight = tl.exp(tl.load(lses[i] + pair) - shift) / divisor
        merged += weight * tl.load(outs[i] + pair * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0)
    tl.store(out_ptr + pair * HEAD_DIM + dims, merged, mask=dims < HEAD_DIM)


def multipliable(x: Tensor) -> Tensor:
    """x, in float32 where Triton's interpreter stands in for a GPU: it cannot multiply matrices of bfloat16."""
    return x.float() if triton.knobs.runtime.interpret and x.dtype == torch.bfloat16 else x


def attention_partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_positions: Tensor | None,
    q_positions: Tensor,
    window: int | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `op.attention_partial`."""
    num_rows, num_heads, d = q.shape
    num_keys = k.shape[-2]
    q, k, v = multipliable(q), multipliable(k), multipliable(v)
    out = torch.empty(num_rows, num_heads, d, dtype=torch.float32, device=q.device)
    lse = torch.empty(num_rows, num_heads, dtype=torch.float32, device=q.device)
    if num_keys == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    split_keys = _split_keys(num_keys)
    num_splits = -(-num_keys // split_keys)
    if valid is not None:
        valid = valid.view(torch.uint8)
    step = max(1, num_rows if num_splits == 1 else SPLIT_BYTES // (num_splits * num_heads * d * 4))
    for begin in range(0, num_rows, step):
        at = slice(begin, begin + step)
        own = (_of_rows(t, at, full) for t, full in ((k, 4), (v, 4), (k_positions, 3), (valid, 3)))
        _launch(q[at], *own, q_positions[at], window, split_keys, num_splits, out[at], lse[at])
    return out, lse


def merge_partials(partials: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """See `op.merge_partials`."""
    if len(partials) == 1:
        return partials[0][0]
    outs = tuple(out.contiguous() for out, _ in partials)
    lses = tuple(lse.contiguous() for _, lse in partials)
    merged = torch.empty_like(outs[0])
    d = merged.shape[-1]
    if lses[0].numel():
        with torch.cuda.device_of(merged):
            _merge_partials[(lses[0].numel(),)](outs, lses, merged, d, triton.next_power_of_2(d), num_warps=1)
    return merged


def _split_keys(num_keys: int) -> int:
    """Keys a split."""
    return max(MIN_SPLIT_KEYS, -(-num_keys // (MAX_SPLITS * SPLIT_UNIT)) * SPLIT_UNIT)


def _of_rows(x: Tensor | None, rows: slice, full: int) -> Tensor | None:
    """The part of x that rows need: all of it where it is not given for each row."""
    return x[rows] if x is not None and x.dim() == full else x


def _strides(x: Tensor | None, length: int) -> tuple[int, ...]:
    """Strides of the last `length` axes, 0 for those that x lacks."""
    return (0,) * length if x is None else (0,) * (length - x.dim()) + x.stride()


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_positions: Tensor | None,
    valid: Tensor | None,
    q_positions: Tensor,
    window: int | None,
    split_keys: int,
    num_splits: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill `out` [Q, H, d] and `lse` [Q, H]."""
    num_rows, num_heads, d = q.shape
    num_kv_heads, num_keys = k.shape[-3:-1]
    group = num_heads // num_kv_heads
    block_m, block_d = max(TILE, triton.next_power_of_2(group)), max(TILE, triton.next_power_of_2(d))
    # float32 products run on ordinary units from registers: smaller blocks over more warps keep them from spilling
    large = block_d > 64 and (q.dtype != k.dtype or torch.float32 in (k.dtype, v.dtype))
    own = k.dim() == 4 or any(t is not None and t.dim() == 3 for t in (k_positions, valid))
    tile_rows = 1 if own else block_m // group
    split = num_splits > 1
    outs = out.new_empty(num_splits, *out.shape) if split else out
    lses = lse.new_empty(num_splits, *lse.shape) if split else lse
    with torch.cuda.device_of(q):
        _attend_split[(-(-num_rows // tile_rows), num_kv_heads, num_splits)](
            q, k, v, k_positions, valid, q_positions.contiguous(), outs, lses,
            q.stride(), _strides(k, 4), _strides(v, 4), _strides(k_positions, 3), _strides(valid, 3),
            num_rows, num_keys, split_keys, window or 0, 1 / math.sqrt(d),
            HEAD_DIM=d, GROUP=group, TILE_ROWS=tile_rows, HAS_WINDOW=window is not None,
            BLOCK_M=block_m, BLOCK_N=32 if large else 64, BLOCK_D=block_d,
            num_warps=8 if large else 4, num_stages=2,
        )  # fmt: skip
    if split:
        blocks = {"BLOCK_S": triton.next_power_of_2(num_splits), "BLOCK_D": block_d}
        with torch.cuda.device_of(q):
            _merge_splits[(num_rows * num_heads,)](outs, lses, out, lse, num_splits, HEAD_DIM=d, **blocks, num_warps=4)
