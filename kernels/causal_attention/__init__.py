"""Causal attention of prefill rows over the keys of one layer of one sequence."""

from __future__ import annotations

from .op import causal_attention

__all__ = ["causal_attention"]
