"""Attention of one decode step over many sequences, of any recipe, at once."""

from __future__ import annotations

from .blocks import Block, sequence_block
from .op import Selection, StepAttention, serves
from .packed import Chunks, Kept, Layout, Packed, Region, Tail, View
from .tables import Tables, step_tables

__all__ = [
    "Block",
    "Chunks",
    "Kept",
    "Layout",
    "Packed",
    "Region",
    "Selection",
    "StepAttention",
    "Tables",
    "Tail",
    "View",
    "sequence_block",
    "serves",
    "step_tables",
]
