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
BOUND_FIELDS: tl.constexpr = tl.constexpr(4)
RANK_LIMIT: tl.constexpr = tl.constexpr(
    1 << 30
)  # no rank has as many bits: ranks are from 0 to 1, ordered as their bits
SAMPLE: tl.constexpr = tl.constexpr(512)
CHOICE_ADDRESSES = (0, 1, 3, 5, 6, 10, 12, 13)


@triton.jit
def _is_kept(at, head, position):
    """Whether the row chooses nothing: it attends to what was chosen before, as its block of positions has had its
    choice, or it is not there."""
    every, state = tl.load(at + EVERY), tl.load(at + STATE)
    last = tl.load(state.to(tl.pointer_type(tl.int32)) + head * 2 + 1, mask=state != 0, other=-1).to(tl.int64)
    return ((last >= 0) & (last // tl.maximum(every, 1) == position // tl.maximum(every, 1))) | (position < 0)


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
        last = _last_positions(at, local, later, inside, CHUNK)
        out = out & (last > position - window) & (last - (CHUNK - 1) <= position)
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
def _reaching(
    held, ranks, count, first, second, BOTH: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """How many ranks reach `first`, and how many `second`, which is no less; the same unless BOTH. AT_ONCE: `held` has
    all of them."""
    if AT_ONCE:
        # signs of differences take fewer instructions than comparisons; each thread sums its own before they meet
        width: tl.constexpr = min(BLOCK_C, max(BLOCK_C // 16, 1024))
        bits = tl.reshape(held, (BLOCK_C // width, width))
        below = tl.sum((bits - first).to(tl.uint32, bitcast=True) >> 31, 0)
        if BOTH:
            below += tl.sum((bits - second).to(tl.uint32, bitcast=True) >> 31, 0) << 16
        sums = tl.sum(below, 0)  # no more than 2^15 each
        one = BLOCK_C - (sums & 0xFFFF).to(tl.int32)
        return one, BLOCK_C - (sums >> 16).to(tl.int32) if BOTH else one
    else:
        places = tl.arange(0, BLOCK_C)
        one, two = tl.zeros([BLOCK_C], tl.int32), tl.zeros([BLOCK_C], tl.int32)
        for start in range(0, count, BLOCK_C):
            bits = tl.load(ranks + start + places, mask=start + places < count, other=-1)
            one += (bits >= first).to(tl.int32)
            if BOTH:
                two += (bits >= second).to(tl.int32)
        return tl.sum(one, 0), tl.sum(two, 0) if BOTH else tl.sum(one, 0)


@triton.jit
def _moments(ranks, count):
    """Mean and deviation of the visible ranks' bits, from a sample; bits are about linear in the score. They only say
    where to look first."""
    place = tl.arange(0, SAMPLE)
    place = place // 8 * (8 * tl.maximum(count // SAMPLE, 1)) + place % 8
    bits = tl.load(ranks + place, mask=place < count, other=-1)
    middle = (1.0 / tl.maximum(count, 1).to(tl.float32)).to(tl.int32, bitcast=True)  # where all scores are the same
    visible = bits >= 0
    far = tl.where(visible, (bits - middle).to(tl.float32), 0.0)
    number = tl.maximum(tl.sum(visible.to(tl.float32), 0), 1.0)
    shift = tl.sum(far, 0) / number
    square = tl.sum(far * far, 0) / number - shift * shift
    return middle.to(tl.float32) + shift, tl.minimum(tl.sqrt(tl.maximum(square, 1.0)), 1 << 28)


@triton.jit
def _first_guess(mean, deviation, wanted, seen):
    """The rank that `wanted` of `seen` reach where scores are normal: an approximation of the normal distribution's
    quantiles (Abramowitz and Stegun, 26.2.22)."""
    share = tl.minimum(tl.maximum(wanted, 1).to(tl.float32) / tl.maximum(seen, 1).to(tl.float32), 0.5)
    tail = tl.sqrt(-2.0 * tl.log(share))
    far = tail - (2.30753 + 0.27061 * tail) / (1.0 + tail * (0.99229 + 0.04481 * tail))
    return tl.minimum(tl.maximum(mean + far * deviation, 0.0), RANK_LIMIT * 1.0).to(tl.int32)


@triton.jit
def _next_guess(low, reach_low, high, reach_high, wanted, passes):
    """Between two ranks, the one that `wanted` would reach were the logarithm of how many do linear, and how far it
    may be off. Every fourth pass leaves a third of what is between them, whatever the ranks."""
    width = high - low
    if passes % 4 == 3:
        at, gap = low + width // 2, width // 6
    else:
        most = tl.log2(reach_low.to(tl.float32))
        share = (most - tl.log2(wanted.to(tl.float32))) / (most - tl.log2(tl.maximum(reach_high.to(tl.float32), 0.5)))
        off = tl.minimum(0.35 / tl.sqrt((reach_low - reach_high).to(tl.float32)), 0.25)
        at = low + (width.to(tl.float32) * share).to(tl.int32)
        gap = (width.to(tl.float32) * off).to(tl.int32)
    return at, gap


@triton.jit
def _least_rank(
    held, ranks, count, most_wanted, BOTH: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Chunks of more than which rank, as bits, are chosen; how many of those that have it; how many in all.

    A bracket around it is narrowed, by two ranks a pass or, unless BOTH, by one, until a rank is found that exactly as
    many reach as are wanted, or the bracket holds a single one, which several share. Which of the ranks that exactly as
    many reach is found makes no difference."""
    mean, deviation = _moments(ranks, count)
    seen, _ = _reaching(held, ranks, count, 0, 0, False, AT_ONCE, BLOCK_C)
    wanted = tl.minimum(most_wanted.to(tl.int32), seen)
    low, reach_low = tl.zeros([], tl.int32), seen
    high, reach_high = tl.full([], RANK_LIMIT, tl.int32), tl.zeros([], tl.int32)
    at, hop = _first_guess(mean, deviation, wanted, seen), (deviation * 0.5).to(tl.int32)
    gap, passes = hop // 2, tl.zeros([], tl.int32)
    while (reach_low != wanted) & (high - low > 1):
        first = tl.minimum(tl.maximum(at - gap if BOTH else at, low + 1), high - 1)
        second = tl.minimum(tl.maximum(at + gap, first), high - 1)
        second = second if BOTH else first
        one, two = _reaching(held, ranks, count, first, second, BOTH, AT_ONCE, BLOCK_C)
        low, reach_low, high, reach_high = (
            tl.where(two >= wanted, second, tl.where(one >= wanted, first, low)),
            tl.where(two >= wanted, two, tl.where(one >= wanted, one, reach_low)),
            tl.where(one < wanted, first, tl.where(two < wanted, second, high)),
            tl.where(one < wanted, one, tl.where(two < wanted, two, reach_high)),
        )
        passes += 1
        if (passes <= 3) & ((low == 0) | (high == RANK_LIMIT)):  # nothing is known yet of one of the sides
            at, gap = tl.where(low == 0, first - hop, second + hop), hop // 2
            hop *= 2
        else:
            at, gap = _next_guess(low, reach_low, high, reach_high, wanted, passes)
    exact = reach_low == wanted
    return tl.where(exact, low - 1, low), tl.where(exact, 0, wanted - reach_high), wanted


@triton.jit
def _store_before(bits, start, above, tied, least, before, num_parts, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr):
    """Store how many of the chunks before every part of a block rank higher than `least`, and how many like it; return
    how many those are with the block's."""
    at_least = tl.where(bits == least, 0x10000, (bits > least).to(tl.int32))
    sums = tl.sum(tl.reshape(at_least, (BLOCK_C // BLOCK_L, BLOCK_L)), 1)  # no more than 2^15 of either
    part = start // BLOCK_L + tl.arange(0, BLOCK_C // BLOCK_L)
    own_above, own_tied = sums & 0xFFFF, sums >> 16
    tl.store(before + part * 2, above + tl.cumsum(own_above, 0) - own_above, mask=part < num_parts)
    tl.store(before + part * 2 + 1, tied + tl.cumsum(own_tied, 0) - own_tied, mask=part < num_parts)
    return above + tl.sum(own_above, 0), tied + tl.sum(own_tied, 0)


@triton.jit(do_not_specialize=["most_chunks", "num_parts"])
def bound_ranks(
    table_ptr, positions_ptr, ranks_ptr, bounds_ptr, before_ptr, most_chunks, num_parts,
    NUM_KV_HEADS: tl.constexpr, BOTH: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Which ranks are chosen. Grid: rows, KV heads. BOTH: see `_least_rank`. AT_ONCE: a block has all chunks. BLOCK_L:
    chunks of a part.

    bounds int32 [rows, Hkv, BOUND_FIELDS]: chunks of more than which rank, as bits, are chosen; how many of those that
    have it; how many in all, -1 for what was chosen before. before int32 [rows, Hkv, parts, 2]: see `_store_before`.
    A row that wants none is left alone.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at, pair = table_ptr + row * CHOICE_FIELDS, row * NUM_KV_HEADS + head
    most_wanted, bounds = tl.load(at + WANTED), bounds_ptr + pair * BOUND_FIELDS
    if most_wanted == 0:
        return
    if _is_kept(at, head, tl.load(positions_ptr + row)):
        tl.store(bounds + 2, -1)
        return
    count = (tl.load(at + COUNT) + tl.load(at + COUNT_B)).to(tl.int32)
    pitch = most_chunks // PITCH * PITCH  # which the compiler then knows to be a multiple
    ranks, before = (ranks_ptr + pair * pitch).to(tl.pointer_type(tl.int32)), before_ptr + pair * num_parts * 2
    places, above, tied = tl.arange(0, BLOCK_C), 0, 0
    if AT_ONCE:
        # what lies behind the last chunk is loaded too, so that loads are wide
        held = tl.where(places < count, tl.load(ranks + places, mask=places < pitch, other=-1), -1)
        held = tl.maximum(held, -1)  # of which no difference overflows
        least, left, wanted = _least_rank(held, ranks, count, most_wanted, BOTH, AT_ONCE, BLOCK_C)
        _store_before(held, 0, above, tied, least, before, num_parts, BLOCK_C, BLOCK_L)
    else:
        least, left, wanted = _least_rank(places, ranks, count, most_wanted, BOTH, AT_ONCE, BLOCK_C)
        for start in range(0, count, BLOCK_C):
            bits = tl.load(ranks + start + places, mask=start + places < count, other=-1)
            above, tied = _store_before(bits, start, above, tied, least, before, num_parts, BLOCK_C, BLOCK_L)
    tl.store(bounds, least)
    tl.store(bounds + 1, left)
    tl.store(bounds + 2, wanted)


@triton.jit
def _choose_again(kept, chosen, num_kept, BLOCK_L: tl.constexpr):
    for start in range(0, num_kept, BLOCK_L):
        entry = start + tl.arange(0, BLOCK_L)
        tl.store(chosen + entry, tl.load(kept + entry, mask=entry < num_kept), mask=entry < num_kept)


@triton.jit(do_not_specialize=["most_chunks", "most_chosen"])
def list_chunks(
    table_ptr, positions_ptr, ranks_ptr, bounds_ptr, before_ptr, chosen_ptr, counts_ptr, most_chunks, most_chosen,
    NUM_KV_HEADS: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """The best visible chunks, ascending; ties go to the lower chunk. Grid: rows, KV heads, parts of BLOCK_L chunks;
    `bound_ranks` has said which chunks those are and where each part's begin.

    chosen int32 [rows, Hkv, most_chosen], counts int32 [rows, Hkv]: as many entries as were wanted and are visible. A
    row that wants none is left alone, as another table may hold its chunks.
    """
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    at, pair = table_ptr + row * CHOICE_FIELDS, row * NUM_KV_HEADS + head
    most_wanted, bounds = tl.load(at + WANTED), bounds_ptr + pair * BOUND_FIELDS
    least, left, wanted = tl.load(bounds), tl.load(bounds + 1), tl.load(bounds + 2)
    count = (tl.load(at + COUNT) + tl.load(at + COUNT_B)).to(tl.int32)
    if most_wanted == 0:
        return
    chosen = chosen_ptr + pair * most_chosen
    keeps, is_first = tl.load(at + KEPT) != 0, part == 0
    kept = tl.load(at + KEPT).to(tl.pointer_type(tl.int32)) + head * most_wanted
    state = tl.load(at + STATE).to(tl.pointer_type(tl.int32)) + head * 2
    if wanted < 0:
        if is_first:
            num_kept = tl.load(state, mask=keeps, other=0)  # none of a row that is not there
            _choose_again(kept, chosen, num_kept, BLOCK_L)
            tl.store(counts_ptr + pair, num_kept)
        return
    tl.store(counts_ptr + pair, wanted, mask=is_first)
    tl.store(state, wanted, mask=keeps & is_first)
    tl.store(state + 1, tl.load(positions_ptr + row).to(tl.int32), mask=keeps & is_first)
    chunk, pitch = part * BLOCK_L + tl.arange(0, BLOCK_L), most_chunks // PITCH * PITCH
    if part * BLOCK_L >= count:
        return
    ranks = (ranks_ptr + pair * pitch).to(tl.pointer_type(tl.int32))
    # what lies behind the last chunk is loaded too, so that loads are wide
    bits = tl.where(chunk < count, tl.load(ranks + chunk, mask=chunk < pitch, other=-1), -1)
    before = before_ptr + (pair * tl.num_programs(2) + part) * 2
    taken, ties = tl.load(before), tl.load(before + 1)
    take = bits > least
    if left > 0:
        tied = bits == least
        take = take | (tied & (ties + tl.cumsum(tied.to(tl.int32), 0) <= left))
    place = taken + tl.minimum(ties, left) + tl.cumsum(take.to(tl.int32), 0) - 1
    tl.store(chosen + place, chunk, mask=take)
    tl.store(kept + place, chunk, mask=take & keeps)
