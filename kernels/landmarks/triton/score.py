"""Scoring landmarks, one kernel for all rows. A tile's shape does not depend on the number of rows, so a row's numbers
are the same whoever its neighbours are."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_QUERIES = 16
BLOCK_LANDMARKS = 64


def score_landmarks(q: Tensor, landmarks: Tensor, scale: Tensor | None) -> Tensor:
    """See `op.score_landmarks`."""
    num_rows, num_heads, d = q.shape
    count, num_kv_heads, _ = landmarks.shape
    scores = torch.empty(num_rows, num_heads, count, dtype=torch.float32, device=q.device)
    if scores.numel() == 0:
        return scores
    group = num_heads // num_kv_heads
    tile = max(TILE_QUERIES, triton.next_power_of_2(group))
    rows = tile // group
    grid = (triton.cdiv(num_rows, rows), num_kv_heads, triton.cdiv(count, BLOCK_LANDMARKS))
    with torch.cuda.device_of(q):
        _score[grid](
            q,
            landmarks,
            q if scale is None else scale,
            scores,
            num_rows,
            count,
            1.0 / math.sqrt(d),
            *q.stride(),
            *landmarks.stride(),
            *((0, 0) if scale is None else scale.stride()),
            GROUP=group,
            D=d,
            D_PAD=max(16, triton.next_power_of_2(d)),
            ROWS=rows,
            TILE=tile,
            BLOCK=BLOCK_LANDMARKS,
            HAS_SCALE=scale is not None,
            num_warps=4 if d <= 64 else 8,  # fewer would spill registers
        )
    return scores


@triton.jit(do_not_specialize=["num_rows", "count"])
def _score(
    q,
    landmarks,
    scale,
    scores,
    num_rows,
    count,
    factor,
    q_row,
    q_head,
    q_dim,
    l_row,
    l_head,
    l_dim,
    s_row,
    s_head,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    in_tile = tl.arange(0, TILE)
    row = tl.program_id(0).to(tl.int64) * ROWS + in_tile // GROUP
    query_head = head * GROUP + in_tile % GROUP
    is_row = (in_tile < ROWS * GROUP) & (row < num_rows)
    dims = tl.arange(0, D_PAD)
    is_dim = dims < D
    chunk = tl.program_id(2).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_chunk = chunk < count
    queries = tl.load(
        q + row[:, None] * q_row + query_head[:, None] * q_head + dims[None, :] * q_dim,
        mask=is_row[:, None] & is_dim[None, :],
        other=0,
    ).to(tl.float32)
    means = tl.load(
        landmarks + chunk[None, :] * l_row + head * l_head + dims[:, None] * l_dim,
        mask=is_chunk[None, :] & is_dim[:, None],
        other=0,
    ).to(tl.float32)
    found = tl.dot(queries * factor, means, input_precision="ieee")
    if HAS_SCALE:
        steps = tl.load(scale + chunk * s_row + head * s_head, mask=is_chunk, other=0).to(tl.float32)
        found = found * steps[None, :]
    place = (row[:, None] * (GROUP * tl.num_programs(1)) + query_head[:, None]) * count + chunk[None, :]
    tl.store(scores + place, found, mask=is_row[:, None] & is_chunk[None, :])
