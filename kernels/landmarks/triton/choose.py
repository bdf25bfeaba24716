"""Choosing chunks, compiled: softmax per query head in blocks of chunks, the maximum over the GQA group, and the best
of every KV head without a sort. Nothing waits for the device, and a row's choice depends on its own scores alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_SHARES = 1024
BLOCK_PEAKS = 128
# shares are at most 1, so they have 30 bits, which order as they do
MOST = tl.constexpr((1 << 30) - 1)


@triton.jit(do_not_specialize=["count", "hidden_row"])
def _block_peaks(
    scores_ptr, hidden_ptr, peaks_ptr, count, hidden_row,
    GROUP: tl.constexpr, HAS_HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """peaks float32 [rows, H, blocks, 2]: largest score and sum of exponentials. Grid: rows, H, blocks of chunks."""
    row, head, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    pair = row * tl.num_programs(1) + head
    chunk = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    shown = chunk < count
    if HAS_HIDDEN:
        hidden_at = hidden_ptr + row * hidden_row + (head // GROUP) * count + chunk
        shown = shown & (tl.load(hidden_at, mask=shown, other=1) == 0)
    scores = tl.load(scores_ptr + pair * count + chunk, mask=shown, other=float("-inf"))
    peak = tl.max(scores, 0)
    total = tl.sum(tl.exp(scores - tl.where(peak == float("-inf"), 0.0, peak)), 0)
    at = peaks_ptr + (pair * tl.num_programs(2) + block) * 2
    tl.store(at, peak)
    tl.store(at + 1, total)


@triton.jit(do_not_specialize=["count", "num_peaks", "hidden_row"])
def _shares(
    scores_ptr, hidden_ptr, peaks_ptr, shares_ptr, count, num_peaks, hidden_row,
    GROUP: tl.constexpr, HAS_HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """shares float32 [rows, Hkv, chunks], -1 where a chunk is hidden. Grid: rows, Hkv, blocks of chunks."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    of_head = row * tl.num_programs(1) + head
    chunk = tl.program_id(2).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = chunk < count
    best = tl.zeros([BLOCK], tl.float32)
    for member in tl.static_range(GROUP):
        pair = of_head * GROUP + member
        peak = tl.full([], float("-inf"), tl.float32)
        total = tl.zeros([], tl.float32)
        for begin in range(0, num_peaks, BLOCK_P):
            block = begin + tl.arange(0, BLOCK_P)
            at = peaks_ptr + (pair * num_peaks + block) * 2
            peaks = tl.load(at, mask=block < num_peaks, other=float("-inf"))
            totals = tl.load(at + 1, mask=block < num_peaks, other=0.0)
            next_peak = tl.maximum(peak, tl.max(peaks, 0))
            # a head that has seen nothing yet has no finite peak to subtract
            shift = tl.where(next_peak == float("-inf"), 0.0, next_peak)
            total = total * tl.exp(peak - shift) + tl.sum(totals * tl.exp(peaks - shift), 0)
            peak = next_peak
        scores = tl.load(scores_ptr + pair * count + chunk, mask=inside, other=float("-inf"))
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        # a hidden chunk's score may lie far above the peak, and what comes of it is not used
        share = tl.exp(tl.minimum(scores - shift, 0.0)) / tl.where(total > 0, total, 1.0)
        best = tl.maximum(best, share)
    if HAS_HIDDEN:
        hidden = tl.load(hidden_ptr + row * hidden_row + head * count + chunk, mask=inside, other=1)
        best = tl.where(hidden == 0, best, -1.0)
    tl.store(shares_ptr + of_head * count + chunk, best, mask=inside)


@triton.jit
def _least_chosen(shares_ptr, count, num_chosen, BLOCK: tl.constexpr):
    """The largest number that `num_chosen` of the shares reach, found two bits a pass."""
    places = tl.arange(0, BLOCK)
    least = tl.zeros([], tl.int32)
    for done in range(0, 30, 2):
        step = tl.full([], 1 << 28, tl.int32) >> done
        one = tl.zeros([BLOCK], tl.int32)
        two = tl.zeros([BLOCK], tl.int32)
        three = tl.zeros([BLOCK], tl.int32)
        for begin in range(0, count, BLOCK):
            share = tl.load(shares_ptr + begin + places, mask=begin + places < count, other=-1)
            share = tl.minimum(share, MOST)
            one += (share >= least + step).to(tl.int32)
            two += (share >= least + 2 * step).to(tl.int32)
            three += (share >= least + 3 * step).to(tl.int32)
        reached = (tl.sum(one, 0) >= num_chosen).to(tl.int32) + (tl.sum(two, 0) >= num_chosen).to(tl.int32)
        least += step * (reached + (tl.sum(three, 0) >= num_chosen).to(tl.int32))
    return least


