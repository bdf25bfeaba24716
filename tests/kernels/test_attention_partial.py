"""Partial attention and its merge against plain softmax over repeated keys."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kvsluice.kernels.attention_partial import attention_partial, merge_partials

# fp32 sums of at most a few hundred terms of magnitude 1
ATOL = 2e-6


def naive(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q [Q, H, d], k, v [Q, Hkv, m, d], visible [Q, Hkv, m] -> [Q, H, d] in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,qhmd->qhm", q.double(), k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~visible.repeat_interleave(group, dim=1), -torch.inf)
    return torch.einsum("qhm,qhmd->qhd", torch.softmax(scores, -1).nan_to_num(0), v)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("per_row", [False, True])
def test_equals_softmax_over_repeated_keys(group: int, dim: int, window: int | None, per_row: bool) -> None:
    generator = torch.Generator().manual_seed(group * dim)
    num_rows, num_kv, m = 3, 2, 21
    q = torch.randn(num_rows, num_kv * group, dim, generator=generator)
    lead = (num_rows, num_kv) if per_row else (num_kv,)
    k, v = torch.randn(2, *lead, m, dim, generator=generator)
    k_positions = torch.randint(0, 30, (*lead, m), generator=generator)
    valid = torch.rand(*lead, m, generator=generator) > 0.2
    q_positions = torch.tensor([29, 12, 20])
    out, lse = attention_partial(q, k, v, k_positions, q_positions, window, valid=valid)
    at = k_positions.expand(num_rows, num_kv, m)
    visible = (at <= q_positions[:, None, None]) & valid.expand(num_rows, num_kv, m)
    if window is not None:
        visible &= at > q_positions[:, None, None] - window
    expected = naive(q, k.expand(num_rows, num_kv, m, dim), v.expand(num_rows, num_kv, m, dim), visible)
    assert torch.allclose(out.double(), expected, atol=ATOL)
    assert lse.shape == (num_rows, num_kv * group)


def test_parts_merge_to_the_whole_also_when_one_is_hidden() -> None:
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(4, 6, 64, generator=generator)
    k, v = torch.randn(2, 2, 50, 64, generator=generator)
    at, rows = torch.arange(50), torch.tensor([3, 10, 49, 60])
    whole, _ = attention_partial(q, k, v, at, rows)
    cuts = [0, 1, 11, 11, 30, 50]
    parts = [attention_partial(q, k[:, a:b], v[:, a:b], at[a:b], rows) for a, b in itertools.pairwise(cuts)]
    assert parts[-1][1][0].eq(-torch.inf).all() and parts[-1][0][0].eq(0).all()
    assert torch.allclose(merge_partials(parts), whole, atol=ATOL)


def test_a_row_that_sees_nothing_gives_zeros() -> None:
    q, k = torch.randn(1, 2, 8), torch.randn(1, 3, 8)
    part = attention_partial(q, k, k, torch.arange(5, 8), torch.tensor([2]))
    assert part[0].eq(0).all() and part[1].eq(-torch.inf).all()
    assert merge_partials([part, part]).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_together_equal_rows_alone_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    q = torch.randn(5, 9, 64, generator=generator).to(dtype)
    k, v = torch.randn(2, 3, 301, 64, generator=generator).to(dtype)
    at, rows = torch.arange(301), torch.arange(296, 301)
    out, lse = attention_partial(q, k, v, at, rows, 250)
    for i in range(5):
        one, one_lse = attention_partial(q[i : i + 1], k, v, at, rows[i : i + 1], 250)
        assert torch.equal(out[i], one[0]) and torch.equal(lse[i], one_lse[0])


def test_refuses_shapes_that_do_not_fit() -> None:
    q, k, one = torch.randn(2, 4, 8), torch.randn(2, 5, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="q_positions"):
        attention_partial(q, k, k, None, one[:1])
    with pytest.raises(ValueError, match="k_positions"):
        attention_partial(q, k, k, torch.arange(4), one)
    with pytest.raises(ValueError, match="fit q"):
        attention_partial(q, torch.randn(3, 5, 8), torch.randn(3, 5, 8), None, one)
    with pytest.raises(ValueError, match="window"):
        attention_partial(q, k, k, None, one, 4)
    with pytest.raises(ValueError, match="nothing"):
        merge_partials([])
