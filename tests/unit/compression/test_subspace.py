"""The leading subspace of keys: near the best, orthonormal whatever the rows, the same bits again, and no waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvsluice.compression import slots as s
from kvsluice.compression.budgets import others
from kvsluice.compression.lowrank import cosine_basis, gram_matrix
from kvsluice.compression.subspace import _start, leading_subspace

WIDTH, RANK = 128, 20


def keys(spectrum: Tensor, n: int = 600, shared: float = 0.0) -> Tensor:
    """[n, WIDTH] with such singular values, and a few channels with an offset that all rows share."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    rows = torch.randn(n, WIDTH, generator=generator) * spectrum @ turn
    rows[:, ::30] += shared * spectrum.norm()
    return rows


def missed(rows: Tensor, columns: Tensor) -> float:
    flat, columns = rows.double(), columns.double()
    return float((flat - flat @ columns @ columns.T).norm())


at = torch.arange(1, WIDTH + 1).float()
SPECTRA = {
    "white": (keys(torch.ones(WIDTH)), 1.02),
    "slow": (keys(at**-0.5), 1.01),
    "fast": (keys(at**-1.0), 1.01),
    "exponential": (keys(torch.exp(-at / 15)), 1.01),
    "shared": (keys(at**-0.5, shared=5.0), 1.01),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_it_misses_little_more_than_the_singular_vectors(name: str) -> None:
    rows, most = SPECTRA[name]
    best = float(torch.linalg.svdvals(rows.double())[RANK:].norm())
    assert best * (1 - 1e-6) <= missed(rows, leading_subspace(gram_matrix(rows), RANK)) <= most * best


def noise(n: int, width: int = WIDTH) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(1))


EXTREMES = {
    "zero": torch.zeros(40, WIDTH),
    "fewer-than-columns": noise(7),
    "three-repeated": noise(3)[torch.arange(90) % 3],
    "all-equal": torch.ones(50, WIDTH),
    "nine-channels": torch.cat((torch.zeros(60, WIDTH - 9), noise(60, 9)), dim=1),
    "tiny": 1e-18 * noise(200),
    "huge": 1e15 * noise(200),
}


@pytest.mark.parametrize("name", [*SPECTRA, *EXTREMES])
def test_columns_are_orthonormal_and_keep_all_that_fits(name: str) -> None:
    rows = EXTREMES[name] if name in EXTREMES else SPECTRA[name][0]
    columns = leading_subspace(gram_matrix(rows), RANK)
    # bfloat16, in which they are stored, rounds entries by 2^-9
    assert torch.allclose(columns.T @ columns, torch.eye(RANK, dtype=torch.float64), atol=2**-9)
    if torch.linalg.matrix_rank(rows) <= RANK:
        assert missed(rows, columns) <= 1e-3 * float(rows.double().norm())


@pytest.mark.parametrize("rank", [1, 64, WIDTH - 1])
def test_any_rank_is_orthonormal(rank: int) -> None:
    rows, _ = SPECTRA["slow"]
    columns = leading_subspace(gram_matrix(rows), rank)
    assert torch.allclose(columns.T @ columns, torch.eye(rank, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_same_rows_give_the_same_bits(bits: int) -> None:
    rows = SPECTRA["shared"][0].view(-1, 4, WIDTH // 4).bfloat16()
    codec = s.LowRank(rank=RANK, bits=bits).build()
    first = codec.fit(rows)
    torch.randn(3)  # from the generator that others draw from
    again = codec.fit(rows.clone())
    assert torch.equal(first["basis"], again["basis"])
    for one, other in zip(codec.encode(rows, first).values(), codec.encode(rows, again).values(), strict=True):
        assert torch.equal(one, other)


def test_every_device_begins_with_the_same_columns() -> None:
    """White noise has no leading subspace: what is found is what the iteration began with."""
    start = _start(WIDTH, RANK, torch.float64, torch.device("cpu"))
    assert torch.equal(start, torch.randn(WIDTH, RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert _start(WIDTH, RANK, torch.float64, torch.device("meta")).shape == start.shape  # drawn, then moved


def test_not_a_number_is_no_error() -> None:
    rows = noise(50, 32).view(50, 2, 16)
    rows[3, 0, 5] = torch.nan
    assert s.LowRank(rank=6).build().fit(rows)["basis"].isnan().all()


@pytest.mark.parametrize("size", [1, 2, 161])
def test_the_rotation_is_orthogonal_and_has_no_large_entry(size: int) -> None:
    turn = cosine_basis(size, torch.device("cpu"))
    assert torch.allclose(turn @ turn.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert turn.abs().max() <= (2 / size) ** 0.5


def test_strong_shared_channels_cost_packed_rows_little() -> None:
    rows = SPECTRA["shared"][0].view(-1, 4, WIDTH // 4)

    def error(bits: int) -> float:
        codec = s.LowRank(rank=RANK, bits=bits).build()
        basis = codec.fit(rows)
        return float((codec.reader(codec.encode(rows, basis), basis, WIDTH // 4, 1).read_all() - rows).norm())

    assert error(8) < 1.01 * error(16) and error(4) < 1.5 * error(16)


class Waiting(TorchDispatchMode):
    """Fails where a GPU would wait: a number read on the host, a shape that depends on numbers, a solver's report."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "eig", "svd", "lstsq", "_linalg_check_errors", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        assert not any(part in name for part in self.NAMES), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("rank", [RANK, WIDTH])
def test_fitting_and_encoding_never_wait_for_the_device(rank: int, bits: int) -> None:
    rows = SPECTRA["slow"][0].view(-1, 4, WIDTH // 4)
    codec = s.LowRank(rank=rank, bits=bits).build()
    with Waiting():
        codec.encode(rows, codec.fit(rows))


def test_what_notices_waiting_does() -> None:
    with pytest.raises(AssertionError, match="eigh"), Waiting():
        torch.linalg.eigh(torch.eye(3))
    with pytest.raises(AssertionError, match="check_errors"), Waiting():
        torch.linalg.cholesky(torch.eye(3))


def test_the_rows_that_are_left_are_listed_without_waiting() -> None:
    kept = torch.tensor([[0, 1], [3, 2], [4, 6]])
    with Waiting():
        left, alone = others(kept, 7), others(kept[:, 0], 7)
    assert left.T.tolist() == [[1, 2, 5, 6], [0, 3, 4, 5]] and alone.tolist() == [1, 2, 5, 6]
