"""Landmarks of blocks that have just been packed: they are decoded, rotated and averaged chunk by chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from ...quantize.triton import ROUNDER
from ...step_attention.triton.tiles import HEAD_DIM, NUM_KV_HEADS, half_sums, packed_halves
from .rows import ANGLES, FIELDS, KEYS, LANDMARK_SCALES, LANDMARKS, SHARED, bfloat16_bits

MARGIN: tl.constexpr = tl.constexpr((1 + 2.0**-10) / 127)
LEAST: tl.constexpr = tl.constexpr(2.0**-24)
MOST: tl.constexpr = tl.constexpr(65504.0)


@triton.jit
def _decoded(job, head, local, K: tl.constexpr, H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
             WIDE: tl.constexpr):  # fmt: skip
    """The lower and upper halves float32 [N, BLOCK_H] of the packed keys `local` of a job."""
    nothing = tl.zeros_like(local)
    inside = local >= 0
    places = (
        tl.load(job + KEYS) + nothing, tl.load(job + KEYS + 1) + nothing, tl.load(job + KEYS + 2) + nothing,
    )  # fmt: skip
    shared = tl.load(job + KEYS + SHARED)
    sums = half_sums(shared, head, K, H, BLOCK_H)
    low, high = packed_halves(places, shared, sums, local, head, inside, K, H, BLOCK_H, BLOCK_N, WIDE)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _means(x, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr):
    """float32 [N / CHUNK, BLOCK_H]; a chunk is a power of two, so that the division is exact."""
    return tl.sum(tl.reshape(x, [BLOCK_N // CHUNK, CHUNK, BLOCK_H]), 1) * (1.0 / CHUNK)


@triton.jit
def _store_codes(x, scale, place, mask):
    """Landmarks float32 as int8 steps of `scale` [chunks, 1]."""
    codes = tl.div_rn(x, scale + x * 0)
    codes = tl.minimum(tl.maximum((codes + ROUNDER) - ROUNDER, -127.0), 127.0)
    tl.store(place, codes.to(tl.int8), mask=mask)


@triton.jit
def summarize_blocks(
    table_ptr, cos_ptr, sin_ptr, K: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, LANDMARK_BITS: tl.constexpr,
    ROTATES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid: jobs, KV heads, blocks of BLOCK_N rows. cos, sin: float32 [angles, d]."""
    HALF: tl.constexpr = H[HEAD_DIM] // 2
    job, head = table_ptr + tl.program_id(0).to(tl.int64) * FIELDS, tl.program_id(1).to(tl.int64)
    local = tl.program_id(2).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    low, high = _decoded(job, head, local, K, H, BLOCK_N, BLOCK_H, WIDE)
    dims = tl.arange(0, BLOCK_H)
    is_dim = (dims < HALF)[None, :]
    if ROTATES:
        at = (tl.load(job + ANGLES) + local)[:, None] * H[HEAD_DIM] + dims[None, :]
        cos, sin = tl.load(cos_ptr + at, mask=is_dim, other=0.0), tl.load(sin_ptr + at, mask=is_dim, other=0.0)
        low, high = low * cos - high * sin, high * cos + low * sin
    low, high = _means(low, CHUNK, BLOCK_N, BLOCK_H), _means(high, CHUNK, BLOCK_N, BLOCK_H)
    COUNT: tl.constexpr = BLOCK_N // CHUNK
    chunks = (tl.program_id(2).to(tl.int64) * COUNT + tl.arange(0, COUNT)) * H[NUM_KV_HEADS] + head
    at = chunks[:, None] * H[HEAD_DIM] + dims[None, :]
    place = tl.load(job + LANDMARKS)
    if LANDMARK_BITS == 16:
        rows = place.to(tl.pointer_type(tl.int16)) + at
        tl.store(rows, bfloat16_bits(low), mask=is_dim)
        tl.store(rows + HALF, bfloat16_bits(high), mask=is_dim)
    else:
        peak = tl.maximum(tl.max(tl.where(is_dim, tl.abs(low), 0.0), 1), tl.max(tl.where(is_dim, tl.abs(high), 0.0), 1))
        # rounded first, and away from 0, so that codes fit what they are multiplied by
        scale = tl.minimum(tl.maximum(peak * MARGIN, LEAST), MOST).to(tl.float16)
        tl.store(tl.load(job + LANDMARK_SCALES).to(tl.pointer_type(tl.float16)) + chunks, scale)
        rows = place.to(tl.pointer_type(tl.int8)) + at
        _store_codes(low, scale.to(tl.float32)[:, None], rows, is_dim)
        _store_codes(high, scale.to(tl.float32)[:, None], rows + HALF, is_dim)
