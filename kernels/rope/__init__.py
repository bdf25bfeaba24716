"""Rotary position embedding, NeoX half-split layout."""

from __future__ import annotations

from .op import apply_rope

__all__ = ["apply_rope"]
