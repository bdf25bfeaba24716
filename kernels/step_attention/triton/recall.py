"""Which chunks of hidden rows a step brings back, and the rows themselves. Nothing waits for the device.

jobs int64 [n, JOB_FIELDS]     one a sequence, see `..recalled`; row -1 = idle
weights float32 [n, Hkv, K]    what the row gives each chunk that it attends to, mean over all heads
keys int64 [n, N]              of every chunk that may come back: that sum's bits, above a number that is less for
                               later chunks; 0 where it is not wanted. So the largest keys are the best chunks.
numbers int32 [n, MOST]        what comes back, ascending, then -1
places int64 [2, R, n]         of the r-th row of every sequence its position, and its row in the region of what is
                               here; -1 where none came back
"""

from __future__ import annotations

import triton
import triton.language as tl

from .choose import CHOICE_FIELDS, COUNT, LANDMARKS, LANDMARKS_B, SCALES, SCALES_B
from .tiles import product

ROW, STATE, IDS, HERE, CHUNKS, NUM_HIDDEN, FIRST_ID, A_ROW, CAPACITY, NUM_SLOTS = (tl.constexpr(i) for i in range(10))
CODES, SCALE, MINIMUM, PAGES, PAGE_CHUNKS, CHOSEN, NUM_CHOSEN = (tl.constexpr(i) for i in range(10, 17))
JOB_FIELDS: tl.constexpr = tl.constexpr(17)
JOB_ADDRESSES = (1, 2, 3, 4, 10, 11, 12, 13)
END, JOINED, FIRST, BEFORE, LAST, DISPLACED = (tl.constexpr(i) for i in range(6))
STATE_FIELDS: tl.constexpr = tl.constexpr(6)
FAR: tl.constexpr = tl.constexpr(1 << 30)
NUMBERS: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _log_sum(lses_ptr, first, count, head, pairs, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
             BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """float32 [BLOCK_M]: of a group of heads the logarithm of the sum over partial results."""
    peak, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, count, BLOCK_S):
        places = start + tl.arange(0, BLOCK_S)
        at = ((first + places) * NUM_KV_HEADS + head)[None, :] * GROUP + pairs[:, None]
        mask = (places < count)[None, :] & (pairs < GROUP)[:, None]
        lses = tl.load(lses_ptr + at, mask=mask, other=float("-inf"))
        next_peak = tl.maximum(peak, tl.max(lses, 1))
        shift = tl.where(next_peak == float("-inf"), 0.0, next_peak)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(lses - shift[:, None]), 1)
        peak = next_peak
    return tl.where(total > 0, peak + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))


