"""The compiled choice of chunks against the reference."""

from __future__ import annotations

import pytest
import torch

from kvsluice.kernels.landmarks import reference, select_chunks


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(6)


def distinct(generator, rows, heads, n):
    """Scores that no rounding reorders: multiples of a step of the head's own, each once."""
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(rows * heads)])
    steps = (1 + torch.arange(heads) / 77) * 12 / n
    return order.view(rows, heads, n) * steps[:, None]


def check(compiled, scores, num_kv_heads, num_chunks, hidden):
    got, valid = compiled(select_chunks, scores, num_kv_heads, num_chunks, hidden)
    want, want_valid = reference.select_chunks(scores, num_kv_heads, min(num_chunks, scores.shape[2]), hidden)
    assert got.dtype == torch.int64 and torch.equal(got, want)
    assert (valid is None) == (want_valid is None)
    assert valid is None or (valid.dtype == torch.bool and torch.equal(valid, want_valid))


@pytest.mark.parametrize(("group", "kv_heads"), [(1, 2), (3, 3), (4, 1), (8, 2)])
@pytest.mark.parametrize(("n", "wanted"), [(1, 1), (7, 9), (130, 33), (1024, 1024), (2500, 100)])
@pytest.mark.parametrize("share_hidden", [None, 0.3])
def test_equals_a_sort(compiled, device, generator, group, kv_heads, n, wanted, share_hidden):
    scores = distinct(generator, 1 if n > 1000 else 2, kv_heads * group, n).to(device)
    hidden = None
    if share_hidden is not None:
        hidden = (torch.rand(len(scores), kv_heads, n, generator=generator) < share_hidden).to(device)
    check(compiled, scores, kv_heads, wanted, hidden)


@pytest.mark.parametrize("wanted", [1, 5, 40, 64])
def test_one_mask_for_all_rows_hides_what_scores_best(compiled, device, generator, wanted):
    scores = distinct(generator, 3, 4, 64).to(device)
    hidden = torch.zeros(1, 2, 64, dtype=torch.bool, device=device)
    hidden[0, 0, ::3] = True
    hidden[0, 1] = True
    scores[:, :, ::3] += 1e4
    check(compiled, scores, 2, wanted, hidden)


def test_ties_go_to_the_lower_chunk_across_blocks(compiled, device):
    scores = torch.zeros(1, 2, 9000, device=device)
    check(compiled, scores, 1, 4500, None)
    scores[:, :, 5::7] = 2.0
    for wanted in (1, 1285, 1286, 5000):
        check(compiled, scores, 1, wanted, None)


def test_shares_that_underflow_still_rank_above_the_hidden(compiled, device):
    scores = torch.full((1, 1, 5), -1e4, device=device)
    scores[0, 0, 1] = 1e4
    hidden = torch.tensor([[[True, False, True, False, True]]], device=device)
    check(compiled, scores, 1, 4, hidden)
    check(compiled, scores, 1, 4, torch.ones_like(hidden))


def test_rows_together_choose_what_each_chooses_alone(compiled, device, generator):
    scores = torch.randn(5, 6, 3001, generator=generator).to(device)
    hidden = (torch.rand(5, 2, 3001, generator=generator) < 0.5).to(device)
    together, valid = compiled(select_chunks, scores, 2, 64, hidden)
    assert valid.all()
    for i in (0, 3, 4):
        alone, _ = compiled(select_chunks, scores[i : i + 1], 2, 64, hidden[i : i + 1])
        assert torch.equal(together[i], alone[0])


def test_scores_that_are_no_numbers_write_nothing_elsewhere(compiled, device):
    scores = torch.full((2, 2, 70), torch.nan, device=device)
    scores[1] = -torch.nan
    chunks, _ = compiled(select_chunks, scores, 1, 20, None)
    assert chunks.min() >= 0 and chunks.max() < 70


@pytest.mark.parametrize("shape", [(0, 4, 10), (2, 4, 0)])
def test_nothing_to_choose_from(compiled, device, shape):
    chunks, valid = compiled(select_chunks, torch.empty(shape, device=device), 2, 3, None)
    assert chunks.shape == (shape[0], 2, min(3, shape[2])) and valid is None
