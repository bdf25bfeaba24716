"""`swiglu` in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    # silu allocates, so the product may reuse its memory
    return F.silu(gate).mul_(up)
