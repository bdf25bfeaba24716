"""Launches of a step's kernels. Nothing here waits for the device, so a step can be captured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...attention_partial.triton import TILE
from ...hot_set import fetch_chosen
from ...streams import beside
from ..op import Selection
from ..packed import Layout
from ..tables import AttendKey, ChoiceKey, Tables
from .append import append_rows as _append_rows
from .attend import attend_items, merge_items
from .choose import BOUND_FIELDS, PITCH, bound_ranks, list_chunks, rank_chunks, score_chunks

KINDS = {"dense": 0, "channel": 1, "token": 2, "float8": 3, "lowrank": 4}
DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    None: tl.uint8,
}
SCORE_CHUNKS = 128  # chunks that are scored at once
SCORE_STEPS = 4  # a program
RANK_CHUNKS = 1024
CHOOSE_CHUNKS = 32768  # that a program holds at once; of more it holds as many as leave room for counting
CHOOSE_LOOP_CHUNKS = 8192  # 512 a warp
WARP_CHUNKS = 4096
CHOOSE_BOTH = True  # two ranks are tried a pass
LIST_CHUNKS, LIST_WARPS = 2048, 4  # a program
MERGE_ITEMS = 16
EVERYWHERE = 1 << 30  # a window that hides what is beyond the query's position and nothing else
SPAN_ROWS, MOST_SPANS = 16, 4  # of parts of a batch whose values lie on the host: rows that keep the device busy


def append_rows(tables: Tables, layer: int, k_pre: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> None:
    """See `op.StepAttention.append`."""
    num_rows, num_kv_heads, d = k.shape
    for dtype, table in tables.tails.items():
        rows: tuple[Tensor, ...] = (k_pre, k, v)
        if triton.knobs.runtime.interpret:  # which cuts bits off where a GPU rounds
            rows = tuple(x.to(dtype) for x in rows)
        with torch.cuda.device_of(k):
            _append_rows[(num_rows,)](
                table[layer], *rows, positions, *(x.stride() for x in rows),
                DTYPE=DTYPES[dtype], NUM_KV_HEADS=num_kv_heads, HEAD_DIM=d,
                BLOCK_H=triton.next_power_of_2(num_kv_heads), BLOCK_D=triton.next_power_of_2(d),
            )  # fmt: skip


def attend(
    tables: Tables,
    layer: int,
    q: Tensor,
    num_kv_heads: int,
    positions: Tensor,
    frequencies: Tensor,
    rope_factor: float,
    window: int | None,
    hot_counts: Tensor | None = None,
    selection: Selection | None = None,
) -> Attended:
    """See `op.StepAttention.attend`. While some rows' values come from the host, others choose or attend."""
    q = q.contiguous()
    num_rows, num_heads, d = q.shape
    picked = _Picked.empty(tables, num_kv_heads, q.device)
    outs = torch.empty(tables.num_items, num_heads, d, dtype=torch.float32, device=q.device)
    lses = torch.empty(tables.num_items, num_heads, dtype=torch.float32, device=q.device)
    spans, fetches = _spans(tables), []
    for span in spans:
        _pick(tables, layer, span, q, positions, window, picked, selection)
        with beside(q.device) as fetch:
            for hot, table in tables.hots.items():
                rows = (picked.chosen[span], picked.counts[span], picked.places[span])
                fetch_chosen(hot, table[layer][span], *rows, hot_counts, tables.most_slots)
        fetches.append(fetch)
    rope, everything = (frequencies, rope_factor), slice(0, num_rows)
    for key, items in tables.items.items():
        if not key.chosen:
            _launch_items(key, items[layer], everything, q, positions, picked, rope, window, outs, lses)
    for span, fetch in zip(spans, fetches, strict=True):
        fetch.join()
        for key, items in tables.items.items():
            if key.chosen:
                _launch_items(key, items[layer], span, q, positions, picked, rope, window, outs, lses)
    out = torch.empty_like(q)
    with torch.cuda.device_of(q):
        merge_items[(num_rows, num_heads)](
            outs, lses, tables.ranges, out,
            NUM_HEADS=num_heads, HEAD_DIM=d, BLOCK_S=MERGE_ITEMS, BLOCK_D=triton.next_power_of_2(d), num_warps=2,
        )  # fmt: skip
    return Attended(out, q, picked.chosen, picked.counts, lses)


