"""The choice of chunks of a decode step against a sort, where chunks are many, few, hidden or equally good."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
choose = pytest.importorskip("kvsluice.kernels.step_attention.triton.choose")

HEADS = 2
BLOCK, PART = 2048, 512


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


def choose_best(table, positions, ranks, chosen, found, at_once, both=True) -> None:
    """What `launch` does with ranks [rows, HEADS, most]; BLOCK chunks are looked at at once, or all."""
    rows, _, most = ranks.shape
    parts = -(-most // PART)
    bounds = torch.full((rows, HEADS, choose.BOUND_FIELDS.value), -7, dtype=torch.int32, device=ranks.device)
    before = torch.full((rows, HEADS, parts, 2), 1 << 20, dtype=torch.int32, device=ranks.device)
    choose.bound_ranks[(rows, HEADS)](
        table, positions, ranks, bounds, before, most, parts,
        NUM_KV_HEADS=HEADS, BOTH=both, AT_ONCE=at_once,
        BLOCK_C=max(PART, triton.next_power_of_2(most)) if at_once else BLOCK, BLOCK_L=PART, num_warps=4,
    )  # fmt: skip
    choose.list_chunks[(rows, HEADS, parts)](
        table, positions, ranks, bounds, before, chosen, found, most, chosen.shape[2],
        NUM_KV_HEADS=HEADS, BLOCK_L=PART, num_warps=4,
    )  # fmt: skip


def check(ranks, counts, wanted, at_once, device, both=True) -> None:
    """The chunks that are listed for ranks [rows, HEADS, most], of which `counts` are there, are those of a sort."""
    table = torch.zeros(len(counts), choose.CHOICE_FIELDS.value, dtype=torch.int64)
    table[:, choose.COUNT.value] = torch.tensor(counts)
    table[:, choose.WANTED.value] = torch.tensor(wanted)
    chosen = torch.full((len(counts), HEADS, max(wanted)), -7, dtype=torch.int32, device=device)
    found = torch.full((len(counts), HEADS), -7, dtype=torch.int32, device=device)
    positions = torch.zeros(len(counts), dtype=torch.int64, device=device)
    choose_best(table.to(device), positions, ranks.to(device), chosen, found, at_once, both)
    for row, (count, number) in enumerate(zip(counts, wanted, strict=True)):
        for head in range(HEADS):
            best = expected(ranks[row, head, :count], number)
            untouched = number == 0
            assert found[row, head] == (-7 if untouched else len(best))
            assert chosen[row, head, : len(best)].tolist() == best.tolist()
            assert (chosen[row, head, len(best) :] == -7).all()


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
    check(ranks_of(len(counts), most, device), counts, wanted, at_once, device)


def tied_ranks(name: str, count: int) -> torch.Tensor:
    """Ranks [count] that a search by guessing finds hard."""
    generator = torch.Generator().manual_seed(count)
    scores = torch.randn(count, generator=generator)
    ranks = {
        "softmax": torch.softmax(2 * scores, 0),
        "close": 0.5 + torch.randint(0, 40, (count,), generator=generator) * 2.0**-24,  # neighbours among floats
        "same": torch.full((count,), 1 / count),
        "zero": torch.zeros(count),
        "one": torch.ones(count),
        "sink": torch.softmax(scores + 30 * (torch.arange(count) == 5), 0),
        "vanishing": torch.softmax(40 * scores, 0),  # most are 0
        "steps": (scores.clamp(0, 3) * 2).round() / 8,
        "sampled": torch.where(torch.arange(count) % 16 < 8, 1.0, 1e-6 * scores.abs()),
        "hidden": torch.full((count,), -1.0),
    }[name].clone()
    if name != "hidden":
        ranks[2::11] = -1.0
    return ranks


@pytest.mark.parametrize(("at_once", "both"), [(False, True), (True, True), (True, False)])
def test_any_ranks_are_chosen_as_a_sort_would(at_once, both, device):
    names = ("softmax", "close", "same", "zero", "one", "sink", "vanishing", "steps", "sampled", "hidden")
    count = 2 * BLOCK + 29
    most = -(-count // choose.PITCH.value) * choose.PITCH.value
    ranks = torch.full((len(names) // 2 * 2, HEADS, most), 5.0)  # what lies behind the last chunk counts for nothing
    for row in range(len(ranks)):
        for head in range(HEADS):
            ranks[row, head, :count] = tied_ranks(names[(row + head) % len(names)], count)
    check(ranks, [count - row for row in range(len(ranks))], [256, 1, 257, 3999, 2 * PART] * 2, at_once, device, both)


def test_ranks_that_all_reach_fill_a_block(device):
    """As many chunks as a block may have, all the same: their number takes every bit that it is counted in."""
    count = 1 << 15
    ranks = torch.full((1, HEADS, count), 0.25)
    ranks[0, 1, 7:] = 0.5
    check(ranks, [count], [9], True, device)


@pytest.mark.parametrize("every", [1, 4])
def test_a_choice_is_kept_for_a_block_of_positions(every, device):
    count, wanted = 3 * PART, 40
    table = torch.zeros(1, choose.CHOICE_FIELDS.value, dtype=torch.int64)
    kept = torch.full((HEADS, wanted), -7, dtype=torch.int32, device=device)
    state = torch.full((HEADS, 2), -1, dtype=torch.int32, device=device)
    table[0, choose.COUNT.value], table[0, choose.WANTED.value] = count, wanted
    table[0, choose.KEPT.value], table[0, choose.STATE.value] = kept.data_ptr(), state.data_ptr()
    table[0, choose.EVERY.value] = every
    best = None
    for position in range(8):
        ranks = torch.rand(1, HEADS, count, generator=torch.Generator().manual_seed(position)).to(device)
        chosen = torch.full((1, HEADS, wanted), -7, dtype=torch.int32, device=device)
        found = torch.empty(1, HEADS, dtype=torch.int32, device=device)
        positions = torch.tensor([position], device=device)
        choose_best(table.to(device), positions, ranks, chosen, found, True)
        if position % every == 0:
            best = [expected(ranks[0, head].cpu(), wanted).tolist() for head in range(HEADS)]
            assert state.tolist() == [[wanted, position]] * HEADS
        assert (found == wanted).all()
        assert chosen[0].tolist() == kept.tolist() == best


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
        choose_best(table.to(device), positions, ranks, chosen[:1], found, at_once)
        assert (found == wanted).all()
        assert chosen[0].tolist() == [[1, 2, 4, 5, 7]] * HEADS
        assert (chosen[1] == -7).all()
