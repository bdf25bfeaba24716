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
    valid: Tensor,
    segments: Sequence[ChunkSegment],
    chunk: int,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """See `op.sparse_attention`."""
    parts = []
    for i in range(q.shape[0]):
        k, v, positions = _read_row(chunks[i], valid[i], segments, chunk, q.shape[2])
        hidden = valid[i].repeat_interleave(chunk, dim=-1)
        parts.append(attention_partial(q[i : i + 1], k, v, positions, q_positions[i : i + 1], window, valid=hidden))
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
    chunks: Tensor, valid: Tensor, segments: Sequence[ChunkSegment], chunk: int, d: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One row's chunks [Hkv, K] as k, v float32 [Hkv, K * chunk, d] and positions int64 [Hkv, K * chunk]."""
    num_kv_heads, count = chunks.shape
    k = torch.zeros(num_kv_heads, count, chunk, d, dtype=torch.float32, device=chunks.device)
    v = torch.zeros_like(k)
    positions = torch.zeros(num_kv_heads, count, chunk, dtype=torch.int64, device=chunks.device)
    within = torch.arange(chunk, device=chunks.device)
    begin = 0
    for segment in segments:
        here = valid & (chunks >= begin) & (chunks < begin + segment.num_chunks)
        heads, slots = here.nonzero(as_tuple=True)
        local = chunks[heads, slots] - begin
        begin += segment.num_chunks
        if not len(local):
            continue
        at = segment.positions(local)[:, None] + within
        keys = segment.keys.read(heads, local)
        if segment.rope is not None:
            keys = segment.rope(keys.reshape(-1, 1, d), at.flatten()).view_as(keys)
        k[heads, slots] = keys.to(k.dtype)
        v[heads, slots] = segment.values.read(heads, local)
        positions[heads, slots] = at
    return k.flatten(1, 2), v.flatten(1, 2), positions.flatten(1, 2)