class Attended(NamedTuple):
    """What rows attended to, and how.

    Attributes:
        out: [rows, H, d].
        q: [rows, H, d], contiguous.
        chosen, counts: see `_Picked`.
        lses: float32 [items, H], of every partial result.
    """

    out: Tensor
    q: Tensor
    chosen: Tensor
    counts: Tensor
    lses: Tensor


@dataclass(frozen=True)
class _Picked:
    """What the rows of a step attend to; one list for all tables, as a row is in one of them.

    Attributes:
        chosen: int32 [rows, Hkv, most_chosen], chunks.
        counts: int32 [rows, Hkv], how many.
        places: int32 like `chosen`, where their values lie; `chosen` itself where none lie on the host.
    """

    chosen: Tensor
    counts: Tensor
    places: Tensor

    @classmethod
    def empty(cls, tables: Tables, num_kv_heads: int, device: torch.device) -> _Picked:
        size = (tables.num_rows, num_kv_heads)
        chosen = torch.empty(*size, tables.most_chosen, dtype=torch.int32, device=device)
        counts = torch.empty(size, dtype=torch.int32, device=device)
        return cls(chosen, counts, torch.empty_like(chosen) if tables.hots else chosen)


def _spans(tables: Tables) -> list[slice]:
    """Rows that go through a layer together."""
    parts = max(1, min(MOST_SPANS, tables.num_rows // SPAN_ROWS)) if tables.hots else 1
    bounds = [part * tables.num_rows // parts for part in range(parts + 1)]
    return [slice(begin, end) for begin, end in pairwise(bounds)]


def _pick(
    tables: Tables,
    layer: int,
    span: slice,
    q: Tensor,
    positions: Tensor,
    window: int | None,
    picked: _Picked,
    selection: Selection | None,
) -> None:
    """Fill some rows of what is picked."""
    for key, table in tables.choices.items():
        rows = (table[layer][span], q[span], positions[span], picked.chosen[span], picked.counts[span])
        _choose(tables, key, *rows, window)
        if selection is not None:
            selection.choose(layer, rows[0], rows[3], rows[4])


def _launch_items(
    key: AttendKey,
    items: Tensor,
    span: slice,
    q: Tensor,
    positions: Tensor,
    picked: _Picked,
    rope: tuple[Tensor, float],
    window: int | None,
    outs: Tensor,
    lses: Tensor,
) -> None:
    """Fill the places of the items of some rows in `outs` [W, H, d] and `lses` [W, H]."""
    num_kv_heads, most_chosen = picked.chosen.shape[1:]
    _, num_heads, d = q.shape
    group = num_heads // num_kv_heads
    wide = triton.knobs.runtime.interpret
    if key.by_position and window is None:
        window = EVERYWHERE
    with torch.cuda.device_of(q):
        attend_items[(len(items), num_kv_heads)](
            items, q, positions, picked.chosen, picked.places, picked.counts, rope[0], outs, lses,
            1 / math.sqrt(d), rope[1], most_chosen, window or 0, span.start, span.stop,
            K=_layout(key, key.keys, d), V=_layout(key, key.values, d), H=(d, num_kv_heads, group), CHUNK=key.chunk,
            CHOSEN=key.chosen, HOT=key.hot, ROTATES=key.rotates, HAS_WINDOW=window is not None, WIDE=wide,
            BLOCK_M=max(TILE, triton.next_power_of_2(group)), BLOCK_D=max(TILE, triton.next_power_of_2(d)),
            BLOCK_H=max(TILE, triton.next_power_of_2(d // 2)), **_block(key, q),
        )  # fmt: skip


def _block(key: AttendKey, q: Tensor) -> dict[str, int | None]:
    """Keys a block, and the options it is compiled with."""
    low_rank = "lowrank" in (key.keys.kind, key.values.kind)
    # float32 products run on ordinary units from registers, which larger blocks would not leave enough of
    full = q.dtype == torch.float32
    return {
        "BLOCK_N": 32 if full else 64,
        "num_warps": 8 if low_rank and full else 4,
        "num_stages": 3 if low_rank and not full else 2,
        # so that 16 warps fit on a processor, which is worth more than a few spilled bytes cost; keys that are rebuilt
        # take a whole basis a block, and more warps would not have it sooner
        "maxnreg": None if full or low_rank or q.shape[2] > 128 else 128,
    }


def _choose(
    tables: Tables,
    key: ChoiceKey,
    table: Tensor,
    q: Tensor,
    positions: Tensor,
    chosen: Tensor,
    counts: Tensor,
    window: int | None,
) -> None:
    """Fill the rows of a table [rows, CHOICE_FIELDS] in `chosen` and `counts`, see `_Picked`."""
    num_rows, num_heads, d = q.shape
    num_kv_heads = chosen.shape[1]
    group = num_heads // num_kv_heads
    most = triton.cdiv(tables.most_chunks, PITCH.value) * PITCH.value
    blocks = triton.cdiv(most, SCORE_CHUNKS * SCORE_STEPS)
    scores = torch.empty(num_rows, num_heads, most, dtype=torch.float32, device=q.device)
    peaks = torch.empty(num_rows, num_heads, blocks, 2, dtype=torch.float32, device=q.device)
    ranks = torch.empty(num_rows, num_kv_heads, most, dtype=torch.float32, device=q.device)
    heads = {"NUM_KV_HEADS": num_kv_heads, "GROUP": group}
    with torch.cuda.device_of(q):
        score_chunks[(num_rows, num_kv_heads, blocks)](
            table, q, positions, scores, peaks, most, window or 0, 1 / math.sqrt(d),
            DTYPE=DTYPES[key.dtype], HAS_SCALE=key.has_scale, HAS_WINDOW=window is not None, CHUNK=key.chunk,
            HEAD_DIM=d, **heads, HINT=math.gcd(16, d * key.dtype.itemsize), WIDE=triton.knobs.runtime.interpret,
            STEPS=SCORE_STEPS, BLOCK_M=max(TILE, triton.next_power_of_2(group)), BLOCK_C=SCORE_CHUNKS,
            BLOCK_D=max(TILE, triton.next_power_of_2(d)),
            BLOCK_O=triton.next_power_of_2(tables.most_hidden) if key.hides else 0,
            num_warps=8 if q.dtype == torch.float32 else 4,  # fewer would spill registers
        )  # fmt: skip
        rank_chunks[(num_rows, num_kv_heads, triton.cdiv(most, RANK_CHUNKS))](
            table, positions, scores, peaks, ranks, most, blocks,
            **heads, BLOCK_C=RANK_CHUNKS, BLOCK_P=256, num_warps=4,
        )  # fmt: skip
    choose_ranked(table, positions, ranks, chosen, counts)


def choose_ranked(table: Tensor, positions: Tensor, ranks: Tensor, chosen: Tensor, counts: Tensor) -> None:
    """Fill `chosen` and `counts` with the best chunks by ranks [rows, Hkv, C], C a multiple of PITCH; see `choose`."""
    num_rows, num_kv_heads, most = ranks.shape
    at_once = most <= CHOOSE_CHUNKS
    block = max(LIST_CHUNKS, triton.next_power_of_2(most)) if at_once else CHOOSE_LOOP_CHUNKS
    parts = triton.cdiv(most, LIST_CHUNKS)
    bounds = torch.empty(num_rows, num_kv_heads, BOUND_FIELDS.value, dtype=torch.int32, device=ranks.device)
    before = torch.empty(num_rows, num_kv_heads, parts, 2, dtype=torch.int32, device=ranks.device)
    with torch.cuda.device_of(ranks):
        bound_ranks[(num_rows, num_kv_heads)](
            table, positions, ranks, bounds, before, most, parts,
            NUM_KV_HEADS=num_kv_heads, BOTH=CHOOSE_BOTH, AT_ONCE=at_once, BLOCK_C=block, BLOCK_L=LIST_CHUNKS,
            num_warps=max(4, block // WARP_CHUNKS) if at_once else 16,
        )  # fmt: skip
        list_chunks[(num_rows, num_kv_heads, parts)](
            table, positions, ranks, bounds, before, chosen, counts, most, chosen.shape[2],
            NUM_KV_HEADS=num_kv_heads, BLOCK_L=LIST_CHUNKS, num_warps=LIST_WARPS,
        )  # fmt: skip


def _layout(key: AttendKey, layout: Layout, head_dim: int) -> tuple[Any, ...]:
    """As the kernels take it, see `tiles`."""
    # blocks of keys begin at multiples of 32 rows of a region, and where they are chosen a chunk is in one group
    sharing = math.gcd(layout.group, key.chunk if key.chosen else 32, 32) if layout.kind == "channel" else 1
    numbers = (layout.bits, layout.group, layout.rank, layout.balanced, layout.alignment(head_dim), sharing)
    return (KINDS[layout.kind], DTYPES[layout.dtype], *numbers)
