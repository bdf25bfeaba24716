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

from .tiles import (
    GROUP,
    HEAD_DIM,
    KIND,
    LOWRANK,
    NUM_KV_HEADS,
    basis_sums,
    factor_block,
    half_sums,
    packed_block,
    packed_halves,
    product,
)

# fields of an item
ROW, BEGIN, END, LIMIT, FIRST, INDEX, PER_HEAD, OUT = (tl.constexpr(i) for i in range(8))
K0, K1, K2, K_BASIS, V0, V1, V2, V_BASIS = (tl.constexpr(i) for i in range(8, 16))
# the second of two segments that are laid end to end
NUM_A, FIRST_B, K0_B, K1_B, K2_B, V0_B, V1_B, V2_B = (tl.constexpr(i) for i in range(16, 24))
IS_HOT: tl.constexpr = tl.constexpr(24)
FIELDS: tl.constexpr = tl.constexpr(25)


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
def _positions(item, local, later, head, inside, CHUNK: tl.constexpr, CHOSEN: tl.constexpr, H: tl.constexpr):
    """Positions int64 [N] of rows `local` of the first segment or, where `later`, of the second."""
    index, per_head = tl.load(item + INDEX), tl.load(item + PER_HEAD)
    at = tl.load(item + FIRST) + local
    if index != 0:
        table = index.to(tl.pointer_type(tl.int32))
        inside = inside & (later == 0)
        if per_head != 0:
            at = tl.load(table + local * H[NUM_KV_HEADS] + head, mask=inside, other=0).to(tl.int64)
        else:
            ids = tl.load(table + local // CHUNK, mask=inside, other=0).to(tl.int64)
            at = ids * CHUNK + local % CHUNK
    if CHOSEN:
        at = tl.where(later, tl.load(item + FIRST_B) + local, at)
    return at


@triton.jit
def _sources(item, later, FIELD: tl.constexpr, FIELD_B: tl.constexpr, CHOSEN: tl.constexpr):
    """Byte addresses [N], three times, of the tensors that hold each key, or each value."""
    nothing = tl.zeros_like(later).to(tl.int64)
    a, b, c = tl.load(item + FIELD), tl.load(item + FIELD + 1), tl.load(item + FIELD + 2)
    a, b, c = a + nothing, b + nothing, c + nothing
    if CHOSEN:
        d, e, f = tl.load(item + FIELD_B), tl.load(item + FIELD_B + 1), tl.load(item + FIELD_B + 2)
        a, b, c = tl.where(later, d, a), tl.where(later, e, b), tl.where(later, f, c)
    return a, b, c


@triton.jit
def _key_halves(
    item, sums, local, later, head, inside, at, frequencies_ptr, rope_factor,
    K: tl.constexpr, H: tl.constexpr, CHOSEN: tl.constexpr, ROTATES: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The lower and upper halves of keys [N, BLOCK_H], rotated, in the queries' dtype."""
    HALF: tl.constexpr = H[HEAD_DIM] // 2
    tensors, basis = _sources(item, later, K0, K0_B, CHOSEN), tl.load(item + K_BASIS)
    low, high = packed_halves(tensors, basis, sums, local, head, inside, K, H, BLOCK_H, BLOCK_N, WIDE)
    low, high = low.to(DTYPE), high.to(DTYPE)
    if ROTATES:
        low, high = low.to(tl.float32), high.to(tl.float32)
        low, high = _rotated(low, high, at, frequencies_ptr, rope_factor, HALF, BLOCK_H, WIDE)
    return low.to(DTYPE), high.to(DTYPE)


@triton.jit
def _value_block(
    item, sums, local, later, head, inside,
    V: tl.constexpr, H: tl.constexpr, CHOSEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Values [N, BLOCK_D]: dense rows in their dtype, others float32."""
    tensors, basis = _sources(item, later, V0, V0_B, CHOSEN), tl.load(item + V_BASIS)
    if V[KIND] == LOWRANK:
        out = factor_block(tensors, basis, sums, local, head, inside, V, H, BLOCK_D, BLOCK_N, WIDE)
    else:
        out = packed_block(tensors, basis, local, head, inside, V, H, 0, H[HEAD_DIM], BLOCK_D, BLOCK_N)
    return out


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


@triton.jit
def _add_block(peak, total, out, scores, v, WIDE: tl.constexpr):
    """One block of an online softmax: scores [M, N], -inf where hidden, over values [N, D]."""
    next_peak = tl.maximum(peak, tl.max(scores, 1))
    # a row that has seen nothing yet has no finite peak to subtract
    shift = tl.where(next_peak == float("-inf"), 0.0, next_peak)
    weights = tl.exp(scores - shift[:, None])
    kept = tl.exp(peak - shift)
    out = _add_weighted(out * kept[:, None], weights, v, WIDE)
    return next_peak, total * kept + tl.sum(weights, 1), out


@triton.jit
def _store(
    item, head, peak, total, out, out_ptr, lse_ptr, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """An item's result; without keys it is zeros and -inf. Items for padding have no place."""
    pairs, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    place, seen = tl.load(item + OUT), total > 0
    divisor = tl.where(seen, total, 1.0)
    pair = (place * H[NUM_KV_HEADS] + head) * H[GROUP] + pairs
    is_pair = (pairs < H[GROUP]) & (place >= 0)
    mask = is_pair[:, None] & (dims < H[HEAD_DIM])[None, :]
    tl.store(out_ptr + pair[:, None] * H[HEAD_DIM] + dims[None, :], out / divisor[:, None], mask=mask)
    tl.store(lse_ptr + pair, tl.where(seen, peak + tl.log(divisor), float("-inf")), mask=is_pair)


@triton.jit
def _range(item, row, head, position, counts_ptr, H: tl.constexpr, CHUNK: tl.constexpr, CHOSEN: tl.constexpr):
    """The item's keys, begin and end: none of an idle one, nor for a row that is not there."""
    begin, end, limit = tl.load(item + BEGIN), tl.load(item + END), tl.load(item + LIMIT)
    if limit >= 0:
        end = tl.minimum(end, position - limit + 1)
    if CHOSEN:
        end = tl.minimum(end, tl.load(counts_ptr + row * H[NUM_KV_HEADS] + head).to(tl.int64) * CHUNK)
    return begin, tl.where(position < 0, begin, end)


@triton.jit
def _query_halves(q_ptr, row, head, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr):
    """The lower and upper halves [M, BLOCK_H] of a group's queries."""
    HALF: tl.constexpr = H[HEAD_DIM] // 2
    pairs, halves = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)
    rows = q_ptr + ((row * H[NUM_KV_HEADS] + head) * H[GROUP] + pairs)[:, None] * H[HEAD_DIM] + halves[None, :]
    mask = (pairs < H[GROUP])[:, None] & (halves < HALF)[None, :]
    return tl.load(rows, mask=mask, other=0.0), tl.load(rows + HALF, mask=mask, other=0.0)


@triton.jit
def _chosen_rows(item, entries_ptr, places_ptr, place, inside, CHUNK: tl.constexpr, HOT: tl.constexpr):
    """Rows [N] that the chosen chunks stand for: which of them are in the second segment, where they lie in their
    segment, and where their values do, which is a slot of the hot set or the same."""
    keys = tl.load(entries_ptr + place // CHUNK, mask=inside, other=0).to(tl.int64) * CHUNK + place % CHUNK
    num_a = tl.load(item + NUM_A)
    later = keys >= num_a
    local = tl.where(later, keys - num_a, keys)
    of_values = local
    if HOT:
        moved = inside & (later == 0) & (tl.load(item + IS_HOT) != 0)
        slots = tl.load(places_ptr + place // CHUNK, mask=moved, other=0).to(tl.int64)
        of_values = tl.where(moved, slots * CHUNK + place % CHUNK, local)
    return later, local, of_values


@triton.jit(do_not_specialize=["most_chosen", "window", "first_row", "end_row"])
def attend_items(
    items_ptr, q_ptr, positions_ptr, chosen_ptr, places_ptr, counts_ptr, frequencies_ptr, out_ptr, lse_ptr,
    scale, rope_factor, most_chosen, window, first_row, end_row,
    K: tl.constexpr, V: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr,
    CHOSEN: tl.constexpr, HOT: tl.constexpr, ROTATES: tl.constexpr, HAS_WINDOW: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Grid: items, KV heads. Shapes: see the module. K and V say how keys and values are packed, see `tiles`. Items of
    rows outside of first_row..end_row are left for another launch."""
    item, head = items_ptr + tl.program_id(0).to(tl.int64) * FIELDS, tl.program_id(1).to(tl.int64)
    row = tl.load(item + ROW)
    if (row >= 0) & ((row < first_row) | (row >= end_row)):
        return
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total, out = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if row >= 0:
        position = tl.load(positions_ptr + row)
        begin, end = _range(item, row, head, position, counts_ptr, H, CHUNK, CHOSEN)
        q_low, q_high = _query_halves(q_ptr, row, head, H, BLOCK_M, BLOCK_H)
        key_sums = half_sums(tl.load(item + K_BASIS), head, K, H, BLOCK_H)
        value_sums = basis_sums(tl.load(item + V_BASIS), head, V, H, 0, H[HEAD_DIM], BLOCK_D)
        for start in range(begin, end, BLOCK_N):
            place = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            inside, later, local, of_values, at = place < end, place < 0, place, place, place
            if CHOSEN:
                entry = (row * H[NUM_KV_HEADS] + head) * most_chosen
                later, local, of_values = _chosen_rows(
                    item, chosen_ptr + entry, places_ptr + entry, place, inside, CHUNK, HOT
                )
            if HAS_WINDOW or ROTATES:
                at = _positions(item, local, later, head, inside, CHUNK, CHOSEN, H)
            low, high = _key_halves(
                item, key_sums, local, later, head, inside, at, frequencies_ptr, rope_factor,
                K, H, CHOSEN, ROTATES, q_low.dtype, BLOCK_N, BLOCK_H, WIDE,
            )  # fmt: skip
            visible = inside
            if HAS_WINDOW:
                visible = visible & (at <= position) & (at > position - window)
            scores = product(q_low, tl.trans(low), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), WIDE)
            scores = product(q_high, tl.trans(high), scores, WIDE) * scale
            scores = tl.where(visible[None, :], scores, float("-inf"))
            v = _value_block(item, value_sums, of_values, later, head, inside, V, H, CHOSEN, BLOCK_N, BLOCK_D, WIDE)
            peak, total, out = _add_block(peak, total, out, scores, v.to(q_low.dtype), WIDE)
    # an idle item's place is merged all the same: layers have as many as the one with the most
    _store(item, head, peak, total, out, out_ptr, lse_ptr, H, BLOCK_M, BLOCK_D)


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
