"""`window_saliency` in plain torch, a block of keys at a time: what grows with n is a few floats a row and head."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import block_rows

BLOCK_ROWS = 2048  # keys scored at once, and fewer where there are many queries
BLOCK_SCORES = 1 << 20


def window_saliency(
    q: Tensor, k: Tensor, kernel: int, pool: str, positions: Tensor | None, window: int | None
) -> Tensor:
    """See `op.window_saliency`. The softmax takes two passes over the keys: its denominators, then the mass."""
    w, num_heads, d = q.shape
    n, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    # [Hkv, G * w, d], so that a KV head's keys are multiplied once for its group
    queries = (q.float() / math.sqrt(d)).view(w, num_kv_heads, group, d).permute(1, 2, 0, 3).flatten(1, 2)
    step = max(1, min(block_rows(k.device, BLOCK_ROWS), block_rows(k.device, BLOCK_SCORES) // (num_heads * w)))

    def scores(begin: int, end: int) -> Tensor:
        """Masked scores [Hkv, G, w, end - begin]."""
        hidden = torch.arange(begin, end, device=k.device) > torch.arange(n - w, n, device=k.device)[:, None]
        if positions is not None and window is not None:
            hidden |= positions[begin:end] <= positions[n - w :, None] - window
        block = torch.matmul(queries, k[begin:end].float().permute(1, 2, 0))
        return block.view(num_kv_heads, group, w, end - begin).masked_fill_(hidden, -torch.inf)

    total = torch.full((num_kv_heads, group, w), -torch.inf, dtype=torch.float32, device=q.device)
    for begin in range(0, n, step):
        total = torch.logaddexp(total, torch.logsumexp(scores(begin, min(begin + step, n)), dim=-1))
    mass = torch.empty(num_kv_heads, group, n - w, dtype=torch.float32, device=q.device)
    for begin in range(0, n - w, step):
        end = min(begin + step, n - w)
        mass[..., begin:end] = scores(begin, end).sub_(total[..., None]).exp_().sum(dim=2)
    return torch.stack([pooled(head, kernel, pool).sum(dim=0) for head in mass])


def pooled(mass: Tensor, kernel: int, pool: str) -> Tensor:
    """Pool mass [heads, m] over neighbours, keeping m."""
    if mass.shape[-1] == 0 or kernel == 1:
        return mass
    reduce = F.max_pool1d if pool == "max" else F.avg_pool1d
    return reduce(mass[None], kernel, stride=1, padding=kernel // 2)[0]
