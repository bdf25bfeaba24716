"""Checks and dispatch of `swiglu`."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import REFERENCE, TRITON, Modules, backend, require

_IMPLEMENTATIONS = Modules(__package__, REFERENCE, TRITON)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = gate * sigmoid(gate) * up (Shazeer, arXiv 2002.05202).

    Args:
        gate, up: [n, F], same shape and dtype; rows may be strided.

    Returns:
        [n, F], a new tensor of the same dtype.

    Raises:
        ValueError: shapes that differ.
    """
    require(gate.shape == up.shape, f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ")
    return backend(gate.device, _IMPLEMENTATIONS).swiglu(gate, up)
