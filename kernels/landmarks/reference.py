"""The landmark ops in plain torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import block_rows

BLOCK_ROWS = 2048  # rows compared with their means at once, so that float32 copies do not grow with n


def chunk_means(k: Tensor, chunk: int) -> Tensor:
    """See `op.chunk_means`."""
    return k.unflatten(0, (-1, chunk)).float().mean(dim=1)


def min_cosine_outliers(k: Tensor, chunk: int, num_outliers: int) -> Tensor:
    """See `op.min_cosine_outliers`."""
    chunks = k.unflatten(0, (-1, chunk))
    worst = torch.empty(len(chunks), k.shape[1], dtype=torch.float32, device=k.device)
    step = max(1, block_rows(k.device, BLOCK_ROWS) // chunk)
    for begin in range(0, len(chunks), step):
        worst[begin : begin + step] = _least_cosine(chunks[begin : begin + step].float())
    order = torch.sort(worst, dim=0, stable=True).indices[:num_outliers]
    return order.sort(dim=0).values


def _least_cosine(keys: Tensor) -> Tensor:
    """keys float32 [n, chunk, Hkv, d] -> [n, Hkv]."""
    return F.cosine_similarity(keys, keys.mean(dim=1, keepdim=True), dim=-1).amin(dim=1)


def score_landmarks(q: Tensor, landmarks: Tensor, scale: Tensor | None) -> Tensor:
    """See `op.score_landmarks`."""
    num_rows, num_heads, d = q.shape
    n, num_kv_heads, _ = landmarks.shape
    grouped = (q.float() / math.sqrt(d)).view(num_rows, num_kv_heads, -1, d)
    columns = landmarks.float().permute(1, 2, 0)
    scores = torch.stack([torch.bmm(row, columns) for row in grouped])
    if scale is not None:
        scores *= scale.float().T[None, :, None]
    return scores.view(num_rows, num_heads, n)


def select_chunks(
    scores: Tensor, num_kv_heads: int, num_chunks: int, hidden: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """See `op.select_chunks`."""
    num_rows, num_heads, n = scores.shape
    grouped = scores.view(num_rows, num_kv_heads, num_heads // num_kv_heads, n)
    if hidden is not None:
        grouped = grouped.masked_fill(hidden[:, :, None], -torch.inf)
    best = torch.softmax(grouped, dim=-1).amax(dim=2)
    if hidden is not None:
        # softmax underflows to 0 and a row without any chunk gives NaN: both must rank above, not among, the hidden
        best = best.masked_fill(hidden, -1.0)
    order = torch.sort(best, dim=-1, descending=True, stable=True).indices[..., :num_chunks]
    if hidden is None:
        return order.sort(dim=-1).values, None
    valid = ~hidden.expand_as(best).gather(-1, order)
    order, rank = torch.where(valid, order, n).sort(dim=-1)
    return order.clamp(max=max(0, n - 1)), valid.gather(-1, rank)
