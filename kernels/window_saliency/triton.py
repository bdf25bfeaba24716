"""`window_saliency` over the compiled column sums of `attention_mass`, a query head each."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention_mass.triton import column_mass
from .reference import pooled


def window_saliency(
    q: Tensor, k: Tensor, kernel: int, pool: str, positions: Tensor | None, window: int | None
) -> Tensor:
    """See `op.window_saliency`."""
    n, num_kv_heads, _ = k.shape
    at = torch.arange(n, device=k.device) if positions is None else positions
    mass = column_mass(q, k, at[n - len(q) :], at, window, 1, n - len(q))
    return pooled(mass, kernel, pool).unflatten(0, (num_kv_heads, -1)).sum(dim=1)
