"""Checks and dispatch of `apply_rope`."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import REFERENCE, TRITON, Modules, backend, require

_IMPLEMENTATIONS = Modules(__package__, REFERENCE, TRITON)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """y = x * cos + rotate_half(x) * sin, with rotate_half([a, b]) = [-b, a] (Su et al., arXiv 2104.09864).

    Args:
        x: [n, h, d], d even.
        cos, sin: [n, d], one angle set a row, or [n, h, d], one a row and head; both halves of d hold the same
            angles. In a wider dtype than x the rotation is computed in that dtype.

    Returns:
        [n, h, d] in x's dtype.

    Raises:
        ValueError: shapes that do not fit together.
    """
    require(x.dim() == 3 and x.shape[-1] % 2 == 0, f"x must be [n, h, even d], got {tuple(x.shape)}")
    expected = ((x.shape[0], x.shape[2]), tuple(x.shape))
    require(cos.shape == sin.shape, f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} differ")
    require(tuple(cos.shape) in expected, f"cos {tuple(cos.shape)} does not fit x {tuple(x.shape)}")
    if cos.dim() == 2:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return backend(x.device, _IMPLEMENTATIONS).apply_rope(x, cos, sin)
