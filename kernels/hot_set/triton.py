"""Kernels of the hot set: which slots the chosen chunks have or get, and the copy of those that are missing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .op import HotBuffers
from .records import HotKey

# fields of a row of the table
PAGES, PAGE_CHUNKS, NUM_CHUNKS, SLOTS, HELD, USED, NUM_SLOTS, ROWS = (tl.constexpr(i) for i in range(8))
FIELDS: tl.constexpr = tl.constexpr(10)
HOT_ADDRESSES = (0, 3, 4, 5, 7, 8, 9)
OLDEST: tl.constexpr = tl.constexpr(254)

FETCH_BYTES, AT_ONCE_BYTES = 8192, 4096  # that a program has under way; where all moves are made at once
FETCH_PROGRAMS, FETCH_PARTS = 64, 8
FEW_PAIRS, FEW_PARTS = 16, 64  # KV heads of all rows, and parts of each, that are copied at once


@triton.jit
def _reached(ages, least, step):
    """How many ages reach `least` and one, two and three steps more; fewer than 2^21 each, so that one sum counts all
    three."""
    one, two, three = ages >= least + step, ages >= least + 2 * step, ages >= least + 3 * step
    sums = tl.sum(one.to(tl.int64) + (two.to(tl.int64) << 21) + (three.to(tl.int64) << 42), 0)
    return (sums & 0x1FFFFF).to(tl.int32), ((sums >> 21) & 0x1FFFFF).to(tl.int32), (sums >> 42).to(tl.int32)


@triton.jit
def _victims(used, num_slots, clock, wanted, BLOCK_S: tl.constexpr):
    """Bool [BLOCK_S]: the `wanted` slots that have not been used for longest, and which place each of them takes.

    The age that as many slots reach as are wanted is found two bits a pass. Slots of this step have age 0, and there
    are enough of others."""
    slots = tl.arange(0, BLOCK_S)
    last = tl.load(used + slots, mask=slots < num_slots, other=0)
    ages = tl.where(last < 0, OLDEST + 1, tl.minimum(clock - last, OLDEST))
    ages = tl.where(slots < num_slots, ages, -1)
    least, num_older = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for shift in tl.static_range(0, 4):
        step = 64 >> (2 * shift)
        one, two, three = _reached(ages, least, step)
        num_older = tl.where(
            one < wanted, one, tl.where(two < wanted, two, tl.where(three < wanted, three, num_older))
        )  # fmt: skip
        reached = (one >= wanted).to(tl.int32) + (two >= wanted).to(tl.int32) + (three >= wanted).to(tl.int32)
        least += step * reached
    older, tied = ages > least, ages == least
    left = wanted - num_older
    orders = tl.cumsum(older.to(tl.int32) + (tied.to(tl.int32) << 16), 0)  # slots are numbers of 16 bits
    num_tied = orders >> 16
    take = older | (tied & (num_tied <= left))
    return take, (orders & 0xFFFF) + tl.minimum(num_tied, left) - 1


@triton.jit(do_not_specialize=["most_chosen"])
def place_chunks(
    table_ptr, chosen_ptr, counts_ptr, places_ptr, moves_ptr, num_moves_ptr, totals_ptr, most_chosen,
    NUM_KV_HEADS: tl.constexpr, COUNTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid: rows, KV heads. Shapes: see `op.fetch_chosen`."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at, pair = table_ptr + row * FIELDS, row * NUM_KV_HEADS + head
    entry, slots = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_S)
    # what does not depend on each other is loaded before the first branch, all at once
    num_slots, num_chunks = tl.load(at + NUM_SLOTS), tl.load(at + NUM_CHUNKS)
    given = entry < tl.minimum(tl.load(counts_ptr + pair), most_chosen)
    chunk = tl.load(chosen_ptr + pair * most_chosen + entry, mask=entry < most_chosen, other=0).to(tl.int64)
    slot_of = tl.load(at + SLOTS).to(tl.pointer_type(tl.int16)) + head
    held = tl.load(at + HELD).to(tl.pointer_type(tl.int32)) + head * num_slots
    used = tl.load(at + USED).to(tl.pointer_type(tl.int32)) + head * (num_slots + 1)
    if num_slots == 0:
        tl.store(num_moves_ptr + pair, 0)
        return
    mine = given & (chunk < num_chunks)
    slot = tl.load(slot_of + chunk * NUM_KV_HEADS, mask=mine, other=-1).to(tl.int32)
    clock = tl.load(used + num_slots) + 1
    before = tl.load(held + slots, mask=slots < num_slots, other=-1).to(tl.int64)
    here, missing = mine & (slot >= 0), mine & (slot < 0)
    tl.store(places_ptr + pair * most_chosen + entry, slot, mask=here)
    tl.store(used + slot, clock, mask=here)
    order = tl.cumsum(missing.to(tl.int32), 0) - 1
    # no more chosen chunks than slots, which are numbers of 16 bits
    sums = tl.sum(missing.to(tl.int32) + (mine.to(tl.int32) << 16), 0)
    num_missing = sums & 0xFFFF
    tl.store(num_moves_ptr + pair, num_missing)
    tl.debug_barrier()  # what one thread has written others read
    take, place = _victims(used, num_slots, clock, num_missing, BLOCK_S)
    new_chunks = moves_ptr + pair * 2 * most_chosen
    new_slots = new_chunks + most_chosen
    tl.store(new_slots + place, slots, mask=take)
    tl.store(slot_of + before * NUM_KV_HEADS, tl.full([BLOCK_S], -1, tl.int16), mask=take & (before >= 0))
    tl.store(new_chunks + order, chunk.to(tl.int32), mask=missing)
    tl.debug_barrier()
    taken = tl.load(new_slots + order, mask=missing, other=0)
    tl.store(places_ptr + pair * most_chosen + entry, taken, mask=missing)
    tl.store(slot_of + chunk * NUM_KV_HEADS, taken.to(tl.int16), mask=missing)
    tl.store(held + taken, chunk.to(tl.int32), mask=missing)
    tl.store(used + taken, clock, mask=missing)
    tl.store(used + num_slots, clock)
    if COUNTS:
        tl.atomic_add(totals_ptr, (sums >> 16).to(tl.int64))
        tl.atomic_add(totals_ptr + 1, num_missing.to(tl.int64))


@triton.jit
def _store_rows(
    data, units, real, slot, head, base, BEGIN: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
):  # fmt: skip
    """The part of records that begins at BEGIN, CHUNK rows of WIDTH units of 2 bytes each, to its tensor."""
    local = units - BEGIN
    mask = real[:, None] & ((local >= 0) & (local < CHUNK * WIDTH))[None, :]
    row = slot[:, None].to(tl.int64) * CHUNK + (local // WIDTH)[None, :]
    places = (row * NUM_KV_HEADS + head) * WIDTH + (local % WIDTH)[None, :]
    tl.store(base.to(tl.pointer_type(tl.int16)) + places, data, mask=mask)


@triton.jit
def _fetch_some(
    table, new_chunks, new_slots, first, num_moves, most_chosen, head,
    NUM_KV_HEADS: tl.constexpr, CHUNK: tl.constexpr, WIDTHS: tl.constexpr, UNITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Copy the records of moves `first`… of one KV head. `table` is its row's."""
    move, units = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_U)
    real = move < num_moves
    # so that nothing waits for their number, what lies behind the last move is loaded too
    chunk = tl.load(new_chunks + move, mask=move < most_chosen, other=0).to(tl.int64)
    slot = tl.load(new_slots + move, mask=move < most_chosen, other=0)
    page_chunks = tl.maximum(tl.load(table + PAGE_CHUNKS), 1)  # 0 for rows that have nothing on the host
    pages = tl.load(table + PAGES).to(tl.pointer_type(tl.int64))
    page = tl.load(pages + chunk // page_chunks, mask=real, other=0)
    place = ((chunk % page_chunks) * NUM_KV_HEADS + head) * (UNITS * 2)
    records = tl.multiple_of((page + place).to(tl.pointer_type(tl.int16)), 16)
    data = tl.load(records[:, None] + units[None, :], mask=real[:, None] & (units < UNITS)[None, :], other=0)
    begin_1: tl.constexpr = CHUNK * WIDTHS[0]
    begin_2: tl.constexpr = begin_1 + CHUNK * WIDTHS[1]
    _store_rows(data, units, real, slot, head, tl.load(table + ROWS), 0, WIDTHS[0], CHUNK, NUM_KV_HEADS)
    if WIDTHS[1] > 0:
        _store_rows(data, units, real, slot, head, tl.load(table + ROWS + 1), begin_1, WIDTHS[1], CHUNK, NUM_KV_HEADS)
    if WIDTHS[2] > 0:
        _store_rows(data, units, real, slot, head, tl.load(table + ROWS + 2), begin_2, WIDTHS[2], CHUNK, NUM_KV_HEADS)


@triton.jit(do_not_specialize=["most_chosen", "num_pairs"])
def fetch_chunks(
    table_ptr, moves_ptr, num_moves_ptr, most_chosen, num_pairs,
    NUM_KV_HEADS: tl.constexpr, CHUNK: tl.constexpr, WIDTHS: tl.constexpr, UNITS: tl.constexpr, AT_ONCE: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Copy records from host memory to their slots. Units are 2 bytes; WIDTHS are those of a row of each tensor, 0 for
    tensors that are not there.

    Grid: as many programs as keep the bus busy, which leaves the processors to what is computed meanwhile. They go
    through the KV heads of all rows in order, PARTS of them at a time on each head, so that what is read at once lies
    in few pages, whose addresses the device has at hand. AT_ONCE: there is a program for every part of every head, and
    it makes all of the part's moves at once."""
    if AT_ONCE:
        pair, part = tl.program_id(0).to(tl.int64) // PARTS, tl.program_id(0) % PARTS
        row, head = pair // NUM_KV_HEADS, pair % NUM_KV_HEADS
        new_chunks = moves_ptr + pair * 2 * most_chosen
        _fetch_some(
            table_ptr + row * FIELDS, new_chunks, new_chunks + most_chosen, part * BLOCK_M,
            tl.load(num_moves_ptr + pair), most_chosen, head, NUM_KV_HEADS, CHUNK, WIDTHS, UNITS, BLOCK_M, BLOCK_U,
        )  # fmt: skip
        return
    for start in range(0, num_pairs * PARTS, tl.num_programs(0)):
        work = start + tl.program_id(0).to(tl.int64)
        pair = work // PARTS
        row, head = pair // NUM_KV_HEADS, pair % NUM_KV_HEADS
        num_moves = tl.load(num_moves_ptr + pair, mask=pair < num_pairs, other=0)
        new_chunks = moves_ptr + pair * 2 * most_chosen
        for first in range(work % PARTS * BLOCK_M, num_moves, PARTS * BLOCK_M):
            _fetch_some(
                table_ptr + row * FIELDS, new_chunks, new_chunks + most_chosen, first, num_moves, most_chosen, head,
                NUM_KV_HEADS, CHUNK, WIDTHS, UNITS, BLOCK_M, BLOCK_U,
            )  # fmt: skip


def fetch(
    key: HotKey,
    table: Tensor,
    chosen: Tensor,
    counts: Tensor,
    places: Tensor,
    totals: Tensor | None,
    most_slots: int,
    buffers: HotBuffers,
) -> None:
    """See `op.fetch_chosen`."""
    num_rows, num_kv_heads, most = chosen.shape
    widths = tuple(nbytes // 2 for nbytes in key.row_nbytes)
    units = key.record_nbytes // 2
    block_u, block_s = triton.next_power_of_2(units), triton.next_power_of_2(most_slots)
    pairs = num_rows * num_kv_heads
    moves = max(1, AT_ONCE_BYTES // (2 * block_u))
    at_once = pairs <= FEW_PAIRS and most <= FEW_PARTS * moves
    if not at_once:
        moves = max(1, FETCH_BYTES // (2 * block_u))
    with torch.cuda.device_of(chosen):
        place_chunks[(num_rows, num_kv_heads)](
            table, chosen, counts, places, buffers.moves, buffers.num_moves, counts if totals is None else totals, most,
            NUM_KV_HEADS=num_kv_heads, COUNTS=totals is not None, BLOCK_K=triton.next_power_of_2(most),
            BLOCK_S=block_s, num_warps=min(16, max(8 if at_once else 4, block_s // 256)),
        )  # fmt: skip
        parts = triton.cdiv(most, moves) if at_once else FETCH_PARTS
        fetch_chunks[(pairs * parts if at_once else min(FETCH_PROGRAMS, pairs * parts),)](
            table, buffers.moves, buffers.num_moves, most, pairs,
            NUM_KV_HEADS=num_kv_heads, CHUNK=key.chunk, WIDTHS=(*widths, 0, 0)[:3], UNITS=units, AT_ONCE=at_once,
            PARTS=parts, BLOCK_M=moves, BLOCK_U=block_u, num_warps=4,
        )  # fmt: skip
