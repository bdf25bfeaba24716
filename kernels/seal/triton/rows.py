"""Packing blocks of rows, and moving rows. Every program serves one job, so jobs do not see each other.

Bits are those of `quantize`: divisions and conversions round to the nearest, products and sums round separately.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...quantize.triton import group_codes, group_scale, packed_bytes
from ...step_attention.triton.tiles import (
    BALANCED,
    BITS,
    CHANNEL,
    DENSE,
    DTYPE,
    FLOAT8,
    GROUP_SIZE,
    HEAD_DIM,
    KIND,
    NUM_KV_HEADS,
    RANK,
    product,
)  # fmt: skip

# fields of a job; the packed tensors of keys and of values, and what each share, lie next to each other
ROWS, ANGLES, KEYS, VALUES, LANDMARKS, LANDMARK_SCALES = (tl.constexpr(i) for i in (0, 2, 3, 7, 11, 12))
SHARED: tl.constexpr = tl.constexpr(3)  # behind the packed tensors
FIELDS: tl.constexpr = tl.constexpr(13)
MOVE_FIELDS: tl.constexpr = tl.constexpr(3)
FLOAT8_MAX: tl.constexpr = tl.constexpr(448.0)


@triton.jit
def bfloat16_bits(x):
    """The bits of float32 numbers rounded to bfloat16, ties to the even, as int16; the interpreter would cut them."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)


@triton.jit
def float8_bits(x):
    """The bits of float32 numbers rounded to e4m3, ties to the even, as uint8; none is beyond the largest."""
    size = tl.minimum(tl.abs(x), FLOAT8_MAX)
    exponent = tl.maximum((size.to(tl.int32, bitcast=True) >> 23) - 127, -6)
    # adding 1.5 * 2^23 steps rounds to a whole number of them
    rounder = ((exponent + (150 - 3)) << 23).to(tl.float32, bitcast=True) * 1.5
    size = (size + rounder) - rounder
    bits = size.to(tl.int32, bitcast=True)
    normal = (bits >> 20) - (120 << 3)
    small = (size * 512).to(tl.int32)
    code = tl.where(size < 0.015625, small, normal)
    return (code + tl.where(x.to(tl.int32, bitcast=True) < 0, 128, 0)).to(tl.uint8)


@triton.jit
def _store_floats(place, shared, at, x, mask, L: tl.constexpr):
    """Rows x float32 to elements `at` of dense or float8 rows."""
    if L[KIND] == FLOAT8:
        scale = tl.load(shared.to(tl.pointer_type(tl.float32)))
        tl.store(place.to(tl.pointer_type(tl.uint8)) + at, float8_bits(tl.div_rn(x, x * 0 + scale)), mask=mask)
    elif L[DTYPE] == tl.bfloat16:
        tl.store(place.to(tl.pointer_type(tl.int16)) + at, bfloat16_bits(x), mask=mask)
    else:
        tl.store(place.to(tl.pointer_type(L[DTYPE])) + at, x.to(L[DTYPE]), mask=mask)


