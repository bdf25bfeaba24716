"""Chunks of rows that lie in host memory, and the ones among them that the device holds."""

from __future__ import annotations

from .op import HotBuffers, fetch_chosen
from .records import HOT_FIELDS, HotKey, HotView, Records, gather_records, hot_fields, pack_records

__all__ = [
    "HOT_FIELDS",
    "HotBuffers",
    "HotKey",
    "HotView",
    "Records",
    "fetch_chosen",
    "gather_records",
    "hot_fields",
    "pack_records",
]
