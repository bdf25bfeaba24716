"""Launches of the kernels that bring rows back within a step. Nothing here waits for the device."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ...attention_partial.triton import TILE
from ..blocks import RecallKey
from ..tables import RecallTables, Tables
from .launch import DTYPES, MERGE_ITEMS, Attended
from .recall import bring_chunks, rank_hidden, unpack_rows, weigh_chosen

WEIGH_CHUNKS, RANK_CHUNKS, RANK_ENTRIES = 64, 128, 32
UNPACK_COLUMNS = 1024


def bring(
    key: RecallKey,
    recalled: RecallTables,
    tables: Tables,
    attended: Attended,
    positions: Tensor,
    brought: Tensor,
    num_kv_heads: int,
    like: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Bring back what rows that have attended in layer T want.

    Args:
        recalled: of their sequences.
        tables: of the step.
        attended: of the step's rows, in layer T.
        positions: int64 [rows].
        brought: see `StepAttention`.
        like: of the dtype of hidden rows.

    Returns:
        hidden rows [R * n, width]; their positions and places int64 [2, R * n], see `recall`; the step's rows that they
        came for, int64 [R * n], 0 of idle ones.
    """
    jobs, num_jobs = recalled.jobs, len(recalled.jobs)
    keys = _keys(key, recalled, tables, attended, positions, num_kv_heads)
    best = keys.topk(key.most, dim=1).values
    numbers = torch.empty(num_jobs, key.most, dtype=torch.int32, device=jobs.device)
    places = torch.empty(2, key.num_rows * num_jobs, dtype=torch.int64, device=jobs.device)
    rows = torch.empty(key.num_rows * num_jobs, key.width, dtype=like.dtype, device=jobs.device)
    code_bytes, scale_bytes = -(-key.width * key.bits // 8), -(-key.width // key.group) * 2
    record_bytes = -(-key.chunk * (code_bytes + 2 * scale_bytes) // 16) * 16
    block = min(UNPACK_COLUMNS, triton.next_power_of_2(key.width))
    with torch.cuda.device_of(rows):
        bring_chunks[(num_jobs,)](
            jobs, positions, best, numbers, places, brought, num_jobs,
            CHUNK=key.chunk, MOST=key.most, BLOCK_A=max(TILE, key.most), num_warps=1,
        )  # fmt: skip
        unpack_rows[(len(rows), triton.cdiv(key.width, block))](
            jobs, numbers, rows, num_jobs,
            WIDTH=key.width, BITS=key.bits, GROUP=key.group, CHUNK=key.chunk, MOST=key.most, CODE_BYTES=code_bytes,
            SCALE_BYTES=scale_bytes, RECORD_BYTES=record_bytes, BLOCK=block,
        )  # fmt: skip
    return rows, places, jobs[:, 0].clamp_min(0).repeat(key.num_rows)


def _keys(
    key: RecallKey, recalled: RecallTables, tables: Tables, attended: Attended, positions: Tensor, num_kv_heads: int
) -> Tensor:
    """What is wanted, int64 [n, chunks that may come back]."""
    jobs, q, choice = recalled.jobs, attended.q, key.choice
    num_jobs, (_, num_heads, d) = len(jobs), q.shape
    most_chosen, group = attended.chosen.shape[2], num_heads // num_kv_heads
    weights = torch.empty(num_jobs, num_kv_heads, most_chosen, dtype=torch.float32, device=jobs.device)
    keys = torch.empty(num_jobs, recalled.num_hidden, dtype=torch.int64, device=jobs.device)
    with torch.cuda.device_of(q):
        weigh_chosen[(num_jobs, num_kv_heads)](
            jobs, tables.choices[choice][key.layer], tables.ranges, attended.lses, q, attended.chosen, attended.counts,
            weights, most_chosen, 1 / math.sqrt(d),
            DTYPE=DTYPES[choice.dtype], HAS_SCALE=choice.has_scale, HEAD_DIM=d, NUM_KV_HEADS=num_kv_heads, GROUP=group,
            HINT=math.gcd(16, d * choice.dtype.itemsize), WIDE=triton.knobs.runtime.interpret,
            BLOCK_M=max(TILE, triton.next_power_of_2(group)), BLOCK_K=WEIGH_CHUNKS,
            BLOCK_D=max(TILE, triton.next_power_of_2(d)), BLOCK_S=MERGE_ITEMS,
        )  # fmt: skip
        rank_hidden[(num_jobs, triton.cdiv(recalled.num_hidden, RANK_CHUNKS))](
            jobs, positions, attended.chosen, attended.counts, weights, keys, most_chosen, recalled.num_hidden,
            NUM_KV_HEADS=num_kv_heads, CHUNK=key.chunk, BLOCK_N=RANK_CHUNKS, BLOCK_K=RANK_ENTRIES,
        )  # fmt: skip
    return keys