@triton.jit(do_not_specialize=["count", "wanted"])
def _choose(shares_ptr, chunks_ptr, valid_ptr, count, wanted, BLOCK: tl.constexpr):
    """The best chunks of one head, ascending, ties to the lower. Grid: rows x KV heads.

    shares int32 [heads, chunks], below 0 what is hidden. chunks int64, valid uint8 [heads, wanted]: where fewer can be
    chosen, the last chunk, which is not valid.
    """
    head = tl.program_id(0).to(tl.int64)
    shares_ptr += head * count
    places = tl.arange(0, BLOCK)
    seen = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, count, BLOCK):
        share = tl.load(shares_ptr + begin + places, mask=begin + places < count, other=-1)
        seen += (share >= 0).to(tl.int32)
    num_chosen = tl.minimum(wanted, tl.sum(seen, 0))
    least = _least_chosen(shares_ptr, count, num_chosen, BLOCK)
    above = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, count, BLOCK):
        share = tl.load(shares_ptr + begin + places, mask=begin + places < count, other=-1)
        above += (tl.minimum(share, MOST) > least).to(tl.int32)
    num_tied = num_chosen - tl.sum(above, 0)
    chunks_ptr += head * wanted
    valid_ptr += head * wanted
    larger_before = tl.zeros([], tl.int32)
    tied_before = tl.zeros([], tl.int32)
    for begin in range(0, count, BLOCK):
        share = tl.load(shares_ptr + begin + places, mask=begin + places < count, other=-1)
        share = tl.minimum(share, MOST)
        larger, tied = share > least, share == least
        # both counts in one sum: a block has fewer than 2^16 chunks
        counts = tl.cumsum(larger.to(tl.int32) + (tied.to(tl.int32) << 16), 0)
        tied_so_far = tied_before + (counts >> 16)
        place = larger_before + (counts & 0xFFFF) + tl.minimum(tied_so_far, num_tied) - 1
        chosen = (larger | (tied & (tied_so_far <= num_tied))) & (place < num_chosen)
        tl.store(chunks_ptr + place, (begin + places).to(tl.int64), mask=chosen)
        larger_before += tl.sum(larger.to(tl.int32), 0)
        tied_before += tl.sum(tied.to(tl.int32), 0)
    for begin in range(0, wanted, BLOCK):
        place = begin + places
        tl.store(valid_ptr + place, (place < num_chosen).to(tl.uint8), mask=place < wanted)
        last = tl.zeros([BLOCK], tl.int64) + (count - 1)
        tl.store(chunks_ptr + place, last, mask=(place >= num_chosen) & (place < wanted))


def select_chunks(
    scores: Tensor, num_kv_heads: int, num_chunks: int, hidden: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """See `op.select_chunks`."""
    num_rows, _, count = scores.shape
    chunks = torch.empty(num_rows, num_kv_heads, num_chunks, dtype=torch.int64, device=scores.device)
    valid = torch.empty(chunks.shape, dtype=torch.bool, device=scores.device)
    if chunks.numel():
        shares = _group_shares(scores.contiguous(), num_kv_heads, hidden)
        small = count <= BLOCK_SHARES
        with torch.cuda.device_of(scores):
            _choose[(num_rows * num_kv_heads,)](
                shares.view(torch.int32), chunks, valid.view(torch.uint8), count, num_chunks,
                BLOCK=1024 if small else 4096, num_warps=4 if small else 16,
            )  # fmt: skip
    return chunks, None if hidden is None else valid


def _group_shares(scores: Tensor, num_kv_heads: int, hidden: Tensor | None) -> Tensor:
    """float32 [Q, Hkv, n]: the largest share that a chunk has for any query head of the group, -1 if it is hidden."""
    num_rows, num_heads, count = scores.shape
    blocks = triton.cdiv(count, BLOCK_SHARES)
    peaks = torch.empty(num_rows, num_heads, blocks, 2, dtype=torch.float32, device=scores.device)
    shares = torch.empty(num_rows, num_kv_heads, count, dtype=torch.float32, device=scores.device)
    mask, mask_row = scores, 0
    if hidden is not None:
        mask = hidden.contiguous().view(torch.uint8)
        mask_row = 0 if len(hidden) == 1 else num_kv_heads * count
    shape = {"GROUP": num_heads // num_kv_heads, "HAS_HIDDEN": hidden is not None, "BLOCK": BLOCK_SHARES}
    with torch.cuda.device_of(scores):
        _block_peaks[(num_rows, num_heads, blocks)](scores, mask, peaks, count, mask_row, **shape, num_warps=4)
        _shares[(num_rows, num_kv_heads, blocks)](
            scores, mask, peaks, shares, count, blocks, mask_row, **shape, BLOCK_P=BLOCK_PEAKS, num_warps=4
        )
    return shares
