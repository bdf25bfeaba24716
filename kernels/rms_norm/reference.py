"""`rms_norm` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise [..., D] rows in float32, round to x's dtype, then scale."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    # rounding comes before the weight, as the checkpoints were trained
    return weight * (wide * scale).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalised sum of x and residual, and the sum itself."""
    total = x + residual
    return rms_norm(total, weight, eps), total
