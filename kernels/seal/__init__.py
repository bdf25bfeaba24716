"""Sealing: blocks of rows of many sequences and layers, packed into the memory that they are read from."""

from __future__ import annotations

from .op import MOVE_FIELDS, SEAL_FIELDS, SealKey, move_rows, seal_blocks, serves

__all__ = ["MOVE_FIELDS", "SEAL_FIELDS", "SealKey", "move_rows", "seal_blocks", "serves"]
