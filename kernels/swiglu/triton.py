"""`swiglu` in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit(do_not_specialize=["num_rows"])
def _swiglu(
    gate_ptr, up_ptr, y_ptr, num_rows, num_columns, gate_row, gate_column, up_row, up_column, BLOCK: tl.constexpr
):
    """gate, up [n, F], strided, to contiguous y. Grid: blocks of columns times rows."""
    blocks = tl.cdiv(num_columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    gate = tl.load(gate_ptr + row * gate_row + columns * gate_column, mask=mask, other=0.0)
    up = tl.load(up_ptr + row * up_row + columns * up_column, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    # rounded between, as the two operations of the reference round
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    y = (activated.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    tl.store(y_ptr + row * num_columns + columns, y, mask=mask)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `op.swiglu`."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        num_columns = gate.shape[-1]
        num_rows = gate.numel() // num_columns
        gate, up = (t if t.dim() == 2 else t.reshape(num_rows, num_columns) for t in (gate, up))
        with torch.cuda.device_of(y):
            _swiglu[(num_rows * -(-num_columns // BLOCK),)](
                gate, up, y, num_rows, num_columns, *gate.stride(), *up.stride(), BLOCK=BLOCK, num_warps=4
            )
    return y
