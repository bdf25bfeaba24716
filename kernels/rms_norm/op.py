"""Checks and dispatch of `rms_norm`."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from ..dispatch import require
from . import reference


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """y = s / sqrt(mean(s^2) + eps) * weight, with s = x + residual (Zhang and Sennrich, arXiv 1910.07467).

    Args:
        x: [..., D], any floating dtype; the mean is taken in float32.
        weight: [D], dtype and device of x.
        eps: added to the mean square.
        residual: [..., D] like x, or None.

    Returns:
        y like x; with a residual (y, x + residual).

    Raises:
        ValueError: shapes that do not fit together.
    """
    require(weight.shape == x.shape[-1:], f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    if residual is None:
        return reference.rms_norm(x, weight, eps)
    require(residual.shape == x.shape, f"residual {tuple(residual.shape)} does not fit x {tuple(x.shape)}")
    return reference.add_rms_norm(x, residual, weight, eps)