@triton.jit
def _chosen_scores(
    at, q, chosen, start, count, head, scale, DTYPE: tl.constexpr, HAS_SCALE: tl.constexpr, HEAD_DIM: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, HINT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_M, BLOCK_K], q . landmark * scale of chosen chunks; -inf behind the last one. `at` is the row of a
    table of choices."""
    entry, dims = start + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    inside, count_a = entry < count, tl.load(at + COUNT)
    chunk = tl.load(chosen + entry, mask=inside, other=0).to(tl.int64)
    later = chunk >= count_a
    local = tl.where(later, chunk - count_a, chunk) * NUM_KV_HEADS + head
    row_bytes: tl.constexpr = HEAD_DIM * (DTYPE.primitive_bitwidth // 8)
    rows = tl.where(later, tl.load(at + LANDMARKS_B), tl.load(at + LANDMARKS)) + local * row_bytes
    rows = tl.multiple_of(rows.to(tl.pointer_type(DTYPE)), HINT)
    means = tl.load(rows[:, None] + dims[None, :], mask=inside[:, None] & (dims < HEAD_DIM)[None, :], other=0)
    found = product(q, tl.trans(means.to(q.dtype)), tl.zeros([BLOCK_M, BLOCK_K], tl.float32), WIDE) * scale
    if HAS_SCALE:
        steps = tl.where(later, tl.load(at + SCALES_B), tl.load(at + SCALES)) + local * 2
        found = found * tl.load(steps.to(tl.pointer_type(tl.float16)), mask=inside, other=0.0).to(tl.float32)[None, :]
    return tl.where(inside[None, :], found, float("-inf"))


@triton.jit(do_not_specialize=["most_chosen"])
def weigh_chosen(
    jobs_ptr, choices_ptr, ranges_ptr, lses_ptr, q_ptr, chosen_ptr, counts_ptr, weights_ptr, most_chosen, scale,
    DTYPE: tl.constexpr, HAS_SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, HINT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """What a row gives the chunks that it attends to: what all of them got of its whole attention, shared out by the
    scores that chose them. Grid: jobs, KV heads."""
    job, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    of, row = jobs_ptr + job * JOB_FIELDS, tl.load(jobs_ptr + job * JOB_FIELDS + ROW)
    if row < 0:
        return
    pairs, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    first, pair = tl.load(ranges_ptr + row * 2), row * NUM_KV_HEADS + head
    whole = _log_sum(
        lses_ptr, first, tl.load(ranges_ptr + row * 2 + 1), head, pairs, NUM_KV_HEADS, GROUP, BLOCK_S, BLOCK_M
    )
    own = _log_sum(
        lses_ptr, first + tl.load(of + CHOSEN), tl.load(of + NUM_CHOSEN), head, pairs, NUM_KV_HEADS, GROUP, BLOCK_S,
        BLOCK_M,
    )  # fmt: skip
    mask = (pairs < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + (pair * GROUP + pairs)[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
    at, chosen, count = choices_ptr + row * CHOICE_FIELDS, chosen_ptr + pair * most_chosen, tl.load(counts_ptr + pair)
    peak, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, count, BLOCK_K):
        scores = _chosen_scores(
            at, q, chosen, start, count, head, scale, DTYPE, HAS_SCALE, HEAD_DIM, NUM_KV_HEADS, HINT, WIDE, BLOCK_M,
            BLOCK_K, BLOCK_D,
        )  # fmt: skip
        next_peak = tl.maximum(peak, tl.max(scores, 1))
        total = total * tl.exp(peak - next_peak) + tl.sum(tl.exp(scores - next_peak[:, None]), 1)
        peak = next_peak
    # what lies behind the last head, and a region that gives nothing, have no finite sum to subtract
    share = tl.exp(own - tl.where(whole == float("-inf"), 0.0, whole))
    share = share / tl.where(total > 0, total, 1.0) / (NUM_KV_HEADS * GROUP)
    for start in range(0, count, BLOCK_K):
        scores = _chosen_scores(
            at, q, chosen, start, count, head, scale, DTYPE, HAS_SCALE, HEAD_DIM, NUM_KV_HEADS, HINT, WIDE, BLOCK_M,
            BLOCK_K, BLOCK_D,
        )  # fmt: skip
        entry = start + tl.arange(0, BLOCK_K)
        weights = tl.sum(share[:, None] * tl.exp(scores - peak[:, None]), 0)
        tl.store(weights_ptr + (job * NUM_KV_HEADS + head) * most_chosen + entry, weights, mask=entry < count)


@triton.jit(do_not_specialize=["most_chosen", "most_hidden"])
def rank_hidden(
    jobs_ptr, positions_ptr, chosen_ptr, counts_ptr, weights_ptr, keys_ptr, most_chosen, most_hidden,
    NUM_KV_HEADS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A chunk is wanted that is not here, and gets more than if the row attended to all positions alike. Grid: jobs,
    blocks of chunks that may come back."""
    job = tl.program_id(0).to(tl.int64)
    of, row = jobs_ptr + job * JOB_FIELDS, tl.load(jobs_ptr + job * JOB_FIELDS + ROW)
    number = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    keys, mask = keys_ptr + job * most_hidden + number, number < most_hidden
    if row < 0:
        tl.store(keys, tl.zeros([BLOCK_N], tl.int64), mask=mask)
        return
    is_there = number < tl.load(of + NUM_HIDDEN)
    ids = tl.load(tl.load(of + CHUNKS).to(tl.pointer_type(tl.int32)) + number, mask=is_there, other=0)
    here = tl.load(tl.load(of + HERE).to(tl.pointer_type(tl.uint8)) + number, mask=is_there, other=1)
    place, mass = ids - tl.load(of + FIRST_ID).to(tl.int32), tl.zeros([BLOCK_N], tl.float32)
    for head in range(NUM_KV_HEADS):
        pair, count = row * NUM_KV_HEADS + head, tl.load(counts_ptr + row * NUM_KV_HEADS + head)
        for start in range(0, count, BLOCK_K):
            entry = start + tl.arange(0, BLOCK_K)
            chunk = tl.load(chosen_ptr + pair * most_chosen + entry, mask=entry < count, other=-1)
            weights = weights_ptr + (job * NUM_KV_HEADS + head) * most_chosen + entry
            weight = tl.load(weights, mask=entry < count, other=0.0)
            mass += tl.sum(tl.where(place[:, None] == chunk[None, :], weight[None, :], 0.0), 1)
    alike = CHUNK / (tl.load(positions_ptr + row) + 1).to(tl.float32)
    wanted = is_there & (here == 0) & (mass > alike)
    key = (mass.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (-number + NUMBERS).to(tl.int64)
    tl.store(keys, tl.where(wanted, key, 0), mask=mask)


@triton.jit
def _store_places(places_ptr, order, slot, ids, valid, job, num_jobs, CHUNK: tl.constexpr, MOST: tl.constexpr, lane):
    """Positions and places of the rows of chunks, whether they are there or not."""
    for offset in tl.static_range(CHUNK):
        at = places_ptr + (order * CHUNK + offset) * num_jobs + job
        tl.store(at, tl.where(valid, ids * CHUNK + offset, -1), mask=lane < MOST)
        tl.store(at + MOST * CHUNK * num_jobs, tl.where(valid, slot * CHUNK + offset, -1), mask=lane < MOST)


@triton.jit(do_not_specialize=["num_jobs"])
def bring_chunks(
    jobs_ptr, positions_ptr, best_ptr, numbers_ptr, places_ptr, brought_ptr, num_jobs,
    CHUNK: tl.constexpr, MOST: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """Bring back the best chunks, keys [n, MOST] in falling order, and have the oldest make room. Grid: jobs.

    brought int64 [rows]: rows that ever came back to a row's sequence."""
    job, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_A)
    of, row = jobs_ptr + job * JOB_FIELDS, tl.load(jobs_ptr + job * JOB_FIELDS + ROW)
    nothing = tl.zeros([BLOCK_A], tl.int64)
    if row < 0:
        tl.store(numbers_ptr + job * MOST + lane, tl.full([BLOCK_A], -1, tl.int32), mask=lane < MOST)
        _store_places(places_ptr, lane, nothing, nothing, lane < 0, job, num_jobs, CHUNK, MOST, lane)
        return
    key = tl.load(best_ptr + job * MOST + lane, mask=lane < tl.minimum(tl.load(of + A_ROW), MOST), other=0)
    valid, number = key > 0, -(key & NUMBERS) + NUMBERS
    count = tl.sum(valid.to(tl.int32), 0)
    # wanted ones come first among the keys, and lie in the order of their numbers
    before = tl.sum((valid[None, :] & (number[None, :] < number[:, None])).to(tl.int32), 1)
    order = tl.where(valid, before, lane)
    state, num_slots = tl.load(of + STATE).to(tl.pointer_type(tl.int64)), tl.load(of + NUM_SLOTS)
    ids_at, here = tl.load(of + IDS).to(tl.pointer_type(tl.int32)), tl.load(of + HERE).to(tl.pointer_type(tl.uint8))
    end, first, position = tl.load(state + END), tl.load(state + FIRST), tl.load(positions_ptr + row)
    was_first, last, displaced = tl.load(state + BEFORE), tl.load(state + LAST), tl.load(state + DISPLACED)
    next_first = tl.maximum(first, end + count - tl.load(of + CAPACITY))
    gone, gone_slot = first + lane < next_first, (first + lane) % num_slots
    gone_number = tl.load(state + STATE_FIELDS + gone_slot * 2, mask=gone, other=0)
    ids = tl.load(tl.load(of + CHUNKS).to(tl.pointer_type(tl.int32)) + number, mask=valid, other=0)
    tl.debug_barrier()  # what one thread writes others have read
    tl.store(here + gone_number, tl.zeros([BLOCK_A], tl.uint8), mask=gone)
    tl.store(ids_at + gone_slot, tl.full([BLOCK_A], FAR, tl.int32), mask=gone)
    slot = (end + order) % num_slots
    tl.store(here + number, tl.full([BLOCK_A], 1, tl.uint8), mask=valid)
    tl.store(ids_at + slot, ids, mask=valid)
    tl.store(state + STATE_FIELDS + slot * 2, number, mask=valid)
    tl.store(state + STATE_FIELDS + slot * 2 + 1, position + nothing, mask=valid)
    tl.store(state + END, end + count)
    tl.store(state + JOINED, end)
    tl.store(state + FIRST, next_first)
    tl.store(state + BEFORE, first)
    tl.store(state + LAST, position)
    # what the step before displaced is not remembered any more
    tl.store(state + DISPLACED, tl.where(was_first < first, tl.maximum(displaced, last), displaced))
    tl.store(brought_ptr + row, (end + count) * CHUNK)
    numbers = tl.where(valid, number, -1).to(tl.int32)
    tl.store(numbers_ptr + job * MOST + order, numbers, mask=lane < MOST)
    _store_places(places_ptr, order, slot, ids.to(tl.int64), valid, job, num_jobs, CHUNK, MOST, lane)


@triton.jit
def _row_places(of, number, offset, CHUNK: tl.constexpr, CODE_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr,
                RECORD_BYTES: tl.constexpr):  # fmt: skip
    """Byte addresses of a hidden row's codes, scales and minima, on the device or in a page of host memory."""
    pages, page_chunks = tl.load(of + PAGES), tl.maximum(tl.load(of + PAGE_CHUNKS), 1)
    row = number * CHUNK + offset
    codes, scale = tl.load(of + CODES) + row * CODE_BYTES, tl.load(of + SCALE) + row * SCALE_BYTES
    minimum = tl.load(of + MINIMUM) + row * SCALE_BYTES
    if pages != 0:
        page = tl.load(pages.to(tl.pointer_type(tl.int64)) + number // page_chunks)
        record = page + number % page_chunks * RECORD_BYTES
        codes = record + offset * CODE_BYTES
        scale = record + CHUNK * CODE_BYTES + offset * SCALE_BYTES
        minimum = scale + CHUNK * SCALE_BYTES
    return codes, scale, minimum


@triton.jit(do_not_specialize=["num_jobs"])
def unpack_rows(
    jobs_ptr, numbers_ptr, out_ptr, num_jobs,
    WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, MOST: tl.constexpr,
    CODE_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, RECORD_BYTES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Hidden rows [R * n, WIDTH] of what comes back, in the order of `places`; zeros where nothing does. Grid: rows,
    blocks of columns."""
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    job, place = row % num_jobs, row // num_jobs
    number = tl.load(numbers_ptr + job * MOST + place // CHUNK).to(tl.int64)
    out, inside = tl.zeros([BLOCK], tl.float32), columns < WIDTH
    if number >= 0:
        of = jobs_ptr + job * JOB_FIELDS
        at = _row_places(of, number, place % CHUNK, CHUNK, CODE_BYTES, SCALE_BYTES, RECORD_BYTES)
        codes, scale, minimum = at
        packed = tl.load(codes.to(tl.pointer_type(tl.uint8)) + columns * BITS // 8, mask=inside, other=0).to(tl.int32)
        code = (packed >> (columns * BITS % 8)) & ((1 << BITS) - 1)
        steps = tl.load(scale.to(tl.pointer_type(tl.float16)) + columns // GROUP, mask=inside, other=0.0)
        lows = tl.load(minimum.to(tl.pointer_type(tl.float16)) + columns // GROUP, mask=inside, other=0.0)
        out = code.to(tl.float32) * steps.to(tl.float32) + lows.to(tl.float32)
    tl.store(out_ptr + row * WIDTH + columns, out.to(out_ptr.dtype.element_ty), mask=inside)
