"""`apply_rope` in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ELEMENTS = 512


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, y_ptr, x_strides, cos_strides, sin_strides,
    NUM_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x [n, h, 2 * HALF] to contiguous y; strides are (row, head, channel). Grid: rows, blocks of heads."""
    row = tl.program_id(0).to(tl.int64)
    heads, dims = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    mask = (heads < NUM_HEADS)[:, None] & (dims < HALF)[None, :]
    x_at = row * x_strides[0] + heads[:, None] * x_strides[1] + dims[None, :] * x_strides[2]
    low = tl.load(x_ptr + x_at, mask=mask, other=0.0)
    high = tl.load(x_ptr + x_at + HALF * x_strides[2], mask=mask, other=0.0)
    # both halves of a table hold the same angles
    cos_at = row * cos_strides[0] + heads[:, None] * cos_strides[1] + dims[None, :] * cos_strides[2]
    sin_at = row * sin_strides[0] + heads[:, None] * sin_strides[1] + dims[None, :] * sin_strides[2]
    cos = tl.load(cos_ptr + cos_at, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + sin_at, mask=mask, other=0.0).to(tl.float32)
    a, b = low.to(tl.float32), high.to(tl.float32)
    y_at = (row * NUM_HEADS + heads[:, None]) * (2 * HALF) + dims[None, :]
    tl.store(y_ptr + y_at, (a * cos - b * sin).to(low.dtype), mask=mask)
    tl.store(y_ptr + y_at + HALF, (b * cos + a * sin).to(low.dtype), mask=mask)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `op.apply_rope`; cos, sin [n, 1 or h, d]."""
    n, num_heads, d = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        columns = triton.next_power_of_2(d // 2)
        heads = min(triton.next_power_of_2(num_heads), max(1, TILE_ELEMENTS // columns))
        # separate rounding of products and sums, as in the reference
        _rotate[(n, -(-num_heads // heads))](
            x, cos, sin, y, x.stride(), cos.expand(x.shape).stride(), sin.expand(x.shape).stride(),
            NUM_HEADS=num_heads, HALF=d // 2, BLOCK_H=heads, BLOCK_D=columns, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return y
