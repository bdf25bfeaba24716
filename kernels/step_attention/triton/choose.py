"""Choosing chunks: landmarks are scored, scores ranked, and the best of every KV head listed in ascending order.

    table int64 [rows, CHOICE_FIELDS]   each row's landmarks, by address
    scores float32 [rows, H, C]         q . landmark / sqrt(d)
    peaks float32 [rows, H, blocks, 2]  of every block of chunks its largest score and sum of exponentials
    ranks float32 [rows, Hkv, C]        softmax over the chunks, maximum over the group; -1 where a chunk is hidden

C is rounded up to PITCH, so that rows of scores and ranks begin where wide loads may. Nothing waits for the device, and
a row's chunks depend on its own numbers alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import product

# fields of a row; the second of two segments has names with _B
LANDMARKS, SCALES, COUNT, INDEX, FIRST = (tl.constexpr(i) for i in range(5))
LANDMARKS_B, SCALES_B, COUNT_B, FIRST_B = (tl.constexpr(i) for i in range(5, 9))
WANTED, HIDDEN, NUM_HIDDEN = (tl.constexpr(i) for i in range(9, 12))
KEPT, STATE, EVERY = (tl.constexpr(i) for i in range(12, 15))
CHOICE_FIELDS: tl.constexpr = tl.constexpr(15)
PITCH: tl.constexpr = tl.constexpr(32)
CHOICE_ADDRESSES = (0, 1, 3, 5, 6, 10, 12, 13)


@triton.jit
def _is_kept(at, head, position):
    """Whether the row attends to what was chosen before: its block of positions has had its choice."""
    every, state = tl.load(at + EVERY), tl.load(at + STATE)
    last = tl.load(state.to(tl.pointer_type(tl.int32)) + head * 2 + 1, mask=state != 0, other=-1).to(tl.int64)
    return (last >= 0) & (last // tl.maximum(every, 1) == position // tl.maximum(every, 1))


@triton.jit
def _last_positions(at, local, later, inside, CHUNK: tl.constexpr):
    """Positions int64 [C] of the last rows of chunks `local` of the first segment or, where `later`, of the second."""
    ids = tl.where(later, tl.load(at + FIRST_B), tl.load(at + FIRST)) + local
    index = tl.load(at + INDEX)
    if index != 0:
        named = tl.load(index.to(tl.pointer_type(tl.int32)) + local, mask=inside & (later == 0), other=0)
        ids = tl.where(later, ids, named.to(tl.int64))
    return ids * CHUNK + (CHUNK - 1)


@triton.jit
def _is_hidden(at, chunk, head, NUM_KV_HEADS: tl.constexpr, BLOCK_O: tl.constexpr):
    """int32 [C], 1 for chunks that are attended to anyway."""
    places, num_hidden = tl.arange(0, BLOCK_O), tl.load(at + NUM_HIDDEN)
    hidden = tl.load(at + HIDDEN).to(tl.pointer_type(tl.int32))
    hidden = tl.load(hidden + places * NUM_KV_HEADS + head, mask=places < num_hidden, other=-1)
    return tl.max((chunk[:, None] == hidden[None, :]).to(tl.int32), 1)


@triton.jit
def _visible(
    at, chunk, local, later, inside, head, position, window, HAS_WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Bool [C]: chunks that may be chosen."""
    out = inside
    if HAS_WINDOW:
        out = out & (_last_positions(at, local, later, inside, CHUNK) > position - window)
    if BLOCK_O > 0:
        out = out & (_is_hidden(at, chunk, head, NUM_KV_HEADS, BLOCK_O) == 0)
    return out


@triton.jit
def _either(at, FIELD: tl.constexpr, FIELD_B: tl.constexpr):
    """Two addresses of a row's table, one of each segment."""
    return tl.load(at + FIELD), tl.load(at + FIELD_B)


