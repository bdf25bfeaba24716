"""Fetching chunks from host memory, against one copy of as many bytes; needs compiled kernels.

Every call wants chunks that the hot set does not hold: windows over all chunks in turn, of which it holds two of four.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import cycle

import torch
from torch import Tensor

from ..compression.codec_slots import CodecFilling
from ..compression.slots import Affine, Dense
from ..kernels.dispatch import TRITON, runs
from ..kernels.hot_set import HotView, Records, fetch_chosen, hot_fields, pack_records
from .kernel_cases import CHUNK, GROUP, Case, Inputs, folder

SEQUENCES = 8
WINDOWS = 4
CODECS: Mapping[str, tuple[CodecFilling, int]] = {
    "4-bit values": (Affine(bits=4, axis="token", group=GROUP), CHUNK),
    "16-bit values": (Dense(), 2 * CHUNK),
}


def host_cases(given: Inputs) -> Iterator[Case]:
    """One layer's chunks of several sequences."""
    if not runs(TRITON, given.device):
        return
    for name, (codec, chunk) in CODECS.items():
        num_wanted = given.num_tokens // chunk // WINDOWS
        if num_wanted:
            yield _case(given, f"hot_set, {num_wanted} chunks of {chunk} × {SEQUENCES}, {name}", codec, chunk)


def _case(given: Inputs, name: str, codec: CodecFilling, chunk: int) -> Case:
    num_chunks, heads = given.num_tokens // chunk, given.config.num_kv_heads
    rows = codec.build().encode(given.kv()[: num_chunks * chunk], {})
    layout, num_wanted = Records.of(rows, chunk), num_chunks // WINDOWS
    host = _pinned(pack_records(tuple(rows.values()), chunk), given.device)
    views = [_view(given, layout, host, num_chunks, 2 * num_wanted) for _ in range(SEQUENCES)]
    table = torch.tensor([hot_fields(view) for view in views], device=given.device)
    counts = torch.full((SEQUENCES, heads), num_wanted, dtype=torch.int32, device=given.device)
    each = torch.arange(WINDOWS * num_wanted, dtype=torch.int32, device=given.device).view(WINDOWS, 1, 1, num_wanted)
    windows = each.expand(-1, SEQUENCES, heads, -1).contiguous()
    places, turn = torch.empty_like(windows[0]), cycle(range(WINDOWS))

    def fetch(views: object = views, host: object = host) -> None:  # kept alive: kernels have addresses alone
        fetch_chosen(layout.key, table, windows[next(turn)], counts, places, None, 2 * num_wanted)

    fetched = SEQUENCES * heads * num_wanted * layout.key.record_nbytes
    return Case(name, folder(fetch_chosen), fetch, 0.0, reference=_copy(given, fetched), link_bytes=float(fetched))


def _view(given: Inputs, layout: Records, host: Tensor, num_chunks: int, num_slots: int) -> HotView:
    heads = given.config.num_kv_heads
    hot = layout.empty(num_slots * layout.chunk, heads, given.device)
    used = torch.full((heads, num_slots + 1), -1, dtype=torch.int32, device=given.device)
    used[:, -1] = 0
    return HotView(
        layout.key,
        torch.tensor([host.data_ptr()], device=given.device),
        num_chunks,
        torch.full((num_chunks, heads), -1, dtype=torch.int16, device=given.device),
        torch.full((heads, num_slots), -1, dtype=torch.int32, device=given.device),
        used,
        tuple(hot.values()),
    )


def _copy(given: Inputs, count: int) -> Callable[[], object]:
    """As many bytes in one piece, by the device's copy engine."""
    source = _pinned(torch.zeros(count, dtype=torch.uint8), given.device)
    target = torch.empty(count, dtype=torch.uint8, device=given.device)
    return lambda: target.copy_(source, non_blocking=True)


def _pinned(x: Tensor, device: torch.device) -> Tensor:
    """In host memory that the device reads."""
    return x.cpu().pin_memory() if device.type == "cuda" else x.cpu()
