"""Chunks in host memory: what is fetched, what makes room for it, and that the bits are the same."""

from __future__ import annotations

import pytest
import torch

from kvsluice.kernels.hot_set import (
    HOT_FIELDS,
    HotView,
    Records,
    fetch_chosen,
    gather_records,
    hot_fields,
    pack_records,
)
from kvsluice.kernels.hot_set.reference import HotHead

pytest.importorskip("triton")
kernels = pytest.importorskip("kvsluice.kernels.hot_set.triton")

HEADS = 2


def rows_of(kind: str, num_rows: int, device) -> dict[str, torch.Tensor]:
    """Packed rows as codecs make them."""
    generator = torch.Generator().manual_seed(num_rows)
    if kind == "dense":
        return {"rows": torch.randn(num_rows, HEADS, 48, generator=generator).bfloat16().to(device)}
    codes = torch.randint(256, (num_rows, HEADS, 16), generator=generator, dtype=torch.uint8)
    scale, minimum = torch.rand(2, num_rows, HEADS, 1, generator=generator).half()
    return {"codes": codes.to(device), "scale": scale.to(device), "minimum": minimum.to(device)}


class Sequence:
    """One layer of one sequence with `num_chunks` chunks on the host, in pages of `page_chunks`."""

    def __init__(self, kind: str, chunk: int, num_chunks: int, page_chunks: int, num_slots: int, device) -> None:
        self.rows = rows_of(kind, num_chunks * chunk, device)
        layout = Records.of(self.rows, chunk)
        records = pack_records(tuple(self.rows.values()), chunk).cpu()
        self.pages = [records[i : i + page_chunks].contiguous() for i in range(0, num_chunks, page_chunks)]
        if device.type == "cuda":
            self.pages = [page.pin_memory() for page in self.pages]
        self.hot = layout.empty(num_slots * chunk, HEADS, device)
        self.chunk = chunk
        self.view = HotView(
            layout.key,
            torch.tensor([page.data_ptr() for page in self.pages], device=device),
            page_chunks,
            torch.full((num_chunks, HEADS), -1, dtype=torch.int16, device=device),
            torch.full((HEADS, num_slots), -1, dtype=torch.int32, device=device),
            torch.full((HEADS, num_slots + 1), -1, dtype=torch.int32, device=device),
            tuple(self.hot.values()),
        )
        self.view.used[:, -1] = 0
        self.heads = [HotHead(num_slots) for _ in range(HEADS)]

    def chunk_bytes(self, tensors, head: int, index: int) -> list[bytes]:
        rows = slice(index * self.chunk, (index + 1) * self.chunk)
        return [t[rows, head].contiguous().cpu().view(torch.uint8).numpy().tobytes() for t in tensors.values()]


@pytest.mark.parametrize(
    ("kind", "chunk", "at_once"), [("affine", 4, True), ("dense", 8, True), ("affine", 1, True), ("affine", 4, False)]
)
def test_slots_hold_what_was_chosen_and_the_oldest_make_room(kind, chunk, at_once, device, monkeypatch):
    if not at_once:
        monkeypatch.setattr(kernels, "FEW_PAIRS", 0)
        monkeypatch.setattr(kernels, "FETCH_PROGRAMS", 5)
        monkeypatch.setattr(kernels, "FETCH_PARTS", 2)
        monkeypatch.setattr(kernels, "FETCH_BYTES", 256)
    generator = torch.Generator().manual_seed(chunk)
    sequences = [Sequence(kind, chunk, 37, 5, 8, device), Sequence(kind, chunk, 20, 16, 8, device)]
    key = sequences[0].view.key
    fields = [hot_fields(sequences[0].view), [0] * HOT_FIELDS, hot_fields(sequences[1].view)]
    table = torch.tensor(fields, device=device)
    totals = torch.zeros(2, dtype=torch.int64, device=device)
    wanted = fetched = 0
    for _ in range(40):
        chosen = torch.full((3, HEADS, 6), -7, dtype=torch.int32)
        counts = torch.randint(0, 7, (3, HEADS), generator=generator, dtype=torch.int32)
        picks: dict[tuple[int, int], list[int]] = {}
        for row, sequence in ((0, sequences[0]), (2, sequences[1])):
            for head in range(HEADS):
                few = torch.randperm(len(sequence.view.slots) // 2 + 4, generator=generator)[: int(counts[row, head])]
                picks[row, head] = sorted(few.tolist())
                chosen[row, head, : len(few)] = torch.tensor(picks[row, head], dtype=torch.int32)
        places = torch.full_like(chosen, -5).to(device)
        fetch_chosen(key, table, chosen.to(device), counts.to(device), places, totals, 8)
        assert (places[1] == -5).all(), "a row without a hot set is left alone"
        for (row, head), chunks in picks.items():
            sequence = sequences[row // 2]
            slots, missing = sequence.heads[head].want(chunks)
            assert places[row, head, : len(chunks)].tolist() == slots
            wanted, fetched = wanted + len(chunks), fetched + len(missing)
            for index, slot in zip(chunks, slots, strict=True):
                want = sequence.chunk_bytes(sequence.rows, head, index)
                assert sequence.chunk_bytes(sequence.hot, head, slot) == want
    assert totals.tolist() == [wanted, fetched]
    for sequence in sequences:
        assert sequence.view.held.tolist() == [head.held for head in sequence.heads]


def test_chunks_of_another_segment_are_left_alone(device):
    sequence = Sequence("affine", 4, 10, 4, 4, device)
    chosen = torch.tensor([[[3, 10, 12]] * HEADS], dtype=torch.int32, device=device)
    counts = torch.full((1, HEADS), 3, dtype=torch.int32, device=device)
    places = torch.full_like(chosen, -5)
    fetch_chosen(
        sequence.view.key, torch.tensor([hot_fields(sequence.view)], device=device), chosen, counts, places, None, 4
    )
    assert places.tolist() == [[[0, -5, -5]] * HEADS]


def test_slots_that_are_older_than_ages_count_are_taken_in_order(device):
    sequence = Sequence("affine", 4, 30, 30, 4, device)
    table = torch.tensor([hot_fields(sequence.view)], device=device)
    counts = torch.ones(1, HEADS, dtype=torch.int32, device=device)

    def want(chunk: int) -> int:
        chosen = torch.full((1, HEADS, 1), chunk, dtype=torch.int32, device=device)
        places = torch.empty_like(chosen)
        fetch_chosen(sequence.view.key, table, chosen, counts, places, None, 4)
        assert sequence.heads[0].want([chunk])[0] == places[0, 0].tolist()
        return int(places[0, 0, 0])

    assert [want(chunk) for chunk in (0, 1, 2, 3)] == [0, 1, 2, 3]
    for _ in range(300):
        assert want(3) == 3
    assert [want(chunk) for chunk in (7, 8)] == [0, 1]


def test_records_give_back_their_rows(device):
    rows = rows_of("affine", 12, device)
    layout = Records.of(rows, 4)
    assert layout.key.record_nbytes == 80
    records = pack_records(tuple(rows.values()), 4)
    found = gather_records(records[[2, 0], [1, 0]], layout)
    for name, tensor in rows.items():
        want = torch.cat((tensor[8:12, 1:2], tensor[0:4, 0:1]))
        assert torch.equal(found[name], want)
