"""`causal_attention` over torch's fused attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

# bounds an explicit mask to [QUERY_BLOCK, m]
QUERY_BLOCK = 512


def lower_right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q [c, H, d], the last c of m rows, over k, v [m, Hkv, d]."""
    c, m = len(q), len(k)
    if c == m:
        return _attend(q, k, v, None, causal=True)
    # in float32 the fused kernel that knows this mask does not know heads that share keys
    if q.device.type != "cpu" and q.dtype.itemsize == 2:
        return _heads_last(
            F.scaled_dot_product_attention(
                _heads_first(q), _heads_first(k), _heads_first(v), attn_mask=causal_lower_right(c, m), enable_gqa=True
            )
        )
    index = torch.arange(m, device=q.device)
    return by_position(q, k, v, index[m - c :], index, None, last_rows=True)


def by_position(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    window: int | None,
    last_rows: bool,
    no_gaps: bool = False,
) -> Tensor:
    """Attention under an explicit mask, a block of query rows at a time.

    With `last_rows` the keys that no row of a block can see are not read: positions ascend strictly, so a window of
    w positions holds at most w rows.
    """
    c, m = len(q), len(k)
    out = torch.empty_like(q)
    for start in range(0, c, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, c)
        first, last = 0, m
        if last_rows:
            last = m - c + stop
            first = 0 if window is None else max(0, m - c + start - window + 1)
        rows, columns = q_positions[start:stop, None], k_positions[None, first:last]
        visible = columns <= rows
        if window is not None:
            visible &= columns > rows - window
        out[start:stop] = _attend(q[start:stop], k[first:last], v[first:last], visible, causal=False)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, causal: bool) -> Tensor:
    """Fused attention with KV heads as the batch, so that a group's queries share its keys without a copy."""
    c, num_heads, d = q.shape
    m, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    grouped_q = q.view(c, num_kv_heads, group, d).permute(1, 2, 0, 3)
    grouped_k = k.transpose(0, 1).unsqueeze(1).expand(num_kv_heads, group, m, d)
    grouped_v = v.transpose(0, 1).unsqueeze(1).expand(num_kv_heads, group, m, d)
    bias = None
    if visible is not None:
        # an additive mask is twice as fast as a boolean one on CPU
        bias = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, float("-inf"))
    out = F.scaled_dot_product_attention(grouped_q, grouped_k, grouped_v, attn_mask=bias, is_causal=causal)
    return out.permute(2, 0, 1, 3).reshape(c, num_heads, d)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)


def _heads_last(x: Tensor) -> Tensor:
    return x.squeeze(0).transpose(0, 1)
