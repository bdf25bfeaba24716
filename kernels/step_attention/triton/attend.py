"""Attention of single query rows over work items: stretches of keys of one region of one sequence.

    items int64 [W, FIELDS]   what each program reads, by address; an item with row -1 is idle
    out   [W, H, d], lse [W, H]   its partial result, at the item's own place

A program serves one item and one KV head. What it computes depends on its item and its row alone, so a row gets the
same bits in any company.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .tiles import packed_block, product

# fields of an item
ROW, BEGIN, END, LIMIT, FIRST, INDEX, PER_HEAD, OUT = (tl.constexpr(i) for i in range(8))
K0, K1, K2, K_BASIS, V0, V1, V2, V_BASIS = (tl.constexpr(i) for i in range(8, 16))
# the second of two segments that are laid end to end
NUM_A, FIRST_B, K0_B, K1_B, K2_B, V0_B, V1_B, V2_B = (tl.constexpr(i) for i in range(16, 24))
FIELDS: tl.constexpr = tl.constexpr(24)


@triton.jit
def _positions(first, index, per_head, local, head, inside, CHUNK: tl.constexpr, NUM_KV_HEADS: tl.constexpr):
    """Positions int64 [N] of rows `local`."""
    at = first + local
    if index != 0:
        table = index.to(tl.pointer_type(tl.int32))
        if per_head != 0:
            at = tl.load(table + local * NUM_KV_HEADS + head, mask=inside, other=0).to(tl.int64)
        else:
            ids = tl.load(table + local // CHUNK, mask=inside, other=0).to(tl.int64)
            at = ids * CHUNK + local % CHUNK
    return at


@triton.jit
def _rotated(low, high, at, frequencies_ptr, factor, HALF: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """RoPE of the halves float32 [N, BLOCK] of keys at positions [N]; angles are float32, as the model's are."""
    dims = tl.arange(0, BLOCK)
    frequencies = tl.load(frequencies_ptr + dims, mask=dims < HALF, other=0.0)
    angles = at.to(tl.float32)[:, None] * frequencies[None, :]
    if WIDE:
        cos, sin = tl.cos(angles) * factor, tl.sin(angles) * factor
    else:
        # the exact functions keep a table in registers for angles beyond 105,615: turns are taken off here, 2 pi in
        # three parts of which the first two have few bits, and the fast functions err by 2^-20 on what is left
        turns = tl.floor(angles * 0.15915494309189535 + 0.5)
        angles = tl.fma(turns, -6.28125, angles)
        angles = tl.fma(turns, -0.0019350051879882812, angles)
        angles = tl.fma(turns, -3.0199157663446332e-07, angles)
        cos, sin = libdevice.fast_cosf(angles) * factor, libdevice.fast_sinf(angles) * factor
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _add_weighted(out, weights, v, WIDE: tl.constexpr):
    """out + weights v, with float32 weights. 16-bit values meet the weights' upper and lower halves."""
    if v.dtype == tl.float32:
        out = product(weights, v, out, WIDE)
    else:
        upper = weights.to(v.dtype)
        lower = (weights - upper.to(tl.float32)).to(v.dtype)
        out = product(lower, v, product(upper, v, out, WIDE), WIDE)
    return out


