"""`apply_rope` in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ELEMENTS = 512


@triton.jit(do_not_specialize=["num_pairs"])
def _rotate(
    x_ptr, cos_ptr, sin_ptr, y_ptr, x_strides, cos_strides, sin_strides, num_pairs,
    NUM_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x [n, h, 2 * HALF] to contiguous y; strides are (row, head, channel). Grid: blocks of pairs (row, head)."""
    pairs = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    dims = tl.arange(0, BLOCK_D)[None, :]
    mask = (pairs < num_pairs)[:, None] & (dims < HALF)
    rows, heads = (pairs // NUM_HEADS)[:, None], (pairs % NUM_HEADS)[:, None]
    x_at = rows * x_strides[0] + heads * x_strides[1] + dims * x_strides[2]
    low = tl.load(x_ptr + x_at, mask=mask, other=0.0)
    high = tl.load(x_ptr + x_at + HALF * x_strides[2], mask=mask, other=0.0)
    # both halves of a table hold the same angles
    cos_at = rows * cos_strides[0] + heads * cos_strides[1] + dims * cos_strides[2]
    sin_at = rows * sin_strides[0] + heads * sin_strides[1] + dims * sin_strides[2]
    cos = tl.load(cos_ptr + cos_at, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + sin_at, mask=mask, other=0.0).to(tl.float32)
    a, b = low.to(tl.float32), high.to(tl.float32)
    y_at = pairs[:, None] * (2 * HALF) + dims
    tl.store(y_ptr + y_at, (a * cos - b * sin).to(low.dtype), mask=mask)
    tl.store(y_ptr + y_at + HALF, (b * cos + a * sin).to(low.dtype), mask=mask)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `op.apply_rope`; cos, sin [n, 1 or h, d]."""
    n, num_heads, d = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        columns = triton.next_power_of_2(d // 2)
        pairs = max(1, TILE_ELEMENTS // columns)
        # products and sums round separately, as in the reference
        with torch.cuda.device_of(y):
            _rotate[(-(-n * num_heads // pairs),)](
                x, cos, sin, y, x.stride(), cos.expand(x.shape).stride(), sin.expand(x.shape).stride(), n * num_heads,
                NUM_HEADS=num_heads, HALF=d // 2, BLOCK_P=pairs, BLOCK_D=columns, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return y
