"""Checks and dispatch of `window_saliency`."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..dispatch import REFERENCE, TRITON, Modules, backend, require

_IMPLEMENTATIONS = Modules(__package__, REFERENCE, TRITON)


def window_saliency(
    q: Tensor,
    k: Tensor,
    kernel: int,
    pool: Literal["max", "avg"],
    *,
    positions: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """SnapKV's score (arXiv 2404.14469 §4; FastKV's form, arXiv 2502.01068 §3.1).

    softmax in float32 of the last w rows' q k^T / sqrt(d) over all n rows, causal among the last w, summed over the w
    rows on the prefix of n - w, pooled over `kernel` neighbours per query head, summed over the GQA group.

    Args:
        q: [w, H, d], post-RoPE queries of the last w rows.
        k: [n, Hkv, d], post-RoPE keys, w <= n; never repeated for the query heads.
        kernel: odd width of the pooling, stride 1, zero padding.
        pool: `max` or `avg`.
        positions: int64 [n], ascending, needed for a sliding window only.
        window: the layer's sliding window, or None.

    Returns:
        float32 [Hkv, n - w].

    Raises:
        ValueError: shapes that do not fit together.
    """
    require(q.shape[0] <= k.shape[0], f"{q.shape[0]} queries are not the last of {k.shape[0]} rows")
    require(q.shape[2] == k.shape[2] and q.shape[1] % k.shape[1] == 0, f"q {q.shape} does not fit k {k.shape}")
    require(kernel % 2 == 1, f"kernel must be odd, got {kernel}")
    require(pool in ("max", "avg"), f"pool must be max or avg, got {pool!r}")
    require(window is None or positions is not None, "a sliding window needs positions")
    return backend(q.device, _IMPLEMENTATIONS).window_saliency(
        q, k, kernel, pool, positions if window is not None else None, window
    )
