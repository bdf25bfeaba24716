"""`sparse_attention` in plain torch: gather, decode, rotate, attend, one query row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention_partial import attention_partial

if TYPE_CHECKING:
    from .op import ChunkSegment


def sparse_attention(
    q: Tensor,
    q_positions: Tensor,
    chunks: Tensor,
    valid: Tensor | None,
    segments: Sequence[ChunkSegment],
    chunk: int,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """See `op.sparse_attention`."""
    parts = []
    for i in range(q.shape[0]):
        mine = None if valid is None else valid[i]
        k, v, positions = _read_row(chunks[i], mine, segments, chunk, q.shape[2])
        shown = None if mine is None else mine.repeat_interleave(chunk, dim=-1)
        parts.append(attention_partial(q[i : i + 1], k, v, positions, q_positions[i : i + 1], window, valid=shown))
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def low_rank_chunks(coefficients: Tensor, basis: Tensor, heads: Tensor) -> Tensor:
    """See `op.low_rank_chunks`."""
    count, chunk, rank = coefficients.shape
    out = coefficients.new_empty(count, chunk, basis.shape[2])
    for head in range(basis.shape[1]):
        mine = (heads == head).nonzero().squeeze(1)
        rows = coefficients[mine].view(-1, rank) @ basis[:, head].float()
        out[mine] = rows.view(-1, chunk, basis.shape[2])
    return out


def _read_row(
    chunks: Tensor, valid: Tensor | None, segments: Sequence[ChunkSegment], chunk: int, d: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One row's chunks [Hkv, K] as k, v float32 [Hkv, K * chunk, d] and positions int64 [Hkv, K * chunk]."""
    num_kv_heads, count = chunks.shape
    if len(segments) == 1 and valid is None:
        heads = torch.arange(num_kv_heads, device=chunks.device).repeat_interleave(count)
        k, v, positions = _read(segments[0], heads, chunks.flatten(), chunk)
        return k.view(num_kv_heads, -1, d), v.view(num_kv_heads, -1, d), positions.view(num_kv_heads, -1)
    k = torch.zeros(num_kv_heads, count, chunk, d, dtype=torch.float32, device=chunks.device)
    v = torch.zeros_like(k)
    positions = torch.zeros(num_kv_heads, count, chunk, dtype=torch.int64, device=chunks.device)
    begin = 0
    for segment in segments:
        here = (chunks >= begin) & (chunks < begin + segment.num_chunks)
        heads, slots = (here if valid is None else here & valid).nonzero(as_tuple=True)
        if len(heads):
            read = _read(segment, heads, chunks[heads, slots] - begin, chunk)
            k[heads, slots], v[heads, slots], positions[heads, slots] = read
        begin += segment.num_chunks
    return k.flatten(1, 2), v.flatten(1, 2), positions.flatten(1, 2)


def _read(segment: ChunkSegment, heads: Tensor, chunks: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Decode entries [M] of one segment: k, v float32 [M, chunk, d] and positions int64 [M, chunk]."""
    positions = segment.positions(chunks)[:, None] + torch.arange(chunk, device=chunks.device)
    k = segment.keys.read(heads, chunks)
    if segment.rope is not None:
        k = segment.rope(k.reshape(-1, 1, k.shape[-1]), positions.flatten()).view_as(k).float()
    return k, segment.values.read(heads, chunks), positions
