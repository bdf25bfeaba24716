"""Attention over one region of a cache, with the log-sum-exp that lets regions be merged."""

from __future__ import annotations

from .op import attention_partial, merge_partials

__all__ = ["attention_partial", "merge_partials"]
