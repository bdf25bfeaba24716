"""Root-mean-square normalisation, with an optional fused residual addition."""

from __future__ import annotations

from .op import rms_norm

__all__ = ["rms_norm"]
