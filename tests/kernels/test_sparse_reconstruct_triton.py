"""Sparse attention of all rows at once against the reference, which takes them one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvsluice.kernels.sparse_reconstruct import ChunkSegment, reference, sparse_attention

CHUNK, DIM = 4, 64


class Rows:
    """Plain rows [n, Hkv, d]."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def read(self, heads: Tensor, chunks: Tensor) -> Tensor:
        at = chunks[:, None] * CHUNK + torch.arange(CHUNK, device=chunks.device)
        return self.rows[at, heads[:, None]]


def turn(x: Tensor, positions: Tensor) -> Tensor:
    """A stand-in for RoPE that shows whether it was applied, and where."""
    return x * (1 + positions[:, None, None] / 40)


@pytest.fixture
def segments(device):
    k, v = torch.randn(2, 60, 2, DIM, generator=torch.Generator().manual_seed(1)).to(device)
    return [
        ChunkSegment(Rows(k[:24]), Rows(v[:24]), 6, lambda c: c * CHUNK, turn),
        ChunkSegment(Rows(k[24:40]), Rows(v[24:40]), 4, lambda c: 24 + c * CHUNK, turn),
        ChunkSegment(Rows(k[40:]), Rows(v[40:]), 5, lambda c: 40 + c * CHUNK, None),
    ]


@pytest.fixture
def rows(device):
    generator = torch.Generator().manual_seed(2)
    q, positions = torch.randn(5, 6, DIM, generator=generator), torch.tensor([59, 40, 61, 20, 70])
    chunks = torch.stack([torch.randperm(15, generator=generator)[:7].sort().values for _ in range(10)]).view(5, 2, 7)
    valid = torch.rand(5, 2, 7, generator=generator) > 0.3
    return q.to(device), positions.to(device), chunks.to(device), valid.to(device)


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("all_valid", [False, True])
def test_segments_and_choices(compiled, segments, rows, window, all_valid):
    q, positions, chunks, valid = rows
    valid = None if all_valid else valid
    got = compiled(sparse_attention, q, positions, chunks, valid, segments, CHUNK, window)
    want = reference.sparse_attention(q, positions, chunks, valid, segments, CHUNK, window)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_rows_together_equal_rows_alone_bit_for_bit_also_where_memory_holds_few(compiled, segments, rows, monkeypatch):
    q, positions, chunks, valid = rows
    out, lse = compiled(sparse_attention, q, positions, chunks, valid, segments, CHUNK)
    for i in range(5):
        at = slice(i, i + 1)
        one = compiled(sparse_attention, q[at], positions[at], chunks[at], valid[at], segments, CHUNK)
        assert torch.equal(out[at], one[0]) and torch.equal(lse[at], one[1])
    monkeypatch.setattr("kvsluice.kernels.sparse_reconstruct.triton.DECODED_BYTES", 2 * 4 * 2 * 7 * CHUNK * DIM)
    again = compiled(sparse_attention, q, positions, chunks, valid, segments, CHUNK)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


def test_a_segment_without_chunks_is_passed_over(compiled, segments, rows):
    q, positions, chunks, valid = rows
    nothing = torch.empty(0, 2, DIM, device=q.device)
    empty = ChunkSegment(Rows(nothing), Rows(nothing), 0, lambda c: c * CHUNK, turn)
    want = compiled(sparse_attention, q, positions, chunks, valid, segments, CHUNK)
    got = compiled(sparse_attention, q, positions, chunks, valid, [empty, segments[0], empty, *segments[1:]], CHUNK)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
