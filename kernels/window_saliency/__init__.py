"""How much the last rows of a prompt attend to each earlier row."""

from __future__ import annotations

from .op import window_saliency

__all__ = ["window_saliency"]
