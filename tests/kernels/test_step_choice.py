"""The choice of chunks of a decode step against a sort, where chunks are many, few, hidden or equally good."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
choose = pytest.importorskip("kvsluice.kernels.step_attention.triton.choose")

HEADS = 2
BLOCK = 2048


def expected(ranks: torch.Tensor, wanted: int) -> torch.Tensor:
    """The best chunks of one head, ascending; ties go to the lower chunk."""
    order = torch.sort(ranks, descending=True, stable=True).indices
    return order[: min(wanted, int((ranks >= 0).sum()))].sort().values


def ranks_of(rows: int, most: int, device: torch.device) -> torch.Tensor:
    """float32 [rows, HEADS, most]: the first head's differ, the second's are often the same; a third is hidden."""
    ranks = torch.rand(rows, HEADS, most, generator=torch.Generator().manual_seed(0)).pow(8)
    ranks[:, 1] = (ranks[:, 1] * 50).round() / 50
    ranks[:, :, ::3] = -1.0
    ranks[:, 0, 1] = 1.0
    return ranks.to(device)


@pytest.mark.parametrize(
    ("counts", "wanted"),
    [
        ([5000, 2049, 2048], [512, 2049, 1]),  # several blocks
        ([300, 7, 100], [64, 7, 100]),
        ([1, 40, 3], [5, 0, 2]),  # a single chunk, which is hidden; a row of another table
    ],
)
@pytest.mark.parametrize("at_once", [False, True])
def test_the_best_chunks_are_chosen(counts, wanted, at_once, device):
    most = -(-(max(counts) + 3) // choose.PITCH.value) * choose.PITCH.value
    block = triton.next_power_of_2(most) if at_once else BLOCK
    ranks = ranks_of(len(counts), most, device)
    table = torch.zeros(len(counts), choose.CHOICE_FIELDS.value, dtype=torch.int64)
    table[:, choose.COUNT.value] = torch.tensor(counts)
    table[:, choose.WANTED.value] = torch.tensor(wanted)
    chosen = torch.full((len(counts), HEADS, max(wanted)), -7, dtype=torch.int32, device=device)
    found = torch.full((len(counts), HEADS), -7, dtype=torch.int32, device=device)
    positions = torch.zeros(len(counts), dtype=torch.int64, device=device)
    choose.choose_chunks[(len(counts), HEADS)](
        table.to(device), positions, ranks, chosen, found, most, max(wanted),
        NUM_KV_HEADS=HEADS, AT_ONCE=at_once, BLOCK_C=block, BLOCK_L=1024, num_warps=4,
    )  # fmt: skip
    for row, (count, number) in enumerate(zip(counts, wanted, strict=True)):
        for head in range(HEADS):
            best = expected(ranks[row, head, :count], number)
            untouched = number == 0
            assert found[row, head] == (-7 if untouched else len(best))
            assert chosen[row, head, : len(best)].tolist() == best.tolist()
            assert (chosen[row, head, len(best) :] == -7).all()


def test_scores_that_are_no_numbers_are_chosen_within_the_room_there_is(device):
    """A query that is no number has no best chunks; what is chosen for it must not run into another row's."""
    most, wanted = 2 * choose.PITCH.value, 5
    table = torch.zeros(1, choose.CHOICE_FIELDS.value, dtype=torch.int64)
    table[:, choose.COUNT.value], table[:, choose.WANTED.value] = 40, wanted
    positions = torch.zeros(1, dtype=torch.int64, device=device)
    scores = torch.full((1, HEADS, most), float("nan"), device=device)
    scores[:, :, ::3] = float("-inf")  # hidden
    peaks = torch.full((1, HEADS, 1, 2), float("nan"), device=device)
    ranks = torch.full((1, HEADS, most), 9.0, device=device)
    choose.rank_chunks[(1, HEADS, 1)](
        table.to(device), positions, scores, peaks, ranks, most, 1,
        NUM_KV_HEADS=HEADS, GROUP=1, BLOCK_C=BLOCK, BLOCK_P=16, num_warps=4,
    )  # fmt: skip
    assert ranks[0, :, :40].isfinite().all() and (ranks[0, :, :40] <= 1).all()
    chosen = torch.full((2, HEADS, wanted), -7, dtype=torch.int32, device=device)
    found = torch.empty(1, HEADS, dtype=torch.int32, device=device)
    for at_once in (False, True):
        choose.choose_chunks[(1, HEADS)](
            table.to(device), positions, ranks, chosen, found, most, wanted,
            NUM_KV_HEADS=HEADS, AT_ONCE=at_once, BLOCK_C=BLOCK, BLOCK_L=1024, num_warps=4,
        )  # fmt: skip
        assert (found == wanted).all()
        assert chosen[0].tolist() == [[1, 2, 4, 5, 7]] * HEADS
        assert (chosen[1] == -7).all()