@triton.jit(do_not_specialize=["most_chunks", "window"])
def score_chunks(
    table_ptr, q_ptr, positions_ptr, scores_ptr, peaks_ptr, most_chunks, window, scale,
    DTYPE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HINT: tl.constexpr, WIDE: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Grid: rows, KV heads, STEPS blocks of chunks each. BLOCK_O = 0: no row has hidden chunks."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at, position = table_ptr + row * CHOICE_FIELDS, tl.load(positions_ptr + row)
    if _is_kept(at, head, position):
        return
    count_a = tl.load(at + COUNT)
    count, begin = count_a + tl.load(at + COUNT_B), tl.program_id(2).to(tl.int64) * (STEPS * BLOCK_C)
    most_chunks = most_chunks // PITCH * PITCH  # which the compiler then knows to be a multiple
    pairs, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    is_pair, heads = pairs < GROUP, (row * NUM_KV_HEADS + head) * GROUP + pairs
    q_mask = is_pair[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + heads[:, None] * HEAD_DIM + dims[None, :], mask=q_mask, other=0.0)
    means_at, scales_at = _either(at, LANDMARKS, LANDMARKS_B), _either(at, SCALES, SCALES_B)
    row_bytes: tl.constexpr = HEAD_DIM * (DTYPE.primitive_bitwidth // 8)
    peak, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for start in range(begin, tl.minimum(begin + STEPS * BLOCK_C, count), BLOCK_C):
        chunk = start + tl.arange(0, BLOCK_C)
        inside, later = chunk < count, chunk >= count_a
        local = tl.where(later, chunk - count_a, chunk)
        rows = tl.where(later, means_at[1], means_at[0]) + (local * NUM_KV_HEADS + head) * row_bytes
        rows = tl.multiple_of(rows.to(tl.pointer_type(DTYPE)), HINT)
        means = tl.load(rows[:, None] + dims[None, :], mask=inside[:, None] & (dims < HEAD_DIM)[None, :], other=0)
        # int8 and bfloat16 numbers are exact in the queries' dtype
        found = product(q, tl.trans(means.to(q.dtype)), tl.zeros([BLOCK_M, BLOCK_C], tl.float32), WIDE) * scale
        if HAS_SCALE:
            steps = tl.where(later, scales_at[1], scales_at[0]) + (local * NUM_KV_HEADS + head) * 2
            steps = steps.to(tl.pointer_type(tl.float16))
            found = found * tl.load(steps, mask=inside, other=0.0).to(tl.float32)[None, :]
        visible = _visible(
            at, chunk, local, later, inside, head, position, window, HAS_WINDOW, CHUNK, NUM_KV_HEADS, BLOCK_O
        )
        found = tl.where(visible[None, :], found, float("-inf"))
        places = scores_ptr + heads[:, None] * most_chunks + chunk[None, :]
        tl.store(places, found, mask=is_pair[:, None] & (chunk < most_chunks)[None, :])
        next_peak = tl.maximum(peak, tl.max(found, 1))
        shift = tl.where(next_peak == float("-inf"), 0.0, next_peak)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(found - shift[:, None]), 1)
        peak = next_peak
    peak_at = (heads * tl.num_programs(2) + tl.program_id(2)) * 2
    tl.store(peaks_ptr + peak_at, peak, mask=is_pair)
    tl.store(peaks_ptr + peak_at + 1, total, mask=is_pair)


@triton.jit(do_not_specialize=["most_chunks", "num_peaks"])
def rank_chunks(
    table_ptr, positions_ptr, scores_ptr, peaks_ptr, ranks_ptr, most_chunks, num_peaks,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Grid: rows, KV heads, blocks of chunks."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = table_ptr + row * CHOICE_FIELDS
    count = tl.load(at + COUNT) + tl.load(at + COUNT_B)
    first = tl.program_id(2) * BLOCK_C
    if first >= count or _is_kept(at, head, tl.load(positions_ptr + row)):
        return
    chunk, most_chunks = first + tl.arange(0, BLOCK_C), most_chunks // PITCH * PITCH
    best = tl.full([BLOCK_C], -1.0, tl.float32)
    for pair in tl.static_range(GROUP):
        query = (row * NUM_KV_HEADS + head) * GROUP + pair
        peak = float("-inf")
        total = 0.0
        for start in range(0, num_peaks, BLOCK_P):
            block = start + tl.arange(0, BLOCK_P)
            of_block = peaks_ptr + (query * num_peaks + block) * 2
            peaks = tl.load(of_block, mask=block < num_peaks, other=float("-inf"))
            totals = tl.load(of_block + 1, mask=block < num_peaks, other=0.0)
            next_peak = tl.maximum(peak, tl.max(peaks, 0))
            shift = tl.where(next_peak == float("-inf"), 0.0, next_peak)
            total = total * tl.exp(peak - shift) + tl.sum(totals * tl.exp(peaks - shift), 0)
            peak = next_peak
        # what lies behind the last chunk is loaded too, so that loads are wide
        found = tl.load(scores_ptr + query * most_chunks + chunk, mask=chunk < most_chunks, other=0.0)
        found = tl.where(chunk < count, found, float("-inf"))
        share = tl.exp(found - tl.where(peak == float("-inf"), 0.0, peak)) / tl.where(total > 0, total, 1.0)
        # a score that is no number counts as 0: as a rank it would be chosen beyond what there is room for
        share = tl.where(share >= 0, share, 0.0)
        best = tl.maximum(best, tl.where(found == float("-inf"), -1.0, share))
    tl.store(ranks_ptr + (row * NUM_KV_HEADS + head) * most_chunks + chunk, best, mask=chunk < count)


@triton.jit
def _reached(bits, least, step):
    """How many ranks reach `least` and one, two and three steps more; fewer than 2^21 each, so that one sum counts all
    three."""
    one, two, three = bits >= least + step, bits >= least + 2 * step, bits >= least + 3 * step
    sums = tl.sum(one.to(tl.int64) + (two.to(tl.int64) << 21) + (three.to(tl.int64) << 42), 0)
    return (sums & 0x1FFFFF).to(tl.int32), ((sums >> 21) & 0x1FFFFF).to(tl.int32), (sums >> 42).to(tl.int32)


@triton.jit
def _least_held(bits, most_wanted):
    """`_least_rank` of ranks that all are in registers; -1 and 0 for all of them where fewer are there than wanted.
    It ends as soon as exactly as many as are wanted reach a rank."""
    seen = tl.sum((bits >= 0).to(tl.int32), 0)
    wanted = tl.minimum(most_wanted.to(tl.int32), seen)
    least, reach, shift = tl.zeros([], tl.int32), seen, tl.full([], 28, tl.int32)
    while (reach != wanted) & (shift >= 0):
        step = tl.full([], 1, tl.int32) << shift
        one, two, three = _reached(bits, least, step)
        more = (one >= wanted).to(tl.int32) + (two >= wanted).to(tl.int32) + (three >= wanted).to(tl.int32)
        reach = tl.where(more == 0, reach, tl.where(more == 1, one, tl.where(more == 2, two, three)))
        least += step * more
        shift -= 2
    exact = reach == wanted
    above = tl.sum((bits > least).to(tl.int32), 0)
    return tl.where(exact, least - 1, least), tl.where(exact, 0, wanted - above), wanted


@triton.jit
def _least_rank(ranks, count, most_wanted, BLOCK_C: tl.constexpr):
    """The least rank that is chosen, as bits; how many of the chunks that have it are chosen; how many chunks in all.

    The largest number that as many ranks reach as are wanted, found two bits a pass: ranks are from 0 to 1, so they
    have 30 bits, which order as they do."""
    places = tl.arange(0, BLOCK_C)
    seen = tl.zeros([BLOCK_C], tl.int32)
    for start in range(0, count, BLOCK_C):
        bits = tl.load(ranks + start + places, mask=start + places < count, other=-1)
        seen += (bits >= 0).to(tl.int32)
    wanted = tl.minimum(most_wanted.to(tl.int32), tl.sum(seen, 0))
    least = tl.zeros([], tl.int32)
    for done in range(0, 30, 2):
        step = tl.full([], 1 << 28, tl.int32) >> done
        one = tl.zeros([BLOCK_C], tl.int32)
        two = tl.zeros([BLOCK_C], tl.int32)
        three = tl.zeros([BLOCK_C], tl.int32)
        for start in range(0, count, BLOCK_C):
            bits = tl.load(ranks + start + places, mask=start + places < count, other=-1)
            one += (bits >= least + step).to(tl.int32)
            two += (bits >= least + 2 * step).to(tl.int32)
            three += (bits >= least + 3 * step).to(tl.int32)
        reached = (tl.sum(one, 0) >= wanted).to(tl.int32) + (tl.sum(two, 0) >= wanted).to(tl.int32)
        least += step * (reached + (tl.sum(three, 0) >= wanted).to(tl.int32))
    above = tl.zeros([BLOCK_C], tl.int32)
    for start in range(0, count, BLOCK_C):
        bits = tl.load(ranks + start + places, mask=start + places < count, other=-1)
        above += (bits > least).to(tl.int32)
    return least, wanted - tl.sum(above, 0), wanted


@triton.jit
def _choose_again(kept, chosen, num_kept, BLOCK_L: tl.constexpr):
    for start in range(0, num_kept, BLOCK_L):
        entry = start + tl.arange(0, BLOCK_L)
        tl.store(chosen + entry, tl.load(kept + entry, mask=entry < num_kept), mask=entry < num_kept)


@triton.jit(do_not_specialize=["most_chunks", "most_chosen"])
def choose_chunks(
    table_ptr, positions_ptr, ranks_ptr, chosen_ptr, counts_ptr, most_chunks, most_chosen,
    NUM_KV_HEADS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """The best visible chunks, ascending; ties go to the lower chunk. Grid: rows, KV heads. AT_ONCE: a block has all.
    BLOCK_L: chunks that are listed at a time.

    chosen int32 [rows, Hkv, most_chosen], counts int32 [rows, Hkv]: as many entries as were wanted and are visible. A
    row that wants none is left alone, as another table may hold its chunks.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = table_ptr + row * CHOICE_FIELDS
    most_wanted = tl.load(at + WANTED)
    if most_wanted == 0:
        return
    chosen, count_at = chosen_ptr + (row * NUM_KV_HEADS + head) * most_chosen, counts_ptr + row * NUM_KV_HEADS + head
    keeps, position = tl.load(at + KEPT) != 0, tl.load(positions_ptr + row)
    kept = tl.load(at + KEPT).to(tl.pointer_type(tl.int32)) + head * most_wanted
    state = tl.load(at + STATE).to(tl.pointer_type(tl.int32)) + head * 2
    if _is_kept(at, head, position):
        _choose_again(kept, chosen, tl.load(state), BLOCK_L)
        tl.store(count_at, tl.load(state))
        return
    count = (tl.load(at + COUNT) + tl.load(at + COUNT_B)).to(tl.int32)
    pitch = most_chunks // PITCH * PITCH  # which the compiler then knows to be a multiple
    ranks = (ranks_ptr + (row * NUM_KV_HEADS + head) * pitch).to(tl.pointer_type(tl.int32))
    if AT_ONCE:
        places = tl.arange(0, BLOCK_C)
        # here and below: what lies behind the last chunk is loaded too, so that loads are wide
        every = tl.where(places < count, tl.load(ranks + places, mask=places < pitch, other=-1), -1)
        least, left, wanted = _least_held(every, most_wanted)
    else:
        least, left, wanted = _least_rank(ranks, count, most_wanted, BLOCK_C)
    taken, ties = 0, 0
    for start in range(0, count, BLOCK_L):
        chunk = start + tl.arange(0, BLOCK_L)
        bits = tl.where(chunk < count, tl.load(ranks + chunk, mask=chunk < pitch, other=-1), -1)
        take = bits > least
        if left > 0:
            tied = bits == least
            take = take | (tied & (ties + tl.cumsum(tied.to(tl.int32), 0) <= left))
            ties += tl.sum(tied.to(tl.int32), 0)
        take = take & (bits >= 0)
        order = tl.cumsum(take.to(tl.int32), 0)
        tl.store(chosen + taken + order - 1, chunk, mask=take)
        tl.store(kept + taken + order - 1, chunk, mask=take & keeps)
        taken += tl.max(order, 0)
    tl.store(count_at, wanted)
    tl.store(state, wanted, mask=keeps)
    tl.store(state + 1, position.to(tl.int32), mask=keeps)