@triton.jit
def _grouped(x, mask, L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, SPAN: tl.constexpr):
    """The scales and minima, float16 [rows, groups] or [groups, channels], of x [BLOCK_R, BLOCK_D], and both spread to
    x's shape. A group that has no channels is one of zeros."""
    if L[KIND] == CHANNEL:
        high = tl.max(tl.reshape(x, [BLOCK_R // SPAN, SPAN, BLOCK_D]), 1)
        low = tl.min(tl.reshape(x, [BLOCK_R // SPAN, SPAN, BLOCK_D]), 1)
        scale, minimum = group_scale(low, high, L[BITS])
        SPREAD: tl.constexpr = [BLOCK_R // SPAN, SPAN, BLOCK_D]
        wide = tl.reshape(tl.broadcast_to(scale.to(tl.float32)[:, None, :], SPREAD), [BLOCK_R, BLOCK_D])
        lows = tl.reshape(tl.broadcast_to(minimum.to(tl.float32)[:, None, :], SPREAD), [BLOCK_R, BLOCK_D])
    else:
        SPREAD: tl.constexpr = [BLOCK_R, BLOCK_D // SPAN, SPAN]
        high = tl.max(tl.reshape(tl.where(mask, x, float("-inf")), SPREAD), 2)
        low = tl.min(tl.reshape(tl.where(mask, x, float("inf")), SPREAD), 2)
        is_group = low <= high
        scale, minimum = group_scale(tl.where(is_group, low, 0.0), tl.where(is_group, high, 0.0), L[BITS])
        wide = tl.reshape(tl.broadcast_to(scale.to(tl.float32)[:, :, None], SPREAD), [BLOCK_R, BLOCK_D])
        lows = tl.reshape(tl.broadcast_to(minimum.to(tl.float32)[:, :, None], SPREAD), [BLOCK_R, BLOCK_D])
    return scale, minimum, wide, lows


@triton.jit
def _store_integers(
    job, FIELD: tl.constexpr, head, first, x, mask, L: tl.constexpr, H: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Rows first.. of a head, x float32 [BLOCK_R, BLOCK_D], as codes with scales and minima."""
    NUM_BYTES: tl.constexpr = (H[HEAD_DIM] * L[BITS] + 7) // 8
    scale, minimum, wide, lows = _grouped(x, mask, L, BLOCK_R, BLOCK_D, SPAN)
    codes = tl.where(mask, group_codes(x, wide, lows, L[BITS]), 0)
    rows = (first + tl.arange(0, BLOCK_R)).to(tl.int64) * H[NUM_KV_HEADS] + head
    places = tl.arange(0, BLOCK_D * L[BITS] // 8)
    at = rows[:, None] * NUM_BYTES + places[None, :]
    codes_ptr = tl.load(job + FIELD).to(tl.pointer_type(tl.uint8))
    tl.store(codes_ptr + at, packed_bytes(codes, L[BITS], BLOCK_R, BLOCK_D), mask=(places < NUM_BYTES)[None, :])
    if L[KIND] == CHANNEL:
        NUM_GROUPS: tl.constexpr = H[HEAD_DIM]
        groups = tl.arange(0, BLOCK_D)
        lines = (first // SPAN + tl.arange(0, BLOCK_R // SPAN)).to(tl.int64) * H[NUM_KV_HEADS] + head
    else:
        NUM_GROUPS: tl.constexpr = (H[HEAD_DIM] + L[GROUP_SIZE] - 1) // L[GROUP_SIZE]
        groups = tl.arange(0, BLOCK_D // SPAN)
        lines = rows
    at = lines[:, None] * NUM_GROUPS + groups[None, :]
    tl.store(tl.load(job + FIELD + 1).to(tl.pointer_type(tl.float16)) + at, scale, mask=(groups < NUM_GROUPS)[None, :])
    lows_ptr = tl.load(job + FIELD + 2).to(tl.pointer_type(tl.float16))
    tl.store(lows_ptr + at, minimum, mask=(groups < NUM_GROUPS)[None, :])


@triton.jit
def pack_rows(
    table_ptr, SOURCE: tl.constexpr, FIELD: tl.constexpr, TAIL: tl.constexpr, L: tl.constexpr, H: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Rows of keys or values, but for low-rank ones. Grid: jobs, KV heads, blocks of rows.

    SOURCE, FIELD: of the job, where the rows and the packed tensors lie. SPAN: elements of a tile that share a scale.
    """
    job, head = table_ptr + tl.program_id(0).to(tl.int64) * FIELDS, tl.program_id(1)
    first = tl.program_id(2) * BLOCK_R
    rows, dims = first + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    mask = tl.broadcast_to((dims < H[HEAD_DIM])[None, :], [BLOCK_R, BLOCK_D])
    at = (rows.to(tl.int64) * H[NUM_KV_HEADS] + head)[:, None] * H[HEAD_DIM] + dims[None, :]
    source = tl.multiple_of(tl.load(job + SOURCE).to(tl.pointer_type(TAIL)), 16)
    x = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
    shared = tl.load(job + FIELD + SHARED)
    if L[KIND] == DENSE or L[KIND] == FLOAT8:
        _store_floats(tl.load(job + FIELD), shared, at, x, mask, L)
    else:
        if L[BALANCED]:
            balance = shared.to(tl.pointer_type(tl.float32)) + head * H[HEAD_DIM] + dims
            factors = tl.load(balance, mask=dims < H[HEAD_DIM], other=1.0)
            x = x * factors[None, :]
        _store_integers(job, FIELD, head, first, x, mask, L, H, BLOCK_R, BLOCK_D, SPAN)


@triton.jit
def project_rows(
    table_ptr, out_ptr, SOURCE: tl.constexpr, FIELD: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr,
    RANK_SIZE: tl.constexpr, NUM_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Factor rows: the rows [NUM_ROWS, WIDTH] of a job times its basis bfloat16 [rank, WIDTH], to out float32 [jobs,
    NUM_ROWS, rank]. The order of the sums is that of the loop, whatever else runs. Grid: jobs, columns, rows."""
    job = table_ptr + tl.program_id(0).to(tl.int64) * FIELDS
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    # rows are multiples of 16 channels
    source = tl.multiple_of(tl.load(job + SOURCE).to(tl.pointer_type(TAIL)), 16)
    basis = tl.multiple_of(tl.load(job + FIELD + SHARED).to(tl.pointer_type(tl.bfloat16)), 16)
    out = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for begin in range(0, WIDTH, BLOCK_C):
        at = begin + tl.arange(0, BLOCK_C)
        inside = at < WIDTH
        left = tl.load(source + rows[:, None] * WIDTH + at[None, :], mask=inside[None, :], other=0.0)
        mask = (columns < RANK_SIZE)[:, None] & inside[None, :]
        right = tl.load(basis + columns[:, None] * WIDTH + at[None, :], mask=mask, other=0.0)
        out = product(left, tl.trans(right), out, WIDE)
    place = (tl.program_id(0).to(tl.int64) * NUM_ROWS + rows)[:, None] * RANK_SIZE + columns[None, :]
    tl.store(out_ptr + place, out, mask=(columns < RANK_SIZE)[None, :])


@triton.jit
def pack_factors(
    table_ptr, x_ptr, FIELD: tl.constexpr, L: tl.constexpr, NUM_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Factor rows float32 [jobs, NUM_ROWS, rank] as bfloat16, or as integers with one scale a row. Grid: jobs, rows."""
    job = table_ptr + tl.program_id(0).to(tl.int64) * FIELDS
    rows, columns = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    mask = tl.broadcast_to((columns < L[RANK])[None, :], [BLOCK_R, BLOCK_K])
    source = x_ptr + (tl.program_id(0).to(tl.int64) * NUM_ROWS + rows)[:, None] * L[RANK] + columns[None, :]
    x = tl.load(source, mask=mask, other=0.0)
    place = tl.load(job + FIELD)
    if L[BITS] == 16:
        at = rows[:, None] * L[RANK] + columns[None, :]
        tl.store(place.to(tl.pointer_type(tl.int16)) + at, bfloat16_bits(x), mask=mask)
    else:
        NUM_BYTES: tl.constexpr = (L[RANK] * L[BITS] + 7) // 8
        low = tl.min(tl.where(mask, x, float("inf")), 1)
        high = tl.max(tl.where(mask, x, float("-inf")), 1)
        scale, minimum = group_scale(low, high, L[BITS])
        codes = group_codes(x, scale.to(tl.float32)[:, None], minimum.to(tl.float32)[:, None], L[BITS])
        places = tl.arange(0, BLOCK_K * L[BITS] // 8)
        at = rows[:, None] * NUM_BYTES + places[None, :]
        packed = packed_bytes(tl.where(mask, codes, 0), L[BITS], BLOCK_R, BLOCK_K)
        tl.store(place.to(tl.pointer_type(tl.uint8)) + at, packed, mask=(places < NUM_BYTES)[None, :])
        tl.store(tl.load(job + FIELD + 1).to(tl.pointer_type(tl.float16)) + rows, scale)
        tl.store(tl.load(job + FIELD + 2).to(tl.pointer_type(tl.float16)) + rows, minimum)


@triton.jit
def shift_rows(table_ptr, WORDS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """Rows of WORDS 8-byte words to the front of their tensor; BLOCK_R is at most the first row to move, so that no
    row is written over before it is read. Grid: tensors, blocks of words."""
    entry = table_ptr + tl.program_id(0).to(tl.int64) * MOVE_FIELDS
    base = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.int64)), 16)
    first, count = tl.load(entry + 1), tl.load(entry + 2)
    words = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    for begin in range(0, count, BLOCK_R):
        rows = begin + tl.arange(0, BLOCK_R)
        mask = (rows < count)[:, None] & (words < WORDS)[None, :]
        source = base + (rows + first)[:, None] * WORDS + words[None, :]
        x = tl.load(source, mask=mask, other=0)
        # what is written now is what an earlier turn read, and another warp may be behind
        tl.debug_barrier()
        tl.store(base + rows[:, None] * WORDS + words[None, :], x, mask=mask)
