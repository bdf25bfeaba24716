"""The gated activation of the feed-forward block."""

from __future__ import annotations

from .op import swiglu

__all__ = ["swiglu"]
