"""Compiled kernels against their references: on a GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kvsluice.kernels.attention_mass import attention_mass
from kvsluice.kernels.dispatch import REFERENCE, TRITON, forced
from kvsluice.kernels.landmarks import score_landmarks
from kvsluice.kernels.sparse_reconstruct import low_rank_chunks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 64), (3, 64), (4, 96), (8, 128), (3, 20)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN, so that what a kernel does not write shows."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    yield


def both(op: Any, *args: Any, **options: Any) -> tuple[Any, Any]:
    """What the kernel gives, and what the reference gives."""
    with forced(TRITON):
        got = op(*args, **options)
    with forced(REFERENCE):
        return got, op(*args, **options)


def random(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def near(got: Tensor, wanted: Tensor, atol: float = 2e-5) -> bool:
    return bool(torch.equal(got.isinf(), wanted.isinf())) and bool(
        torch.allclose(got.nan_to_num(neginf=0.0, nan=1e9), wanted.nan_to_num(neginf=0.0), atol=atol, rtol=1e-5)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_rows_together_equal_those_alone(same_bits: Any, dtype: torch.dtype) -> None:
    q, means = random(8, 9, 64, dtype=dtype), random(300, 3, 64, seed=1)
    with forced(TRITON):
        scores = score_landmarks(q, means)
        for i in (0, 4, 5, 7):
            assert same_bits(scores[i], score_landmarks(q[i : i + 1], means)[0])


@pytest.mark.parametrize(("group", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 60])
def test_attention_mass(group: int, dim: int, dtype: torch.dtype, window: int | None) -> None:
    q, k = random(35, 2 * group, dim, dtype=dtype), random(100, 2, dim, seed=1, dtype=dtype)
    at = torch.arange(100, device=DEVICE) * 2
    got, wanted = both(attention_mass, q, k, at[100 - 35 :], at, window)
    assert near(got, wanted, 1e-4)


@pytest.mark.parametrize(("group", "dim"), SHAPES)
def test_score_landmarks(group: int, dim: int) -> None:
    q = random(6, 2 * group, dim)
    means = random(70, 2, dim, seed=1)
    got, wanted = both(score_landmarks, q, means.bfloat16())
    assert near(got, wanted)
    codes, scale = (means * 40).to(torch.int8), random(70, 2, seed=2).abs().half()
    got, wanted = both(score_landmarks, q, codes, scale)
    assert near(got, wanted, 1e-3)


def test_low_rank_chunks_of_every_other_head() -> None:
    heads = torch.tensor([0, 9, 2, 9, 1, 9], device=DEVICE)[::2]
    got, wanted = both(low_rank_chunks, random(3, 4, 16), random(16, 3, 64, seed=1), heads)
    assert near(got, wanted, 1e-4)


@pytest.mark.parametrize(
    ("chunk", "rank", "dim"), [(8, 30, 64), (4, 96, 64), (1, 12, 96), (16, 160, 128), (4, 20, 256)]
)
def test_low_rank_chunks(chunk: int, rank: int, dim: int) -> None:
    heads = torch.randint(0, 3, (11,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    got, wanted = both(low_rank_chunks, random(11, chunk, rank), random(rank, 3, dim, seed=1).bfloat16(), heads)
    assert near(got, wanted, 1e-4)
