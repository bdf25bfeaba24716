"""The sealing ops as a few launches for all jobs."""

from __future__ import annotations

from .launch import move_rows, seal_blocks

__all__ = ["move_rows", "seal_blocks"]
