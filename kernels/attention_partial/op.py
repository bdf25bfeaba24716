"""Checks and dispatch of `attention_partial` and `merge_partials`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..dispatch import REFERENCE, TRITON, Modules, backend, require

_IMPLEMENTATIONS = Modules(__package__, REFERENCE, TRITON)

Partial = tuple[Tensor, Tensor]


def attention_partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_positions: Tensor | None,
    q_positions: Tensor,
    window: int | None = None,
    *,
    valid: Tensor | None = None,
) -> Partial:
    """softmax(q k^T / sqrt(d)) v over the keys of one region, and log(sum(exp(q k^T / sqrt(d)))).

    A row's numbers do not depend on the other rows of the call: Q rows give bit for bit what Q calls of one row give.

    Args:
        q: [Q, H, d], post-RoPE; query head h reads KV head h // (H / Hkv).
        k, v: [Hkv, m, d], the same for all rows, or [Q, Hkv, m, d].
        k_positions: int [m], [Hkv, m] or [Q, Hkv, m]; row i sees keys at positions <= q_positions[i], and
            > q_positions[i] - window. None = every row sees every key.
        q_positions: int64 [Q].
        window: width of a sliding window in positions, the row's own included, or None.
        valid: bool of a shape that k_positions may have; False hides a key.

    Returns:
        out: float32 [Q, H, d]; zeros where a row sees no key.
        lse: float32 [Q, H]; -inf there.

    Raises:
        ValueError: shapes that do not fit together.
    """
    num_rows, num_heads, d = q.shape
    require(k.shape == v.shape and k.dim() in (3, 4), f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit")
    require(k.dim() == 3 or k.shape[0] == num_rows, f"k {tuple(k.shape)} does not fit q {tuple(q.shape)}")
    num_kv_heads, m = k.shape[-3:-1]
    require(k.shape[-1] == d and num_heads % num_kv_heads == 0, f"k {tuple(k.shape)} does not fit q {tuple(q.shape)}")
    require(q_positions.shape == (num_rows,), f"q_positions {tuple(q_positions.shape)} does not fit {num_rows} rows")
    require(window is None or k_positions is not None, "a window needs k_positions")
    for name, mask in (("k_positions", k_positions), ("valid", valid)):
        if mask is not None:
            shapes = ((m,), (num_kv_heads, m), (num_rows, num_kv_heads, m))
            require(tuple(mask.shape) in shapes, f"{name} {tuple(mask.shape)} does not fit k {tuple(k.shape)}")
    return backend(q.device, _IMPLEMENTATIONS).attention_partial(q, k, v, k_positions, q_positions, window, valid)


def merge_partials(partials: Sequence[Partial]) -> Tensor:
    """Attention over the union of disjoint regions: float32 [Q, H, d]; zeros where a row saw no key in any.

    Raises:
        ValueError: no partials.
    """
    require(len(partials) > 0, "nothing to merge")
    return backend(partials[0][0].device, _IMPLEMENTATIONS).merge_partials(partials)
