"""`window_saliency` in plain torch, one KV head at a time: memory is [G * w, n] floats."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def window_saliency(
    q: Tensor, k: Tensor, kernel: int, pool: str, positions: Tensor | None, window: int | None
) -> Tensor:
    """See `op.window_saliency`."""
    w, num_heads, d = q.shape
    n, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    hidden = torch.ones(w, n, dtype=torch.bool, device=q.device).triu_(n - w + 1)
    if positions is not None and window is not None:
        hidden |= positions[None] <= positions[n - w :, None] - window
    out = torch.empty(num_kv_heads, n - w, dtype=torch.float32, device=q.device)
    for head in range(num_kv_heads):
        queries = q[:, head * group : (head + 1) * group].transpose(0, 1).float()
        scores = torch.matmul(queries, k[:, head].float().T) / math.sqrt(d)
        scores.masked_fill_(hidden, -torch.inf)
        mass = torch.softmax(scores, dim=-1)[..., : n - w].sum(dim=1)
        out[head] = _pooled(mass, kernel, pool).sum(dim=0)
    return out


def _pooled(mass: Tensor, kernel: int, pool: str) -> Tensor:
    """Pool [G, m] over neighbours, keeping m."""
    if mass.shape[-1] == 0 or kernel == 1:
        return mass
    pooled = F.max_pool1d if pool == "max" else F.avg_pool1d
    return pooled(mass[None], kernel, stride=1, padding=kernel // 2)[0]
