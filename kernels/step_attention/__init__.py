"""Attention of one decode step over many sequences, of any recipe, at once."""

from __future__ import annotations

from .blocks import Block, RecallBlock, RecallKey, sequence_block
from .op import Selection, StepAttention, serves
from .packed import Chunks, Kept, Layout, Packed, Region, Tail, View
from .recalled import RecallView, recall_block
from .shift import Shift, shifted
from .tables import Tables, step_tables

__all__ = [
    "Block",
    "Chunks",
    "Kept",
    "Layout",
    "Packed",
    "RecallBlock",
    "RecallKey",
    "RecallView",
    "Region",
    "Selection",
    "Shift",
    "StepAttention",
    "Tables",
    "Tail",
    "View",
    "recall_block",
    "sequence_block",
    "serves",
    "shifted",
    "step_tables",
]
