"""`sparse_attention` for all rows at once, and low-rank chunks as one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_partial import attention_partial

if TYPE_CHECKING:
    from .op import ChunkSegment

BLOCK_RANK = 32
DECODED_BYTES = 1 << 28  # of keys, and as much of values


def sparse_attention(
    q: Tensor,
    q_positions: Tensor,
    chunks: Tensor,
    valid: Tensor | None,
    segments: Sequence[ChunkSegment],
    chunk: int,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """See `op.sparse_attention`; as many rows at once as `DECODED_BYTES` hold."""
    row_nbytes = 4 * chunks[0].numel() * chunk * q.shape[2] if len(chunks) else 1
    step = max(1, DECODED_BYTES // max(1, row_nbytes))
    parts = []
    for begin in range(0, max(1, len(q)), step):
        at = slice(begin, begin + step)
        shown = None if valid is None else valid[at].repeat_interleave(chunk, dim=-1)
        k, v, positions = _read_rows(chunks[at], segments, chunk, q.shape[2])
        parts.append(attention_partial(q[at], k, v, positions, q_positions[at], window, valid=shown))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _read_rows(chunks: Tensor, segments: Sequence[ChunkSegment], chunk: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chunks [Q, Hkv, K] as k, v float32 [Q, Hkv, K * chunk, d] and positions int64 [Q, Hkv, K * chunk].

    An entry of another segment is read at a segment's first or last chunk and not used: to leave it out would take a
    wait for the device. So a segment without chunks is passed over.
    """
    segments = [segment for segment in segments if segment.num_chunks] or segments
    num_rows, num_kv_heads, count = chunks.shape
    heads = torch.arange(num_kv_heads, device=chunks.device)[None, :, None].expand_as(chunks).flatten()
    flat, begin = chunks.flatten(), 0
    k = v = positions = None
    for segment in segments:
        here = flat if len(segments) == 1 else (flat - begin).clamp(0, segment.num_chunks - 1)
        one = _read(segment, heads, here, chunk)
        if k is None:
            k, v, positions = one
        else:
            later = flat >= begin
            k = torch.where(later[:, None, None], one[0], k)
            v = torch.where(later[:, None, None], one[1], v)
            positions = torch.where(later[:, None], one[2], positions)
        begin += segment.num_chunks
    shape = (num_rows, num_kv_heads, count * chunk)
    return k.view(*shape, d), v.view(*shape, d), positions.view(shape)


def _read(segment: ChunkSegment, heads: Tensor, chunks: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Decode entries [M] of one segment: k, v float32 [M, chunk, d] and positions int64 [M, chunk]."""
    positions = segment.positions(chunks)[:, None] + torch.arange(chunk, device=chunks.device)
    k = segment.keys.read(heads, chunks)
    if segment.rope is not None:
        k = segment.rope(k.reshape(-1, 1, k.shape[-1]), positions.flatten()).view_as(k).float()
    return k, segment.values.read(heads, chunks), positions


def low_rank_chunks(coefficients: Tensor, basis: Tensor, heads: Tensor) -> Tensor:
    """See `op.low_rank_chunks`."""
    count, chunk, rank = coefficients.shape
    d = basis.shape[2]
    out = torch.empty(count, chunk, d, dtype=torch.float32, device=coefficients.device)
    if count:
        with torch.cuda.device_of(out):
            _multiply[(count,)](
                coefficients.contiguous(),
                basis,
                heads.contiguous(),
                out,
                *basis.stride(),
                CHUNK=chunk,
                RANK=rank,
                D=d,
                ROWS=max(16, triton.next_power_of_2(chunk)),
                D_PAD=max(16, triton.next_power_of_2(d)),
                BLOCK=BLOCK_RANK,
                num_warps=4 if d <= 128 else 8,  # fewer would spill registers
            )
    return out


@triton.jit
def _multiply(
    coefficients,
    basis,
    heads,
    out,
    b_rank,
    b_head,
    b_dim,
    CHUNK: tl.constexpr,
    RANK: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    head = tl.load(heads + entry)
    row, dims = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    is_row, is_dim = row < CHUNK, dims < D
    sums = tl.zeros((ROWS, D_PAD), tl.float32)
    for begin in range(0, RANK, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        is_column = column < RANK
        left = tl.load(
            coefficients + (entry * CHUNK + row[:, None]) * RANK + column[None, :],
            mask=is_row[:, None] & is_column[None, :],
            other=0,
        )
        right = tl.load(
            basis + column[:, None] * b_rank + head * b_head + dims[None, :] * b_dim,
            mask=is_column[:, None] & is_dim[None, :],
            other=0,
        ).to(tl.float32)
        sums += tl.dot(left, right, input_precision="ieee")
    tl.store(out + (entry * CHUNK + row[:, None]) * D + dims[None, :], sums, mask=is_row[:, None] & is_dim[None, :])
