"""`attention_mass` in plain torch, a block of queries and keys at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK_KEYS = 2048
BLOCK_SCORES = 1 << 22  # scores held at once


def attention_mass(q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor, window: int | None) -> Tensor:
    """See `op.attention_mass`."""
    num_kv_heads, num_keys = k.shape[1], len(k)
    mass = torch.zeros(num_kv_heads, num_keys, dtype=torch.float32, device=q.device)
    rows = max(16, BLOCK_SCORES // (q.shape[1] * BLOCK_KEYS))
    for begin in range(0, len(q), rows):
        at = slice(begin, begin + rows)
        _add_mass(mass, q[at], k, q_positions[at], k_positions, window)
    return mass


def _add_mass(mass: Tensor, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor, window: int | None) -> None:
    """Add what the queries of one block give to every key."""
    c, num_heads, d = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    # [Hkv, G * c, d], so that a KV head's keys are multiplied once for its group
    queries = (q.float() / math.sqrt(d)).view(c, num_kv_heads, group, d).permute(1, 2, 0, 3).flatten(1, 2)

    def scores(begin: int) -> Tensor:
        """Masked scores [Hkv, G, c, keys]."""
        at = k_positions[begin : begin + BLOCK_KEYS]
        hidden = at > q_positions[:, None]
        if window is not None:
            hidden |= at <= q_positions[:, None] - window
        block = torch.matmul(queries, k[begin : begin + BLOCK_KEYS].float().permute(1, 2, 0))
        return block.view(num_kv_heads, group, c, -1).masked_fill_(hidden, -torch.inf)

    total = torch.full((num_kv_heads, group, c), -torch.inf, dtype=torch.float32, device=q.device)
    for begin in range(0, len(k), BLOCK_KEYS):
        total = torch.logaddexp(total, torch.logsumexp(scores(begin), dim=-1))
    for begin in range(0, len(k), BLOCK_KEYS):
        weights = scores(begin).sub_(total[..., None]).exp_()
        mass[:, begin : begin + BLOCK_KEYS] += weights.sum(dim=(1, 2))
