"""`rms_norm` and `add_rms_norm` in one launch each. Rows are normalised one by one, whatever their neighbours."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ELEMENTS = 1024  # short rows share a program


@triton.jit
def _store_normalised(y_ptr, x, w_ptr, mask, columns, eps, NUM_COLUMNS: tl.constexpr):
    """Normalise the rows of x [R, C]: rounding comes before the weight, as the checkpoints were trained."""
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / NUM_COLUMNS + eps)
    rounded = (wide * scale[:, None]).to(x.dtype).to(tl.float32)
    w = tl.load(w_ptr + columns, mask=columns < NUM_COLUMNS, other=0.0).to(tl.float32)
    tl.store(y_ptr, (rounded * w[None, :]).to(x.dtype), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm(
    x_ptr, w_ptr, y_ptr, num_rows, eps, x_outer, x_inner, x_column,
    INNER: tl.constexpr, NUM_COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x [rows / INNER, INNER, C], strided, to y [rows, C]. Grid: blocks of rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_C)
    mask = (rows < num_rows)[:, None] & (columns < NUM_COLUMNS)[None, :]
    at = (rows // INNER) * x_outer + (rows % INNER) * x_inner
    x = tl.load(x_ptr + at[:, None] + columns[None, :] * x_column, mask=mask, other=0.0)
    _store_normalised(y_ptr + rows[:, None] * NUM_COLUMNS + columns[None, :], x, w_ptr, mask, columns, eps, NUM_COLUMNS)


@triton.jit(do_not_specialize=["num_rows"])
def _add_rms_norm(
    x_ptr, residual_ptr, w_ptr, y_ptr, total_ptr, num_rows, eps,
    NUM_COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x + residual to `total`, normalised to y; all [rows, C]. Grid: blocks of rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_C)
    mask = (rows < num_rows)[:, None] & (columns < NUM_COLUMNS)[None, :]
    at = rows[:, None] * NUM_COLUMNS + columns[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    residual = tl.load(residual_ptr + at, mask=mask, other=0.0)
    total = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    tl.store(total_ptr + at, total, mask=mask)
    _store_normalised(y_ptr + at, total, w_ptr, mask, columns, eps, NUM_COLUMNS)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `op.rms_norm`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        # heads of one buffer come as [n, h, d] with a row stride of their own
        rows = x if x.dim() == 3 else x.reshape(-1, 1, x.shape[-1])
        num_rows = rows.shape[0] * rows.shape[1]
        grid, options = _tiles(num_rows, x.shape[-1])
        with torch.cuda.device_of(y):
            _rms_norm[grid](
                rows, weight.contiguous(), y, num_rows, eps, *rows.stride(),
                INNER=rows.shape[1], NUM_COLUMNS=x.shape[-1], **options,
            )  # fmt: skip
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `op.add_rms_norm`."""
    y, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if x.numel():
        num_rows = x.numel() // x.shape[-1]
        grid, options = _tiles(num_rows, x.shape[-1])
        with torch.cuda.device_of(y):
            _add_rms_norm[grid](
                x.contiguous(), residual.contiguous(), weight.contiguous(), y, total, num_rows, eps,
                NUM_COLUMNS=x.shape[-1], **options,
            )  # fmt: skip
    return y, total


def _tiles(num_rows: int, num_columns: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid, and block shape for rows of that many columns."""
    columns = triton.next_power_of_2(num_columns)
    rows = max(1, TILE_ELEMENTS // columns)
    warps = min(16, max(4, columns // 512))
    return (-(-num_rows // rows),), {"BLOCK_R": rows, "BLOCK_C": columns, "num_warps": warps}
