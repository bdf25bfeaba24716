"""`attention_partial` in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def attention_partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_positions: Tensor | None,
    q_positions: Tensor,
    window: int | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `op.attention_partial`."""
    num_rows, num_heads, d = q.shape
    num_kv_heads = k.shape[-3]
    grouped = (q.float() / math.sqrt(d)).view(num_rows, num_kv_heads, num_heads // num_kv_heads, d)
    k, v = k.float(), v.float()
    out = torch.empty(num_rows, num_heads, d, dtype=torch.float32, device=q.device)
    lse = torch.empty(num_rows, num_heads, dtype=torch.float32, device=q.device)
    # row by row: a matrix product over all rows may round each row differently than a product of one row
    for i in range(num_rows):
        k_row, v_row = (k, v) if k.dim() == 3 else (k[i], v[i])
        hidden = _hidden(_row(k_positions, i), q_positions[i], window, _row(valid, i))
        row_out, row_lse = _one_row(grouped[i], k_row, v_row, hidden)
        out[i] = row_out.view(num_heads, d)
        lse[i] = row_lse.view(num_heads)
    return out, lse


def merge_partials(partials: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """See `op.merge_partials`."""
    if len(partials) == 1:
        return partials[0][0]
    lses = torch.stack([lse for _, lse in partials])
    peak = lses.amax(dim=0)
    weights = torch.exp(lses - torch.where(peak == -torch.inf, 0.0, peak))
    total = weights.sum(dim=0)
    weights = weights / torch.where(total == 0, 1.0, total)
    merged = torch.zeros_like(partials[0][0])
    for (out, _), weight in zip(partials, weights, strict=True):
        merged.addcmul_(out, weight[..., None])
    return merged


def _row(mask: Tensor | None, i: int) -> Tensor | None:
    return mask[i] if mask is not None and mask.dim() == 3 else mask


def _hidden(k_positions: Tensor | None, q_position: Tensor, window: int | None, valid: Tensor | None) -> Tensor | None:
    """Keys that a row must not see: bool [m] or [Hkv, m], or None when it sees all."""
    hidden = None if valid is None else ~valid
    if k_positions is None:
        return hidden
    outside = k_positions > q_position
    if window is not None:
        outside |= k_positions <= q_position - window
    return outside if hidden is None else outside | hidden


def _one_row(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """q [Hkv, G, d], already divided by sqrt(d), over k, v [Hkv, m, d] -> [Hkv, G, d], [Hkv, G]."""
    if k.shape[1] == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf)
    scores = torch.bmm(q, k.transpose(1, 2))
    if hidden is not None:
        scores.masked_fill_(hidden[None, None] if hidden.dim() == 1 else hidden[:, None], -torch.inf)
    peak = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - torch.where(peak == -torch.inf, 0.0, peak))
    total = weights.sum(dim=-1, keepdim=True)
    out = torch.bmm(weights, v) / torch.where(total == 0, 1.0, total)
    return out, (peak + total.log()).squeeze(-1)
