"""The chunks of `held.HeldSelection`, for all rows of a step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernels.step_attention.triton.choose import CHOICE_FIELDS, COUNT, COUNT_B, WANTED


@triton.jit(do_not_specialize=["place", "seed", "most_chosen"])
def _hold(
    table_ptr, chosen_ptr, counts_ptr, moved_millis_ptr, place, seed, most_chosen,
    NUM_KV_HEADS: tl.constexpr, STRIDE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: rows, KV heads. See `held.HeldSelection`. Chunks are the prompt's where it has enough: those of generated
    rows become more, and with every seal the stretches would be others."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at, pair = table_ptr + row * CHOICE_FIELDS, row * NUM_KV_HEADS + head
    if tl.load(at + WANTED) == 0:
        return
    num_chunks = tl.load(at + COUNT)
    count = tl.load(counts_ptr + pair).to(tl.int64)
    if num_chunks < count:
        num_chunks += tl.load(at + COUNT_B)
    entry = tl.arange(0, BLOCK_K).to(tl.int64)
    some = tl.maximum(count, 1)  # entries behind the last one are not stored, and none may divide by zero
    turn = entry * STRIDE % some
    moves = ((count * tl.load(moved_millis_ptr) + 500) // 1000 + some - 1 - turn) // some
    first, end = entry * num_chunks // some, (entry + 1) * num_chunks // some
    begin = (pair + 1) * 1_000_003 + place.to(tl.int64) * 7919 + seed * 104_729 + entry * STRIDE
    chunk = first + (begin + moves) % tl.maximum(end - first, 1)
    tl.store(chosen_ptr + pair * most_chosen + entry, chunk.to(tl.int32), mask=entry < count)


def hold(
    table: Tensor, chosen: Tensor, counts: Tensor, moved_millis: Tensor, place: int, seed: int, stride: int
) -> None:
    """Overwrite the chosen chunks int32 [rows, Hkv, K] of the rows of a table of choices."""
    num_rows, num_kv_heads, most = chosen.shape
    with torch.cuda.device_of(chosen):
        _hold[(num_rows, num_kv_heads)](
            table, chosen, counts, moved_millis, place, seed, most,
            NUM_KV_HEADS=num_kv_heads, STRIDE=stride, BLOCK_K=triton.next_power_of_2(most),
        )  # fmt: skip
