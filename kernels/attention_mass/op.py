"""Checks and dispatch of `attention_mass`."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import REFERENCE, TRITON, Modules, backend, require

_IMPLEMENTATIONS = Modules(__package__, REFERENCE, TRITON)


def attention_mass(q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor, window: int | None = None) -> Tensor:
    """Column sums of the attention matrix, the accumulated attention of H2O (arXiv 2306.14048 §4).

    softmax in float32 of q k^T / sqrt(d) over the keys at positions <= each query's own, summed over the queries and
    over the GQA group. Takes two passes over the keys: the softmax's denominators, then the sums.

    Args:
        q: [c, H, d], post-RoPE.
        k: [m, Hkv, d], post-RoPE; never repeated for the query heads.
        q_positions: int64 [c], ascending, each among `k_positions`.
        k_positions: int64 [m], ascending.
        window: the layer's sliding window, or None.

    Returns:
        float32 [Hkv, m], which sums up to c H / Hkv a KV head.

    Raises:
        ValueError: shapes that do not fit together.
    """
    require(q.shape[2] == k.shape[2] and q.shape[1] % k.shape[1] == 0, f"q {q.shape} does not fit k {k.shape}")
    require(q_positions.shape == q.shape[:1], f"q_positions {tuple(q_positions.shape)} do not fit q {tuple(q.shape)}")
    require(k_positions.shape == k.shape[:1], f"k_positions {tuple(k_positions.shape)} do not fit k {tuple(k.shape)}")
    return backend(q.device, _IMPLEMENTATIONS).attention_mass(q, k, q_positions, k_positions, window)
