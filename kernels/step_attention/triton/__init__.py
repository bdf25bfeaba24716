"""The compiled side of a step's attention."""

from __future__ import annotations

from .launch import append_rows, attend

__all__ = ["append_rows", "attend"]
