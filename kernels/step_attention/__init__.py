"""Attention of one decode step over many sequences, of any recipe, at once."""

from __future__ import annotations

from .blocks import Block, sequence_block
from .op import Selection, StepAttention, serves
from .packed import Chunks, Kept, Layout, Packed, Region, Tail, View
from .shift import Shift, shifted
from .tables import Tables, step_tables

__all__ = [
    "Block",
    "Chunks",
    "Kept",
    "Layout",
    "Packed",
    "Region",
    "Selection",
    "Shift",
    "StepAttention",
    "Tables",
    "Tail",
    "View",
    "sequence_block",
    "serves",
    "shifted",
    "step_tables",
]
