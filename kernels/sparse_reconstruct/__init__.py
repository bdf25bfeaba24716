"""Attention over chosen chunks that are decoded on the fly; nothing else of the cache is touched."""

from __future__ import annotations

from .op import ChunkReader, ChunkSegment, low_rank_chunks, sparse_attention

__all__ = ["ChunkReader", "ChunkSegment", "low_rank_chunks", "sparse_attention"]
