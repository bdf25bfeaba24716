"""Sparse attention: chosen chunks of several segments, each read once, against dense attention over the same rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvsluice.kernels.attention_partial import attention_partial
from kvsluice.kernels.sparse_reconstruct import ChunkSegment, low_rank_chunks, sparse_attention


class Rows:
    """Plain rows [n, Hkv, d] that remember which (head, chunk) was read."""

    def __init__(self, rows: Tensor, chunk: int) -> None:
        self.rows, self.chunk = rows, chunk
        self.seen: list[tuple[int, int]] = []

    def read(self, heads: Tensor, chunks: Tensor) -> Tensor:
        self.seen += zip(heads.tolist(), chunks.tolist(), strict=True)
        at = chunks[:, None] * self.chunk + torch.arange(self.chunk)
        return self.rows[at, heads[:, None]]


def negate(x: Tensor, positions: Tensor) -> Tensor:
    """A stand-in for RoPE that shows whether it was applied, and where."""
    return x * (1 + positions[:, None, None])


@pytest.mark.parametrize("rotated", [True, False])
def test_reads_each_choice_once_from_the_segment_that_holds_it(rotated: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    chunk, dim = 4, 16
    k, v = torch.randn(2, 40, 2, dim, generator=generator)
    scale = torch.ones(40) if rotated else 1.0 / (1 + torch.arange(40))
    stored = k * scale[:, None, None]
    parts = []
    for begin, end in ((0, 24), (24, 40)):
        keys, values = Rows(stored[begin:end], chunk), Rows(v[begin:end], chunk)
        parts.append(
            ChunkSegment(
                keys, values, (end - begin) // chunk, lambda c, b=begin: b + c * 4, None if rotated else negate
            )
        )
    chunks = torch.tensor([[[0, 5, 6, 9], [1, 2, 7, 8]], [[0, 1, 2, 3], [6, 7, 8, 9]]])
    valid = torch.ones_like(chunks, dtype=torch.bool)
    valid[0, 0, 2] = False
    q, positions = torch.randn(2, 6, dim, generator=generator), torch.tensor([39, 33])
    out, lse = sparse_attention(q, positions, chunks, valid, parts, chunk, window=30)
    for row in range(2):
        for head in range(2):
            rows = (chunks[row, head][valid[row, head]][:, None] * 4 + torch.arange(4)).flatten()
            mine = q[row : row + 1, head * 3 : head * 3 + 3]
            expected, expected_lse = attention_partial(
                mine, k[rows, head][None], v[rows, head][None], rows, positions[row : row + 1], 30
            )
            assert torch.allclose(out[row, head * 3 : head * 3 + 3], expected[0], atol=1e-5)
            assert torch.allclose(lse[row, head * 3 : head * 3 + 3], expected_lse[0], atol=1e-5)
    reads = [part.keys.seen for part in parts]
    assert sum(map(len, reads)) == int(valid.sum()) and reads == [part.values.seen for part in parts]


def test_one_segment_of_which_all_choices_are_valid_gives_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(3)
    k, v = torch.randn(2, 40, 2, 16, generator=generator)
    part = ChunkSegment(Rows(k, 4), Rows(v, 4), 10, lambda c: c * 4, negate)
    chunks = torch.stack([torch.randperm(10, generator=generator)[:6].sort().values for _ in range(6)]).view(3, 2, 6)
    q, positions = torch.randn(3, 6, 16, generator=generator), torch.tensor([39, 50, 20])
    got = sparse_attention(q, positions, chunks, None, [part], 4)
    expected = sparse_attention(q, positions, chunks, torch.ones_like(chunks, dtype=torch.bool), [part], 4)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_low_rank_chunks_multiply_each_entry_by_its_heads_basis() -> None:
    generator = torch.Generator().manual_seed(2)
    factors, basis = torch.randn(5, 4, 6, generator=generator), torch.randn(6, 3, 8, generator=generator)
    heads = torch.tensor([2, 0, 1, 2, 2])
    got = low_rank_chunks(factors, basis, heads)
    for entry, head in enumerate(heads):
        assert torch.allclose(got[entry], factors[entry] @ basis[:, head], atol=1e-5)


def test_refuses_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="segments"):
        sparse_attention(
            torch.zeros(1, 2, 4),
            torch.zeros(1, dtype=torch.int64),
            torch.zeros(1, 1, 1, dtype=torch.int64),
            torch.ones(1, 1, 1, dtype=torch.bool),
            [],
            4,
        )
    with pytest.raises(ValueError, match="fit"):
        low_rank_chunks(torch.zeros(1, 4, 5), torch.zeros(6, 1, 8), torch.zeros(1, dtype=torch.int64))
