"""Asymmetric integer groups with a float16 scale and minimum each, packed into bytes."""

from __future__ import annotations

from .op import Axis, dequantize, dequantize_chunks, quantize

__all__ = ["Axis", "dequantize", "dequantize_chunks", "quantize"]
