"""Checks and dispatch of `sparse_attention` and of the low-rank decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..dispatch import REFERENCE, TRITON, Modules, backend, require

_IMPLEMENTATIONS = Modules(__package__, REFERENCE, TRITON)


class ChunkReader(Protocol):
    """Packed rows of keys or values that can be decoded a chunk of one KV head at a time."""

    def read(self, heads: Tensor, chunks: Tensor) -> Tensor:
        """heads, chunks int64 [M] -> float32 [M, chunk, d]; touches those entries only."""
        ...


@dataclass(frozen=True)
class ChunkSegment:
    """Consecutive chunks that are packed together.

    Attributes:
        keys, values: their readers.
        num_chunks: how many.
        positions: chunk indices int64 [M] -> position of each chunk's first row, int64 [M].
        rope: rotates decoded keys x [n, 1, d] at positions int64 [n], or None when they are stored rotated.
    """

    keys: ChunkReader
    values: ChunkReader
    num_chunks: int
    positions: Callable[[Tensor], Tensor]
    rope: Callable[[Tensor, Tensor], Tensor] | None


def sparse_attention(
    q: Tensor,
    q_positions: Tensor,
    chunks: Tensor,
    valid: Tensor | None,
    segments: Sequence[ChunkSegment],
    chunk: int,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each row over the chunks that it chose, read once each from the segment that holds them.

    Args:
        q: [Q, H, d], post-RoPE.
        q_positions: int64 [Q].
        chunks: int64 [Q, Hkv, K], indices into the segments laid end to end.
        valid: bool [Q, Hkv, K], False entries are not read; None = all are.
        segments: where the chunks lie.
        chunk: rows a chunk.
        window: width of a sliding window, or None.

    Returns:
        out float32 [Q, H, d] and lse float32 [Q, H], as `attention_partial` gives them. A row's numbers do not depend
        on the other rows.

    Raises:
        ValueError: shapes that do not fit together.
    """
    require(chunks.dim() == 3 and (valid is None or valid.shape == chunks.shape), "chunks, valid must be [Q, Hkv, K]")
    require(chunks.shape[0] == q.shape[0] and q.shape[1] % chunks.shape[1] == 0, "chunks do not fit q")
    require(len(segments) > 0, "there are no segments")
    return backend(q.device, _IMPLEMENTATIONS).sparse_attention(q, q_positions, chunks, valid, segments, chunk, window)


def low_rank_chunks(coefficients: Tensor, basis: Tensor, heads: Tensor) -> Tensor:
    """Keys of chosen chunks from their factor rows.

    Args:
        coefficients: float32 [M, chunk, r].
        basis: [r, Hkv, d].
        heads: int64 [M], the KV head of each entry.

    Returns:
        float32 [M, chunk, d], before RoPE.

    Raises:
        ValueError: shapes that do not fit together.
    """
    require(coefficients.shape[-1] == basis.shape[0], f"{tuple(coefficients.shape)} does not fit {tuple(basis.shape)}")
    require(heads.shape == coefficients.shape[:1], "heads must be [M]")
    return backend(coefficients.device, _IMPLEMENTATIONS).low_rank_chunks(coefficients, basis, heads)
