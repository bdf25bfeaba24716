"""How much attention each key receives from a block of queries."""

from __future__ import annotations

from .op import attention_mass

__all__ = ["attention_mass"]
