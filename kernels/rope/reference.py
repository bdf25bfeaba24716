"""`apply_rope` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [n, h, d] by cos, sin [n, 1 or h, d]."""
    low, high = x.chunk(2, dim=-1)
    rotated = torch.cat((-high, low), dim=-1)
    return (x * cos + rotated * sin).to(x.dtype)