@triton.jit(do_not_specialize=["most_chosen", "window"])
def attend_items(
    items_ptr, q_ptr, positions_ptr, chosen_ptr, counts_ptr, frequencies_ptr, out_ptr, lse_ptr,
    scale, rope_factor, most_chosen, window,
    K_KIND: tl.constexpr, K_DTYPE: tl.constexpr, K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_RANK: tl.constexpr,
    K_BALANCED: tl.constexpr, K_HINT: tl.constexpr,
    V_KIND: tl.constexpr, V_DTYPE: tl.constexpr, V_BITS: tl.constexpr, V_GROUP: tl.constexpr, V_RANK: tl.constexpr,
    V_HINT: tl.constexpr,
    HEAD_DIM: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
    CHOSEN: tl.constexpr, ROTATES: tl.constexpr, HAS_WINDOW: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Grid: items, KV heads. Shapes: see the module."""
    HALF: tl.constexpr = HEAD_DIM // 2
    item = items_ptr + tl.program_id(0).to(tl.int64) * FIELDS
    head = tl.program_id(1).to(tl.int64)
    row = tl.load(item + ROW)
    if row < 0:
        # its place is merged all the same, as layers have as many as the one with the most items; padding has none
        place = tl.load(item + OUT)
        members = tl.arange(0, BLOCK_M)
        nothing_at = lse_ptr + (place * NUM_KV_HEADS + head) * GROUP + members
        tl.store(nothing_at, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=(members < GROUP) & (place >= 0))
        return
    position = tl.load(positions_ptr + row)
    begin, end, limit = tl.load(item + BEGIN), tl.load(item + END), tl.load(item + LIMIT)
    first, index, per_head = tl.load(item + FIRST), tl.load(item + INDEX), tl.load(item + PER_HEAD)
    if limit >= 0:
        end = tl.minimum(end, position - limit + 1)
    if CHOSEN:
        end = tl.minimum(end, tl.load(counts_ptr + row * NUM_KV_HEADS + head).to(tl.int64) * CHUNK)
        chosen_ptr += (row * NUM_KV_HEADS + head) * most_chosen
    k0, k1, k2 = tl.load(item + K0), tl.load(item + K1), tl.load(item + K2)
    v0, v1, v2 = tl.load(item + V0), tl.load(item + V1), tl.load(item + V2)
    k_basis, v_basis = tl.load(item + K_BASIS), tl.load(item + V_BASIS)

    pairs, halves, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    heads = head * GROUP + pairs
    q_rows = q_ptr + (row * NUM_KV_HEADS * GROUP + heads)[:, None] * HEAD_DIM
    q_mask = (pairs < GROUP)[:, None] & (halves < HALF)[None, :]
    q_low = tl.load(q_rows + halves[None, :], mask=q_mask, other=0.0)
    q_high = tl.load(q_rows + HALF + halves[None, :], mask=q_mask, other=0.0)

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        inside = place < end
        if CHOSEN:
            chunk = tl.load(chosen_ptr + place // CHUNK, mask=inside, other=0).to(tl.int64)
            keys = chunk * CHUNK + place % CHUNK
            num_a = tl.load(item + NUM_A)
            later = keys >= num_a
            local = tl.where(later, keys - num_a, keys)
            ka, kb, kc = tl.load(item + K0_B), tl.load(item + K1_B), tl.load(item + K2_B)
            va, vb, vc = tl.load(item + V0_B), tl.load(item + V1_B), tl.load(item + V2_B)
            ka, kb, kc = tl.where(later, ka, k0), tl.where(later, kb, k1), tl.where(later, kc, k2)
            va, vb, vc = tl.where(later, va, v0), tl.where(later, vb, v1), tl.where(later, vc, v2)
        else:
            local = place.to(tl.int64)
            nothing = tl.zeros([BLOCK_N], tl.int64)
            ka, kb, kc = k0 + nothing, k1 + nothing, k2 + nothing
            va, vb, vc = v0 + nothing, v1 + nothing, v2 + nothing
        low = packed_block(
            ka, kb, kc, k_basis, local, head, 0, inside, K_KIND, K_DTYPE, K_BITS, K_GROUP, K_RANK, K_BALANCED,
            HEAD_DIM, NUM_KV_HEADS, HALF, BLOCK_H, BLOCK_N, K_HINT, WIDE,
        )  # fmt: skip
        high = packed_block(
            ka, kb, kc, k_basis, local, head, HALF, inside, K_KIND, K_DTYPE, K_BITS, K_GROUP, K_RANK, K_BALANCED,
            HEAD_DIM, NUM_KV_HEADS, HALF, BLOCK_H, BLOCK_N, K_HINT, WIDE,
        )  # fmt: skip
        if HAS_WINDOW or ROTATES:
            if CHOSEN:
                before = _positions(first, index, per_head, local, head, inside & (keys < num_a), CHUNK, NUM_KV_HEADS)
                at = tl.where(later, tl.load(item + FIRST_B) + local, before)
            else:
                at = _positions(first, index, per_head, local, head, inside, CHUNK, NUM_KV_HEADS)
        low, high = low.to(q_low.dtype), high.to(q_low.dtype)
        if ROTATES:
            a, b = _rotated(
                low.to(tl.float32), high.to(tl.float32), at, frequencies_ptr, rope_factor, HALF, BLOCK_H, WIDE
            )
            low, high = a.to(q_low.dtype), b.to(q_low.dtype)
        visible = inside
        if HAS_WINDOW:
            visible = visible & (at <= position) & (at > position - window)
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        scores = product(q_high, tl.trans(high), product(q_low, tl.trans(low), scores, WIDE), WIDE) * scale
        scores = tl.where(visible[None, :], scores, float("-inf"))
        v = packed_block(
            va, vb, vc, v_basis, local, head, 0, inside, V_KIND, V_DTYPE, V_BITS, V_GROUP, V_RANK, False,
            HEAD_DIM, NUM_KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_N, V_HINT, WIDE,
        ).to(q_low.dtype)  # fmt: skip
        next_peak = tl.maximum(peak, tl.max(scores, 1))
        # a row that has seen nothing yet has no finite peak to subtract
        shift = tl.where(next_peak == float("-inf"), 0.0, next_peak)
        weights = tl.exp(scores - shift[:, None])
        kept = tl.exp(peak - shift)
        total = total * kept + tl.sum(weights, 1)
        out = _add_weighted(out * kept[:, None], weights, v, WIDE)
        peak = next_peak
    seen = total > 0
    divisor = tl.where(seen, total, 1.0)
    pair = tl.load(item + OUT) * (NUM_KV_HEADS * GROUP) + heads
    mask = (pairs < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out_ptr + pair[:, None] * HEAD_DIM + dims[None, :], out / divisor[:, None], mask=mask)
    tl.store(lse_ptr + pair, tl.where(seen, peak + tl.log(divisor), float("-inf")), mask=pairs < GROUP)


@triton.jit
def merge_items(
    outs_ptr, lses_ptr, ranges_ptr, out_ptr,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attention over all items of a row: out [rows, H, d]. Grid: rows, heads.

    ranges int64 [rows, 2]: the first item of each row, and how many it has.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    begin, count = tl.load(ranges_ptr + row * 2), tl.load(ranges_ptr + row * 2 + 1)
    dims = tl.arange(0, BLOCK_D)
    peak = float("-inf")
    for start in range(0, count, BLOCK_S):
        places = start + tl.arange(0, BLOCK_S)
        at = (begin + places) * NUM_HEADS + head
        lses = tl.load(lses_ptr + at, mask=places < count, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(lses, 0))
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    total = 0.0
    out = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_S):
        places = start + tl.arange(0, BLOCK_S)
        at = (begin + places) * NUM_HEADS + head
        lses = tl.load(lses_ptr + at, mask=places < count, other=float("-inf"))
        weights = tl.exp(lses - shift)
        # idle items have written no rows
        mask = (lses > float("-inf"))[:, None] & (dims < HEAD_DIM)[None, :]
        rows = tl.load(outs_ptr + at[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        total += tl.sum(weights, 0)
        out += tl.sum(rows * weights[:, None], 0)
    out = out / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + (row * NUM_HEADS + head) * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), dims < HEAD_DIM)
