"""Checks and dispatch of `causal_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import REFERENCE, TRITON, Modules, backend, require

_IMPLEMENTATIONS = Modules(__package__, REFERENCE, TRITON)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    window: int | None = None,
    *,
    last_rows: bool | None = None,
    no_gaps: bool = False,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the keys at positions <= a row's own, and > its own - window.

    Args:
        q: [c, H, d], post-RoPE.
        k, v: [m, Hkv, d]; H is a multiple of Hkv, query head h reads KV head h // (H / Hkv).
        q_positions: int64 [c].
        k_positions: int64 [m].
        window: width of a sliding window in positions, the row's own included, or None.
        last_rows: True when the caller vouches that the rows of q are the last c rows of k and positions ascend
            strictly, False when they are not, None to find out (which waits for the device).
        no_gaps: True when the caller vouches that positions moreover ascend by one; lets a window run faster.

    Returns:
        [c, H, d] in q's dtype. A row that sees no key gives zeros.

    Raises:
        ValueError: shapes that do not fit together.
    """
    c, num_heads, d = q.shape
    m, num_kv_heads, _ = k.shape
    require(k.shape == v.shape, f"k {tuple(k.shape)} and v {tuple(v.shape)} differ")
    require(k.shape[2] == d and num_heads % num_kv_heads == 0, f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}")
    require(q_positions.shape == (c,), f"q_positions {tuple(q_positions.shape)} does not fit q {tuple(q.shape)}")
    require(k_positions.shape == (m,), f"k_positions {tuple(k_positions.shape)} does not fit k {tuple(k.shape)}")
    require(window is None or window > 0, f"window must be positive, got {window}")
    if last_rows is None:
        last_rows = are_last_rows(q_positions, k_positions)
    require(not last_rows or c <= m, f"{c} rows cannot be the last of {m}")
    if c == 0:
        return torch.empty_like(q)
    implementation = backend(q.device, _IMPLEMENTATIONS)
    if last_rows and window is None:
        return implementation.lower_right(q, k, v)
    return implementation.by_position(q, k, v, q_positions, k_positions, window, last_rows, no_gaps)


def are_last_rows(q_positions: Tensor, k_positions: Tensor) -> bool:
    """Whether positions ascend strictly and those of q [c] are the last of k's [m]. Waits for the device."""
    c, m = len(q_positions), len(k_positions)
    if c > m or not torch.equal(q_positions, k_positions[m - c :]):
        return False
    return bool((k_positions[1:] > k_positions[:-1]).all())
