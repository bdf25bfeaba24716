"""The compiled side of a step's attention."""

from __future__ import annotations

from .bring import bring
from .launch import EVERYWHERE, Attended, append_rows, attend

__all__ = ["EVERYWHERE", "Attended", "append_rows", "attend", "bring"]
