"""Checks and dispatch of `rms_norm`."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import REFERENCE, TRITON, Modules, backend, require

_IMPLEMENTATIONS = Modules(__package__, REFERENCE, TRITON)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, arXiv 1910.07467).

    Args:
        x: [..., D], any floating dtype; the mean is taken in float32.
        weight: [D], dtype and device of x.
        eps: added to the mean square.

    Returns:
        y like x.

    Raises:
        ValueError: shapes that do not fit together.
    """
    require(weight.shape == x.shape[-1:], f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    return backend(x.device, _IMPLEMENTATIONS).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual, and the sum itself, which the next residual connection needs.

    Args:
        x, residual: [..., D], alike.
        weight, eps: as for `rms_norm`.

    Returns:
        (y, x + residual), both like x.

    Raises:
        ValueError: shapes that do not fit together.
    """
    require(weight.shape == x.shape[-1:], f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    require(residual.shape == x.shape, f"residual {tuple(residual.shape)} does not fit x {tuple(x.shape)}")
    return backend(x.device, _IMPLEMENTATIONS).add_rms_norm(x, residual, weight, eps)
