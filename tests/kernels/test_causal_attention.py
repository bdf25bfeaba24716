"""`causal_attention` against softmax written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvsluice.kernels.causal_attention import causal_attention

# float32 sums of up to 700 products and as many weights
TOLERANCE = 2e-6


def written_out(
    q: Tensor, k: Tensor, v: Tensor, q_positions: Tensor, k_positions: Tensor, window: int | None
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = torch.einsum("chd,mhd->hcm", q.double(), k) / q.shape[-1] ** 0.5
    hidden = k_positions[None] > q_positions[:, None]
    if window is not None:
        hidden |= k_positions[None] <= q_positions[:, None] - window
    return torch.einsum("hcm,mhd->chd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def make(c: int, m: int, heads: int = 6, kv_heads: int = 2, d: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(c * 1000 + m)
    q = torch.randn(c, heads, d, generator=generator)
    return q, torch.randn(m, kv_heads, d, generator=generator), torch.randn(m, kv_heads, d, generator=generator)


@pytest.mark.parametrize("window", [None, 1, 7, 64, 10_000])
@pytest.mark.parametrize(("c", "m"), [(1, 1), (1, 33), (13, 13), (13, 40), (600, 700)])
def test_last_rows_over_a_prefix(c: int, m: int, window: int | None) -> None:
    q, k, v = make(c, m)
    positions = torch.arange(m)

    out = causal_attention(q, k, v, positions[m - c :], positions, window)

    expected = written_out(q, k, v, positions[m - c :], positions, window)
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("window", [None, 50])
def test_selected_rows_keep_their_positions(window: int | None) -> None:
    # after selective propagation positions have gaps; a window is measured in positions, not in rows
    q, k, v = make(20, 90)
    positions = torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:90].sort().values

    out = causal_attention(q, k, v, positions[70:], positions, window)

    expected = written_out(q, k, v, positions[70:], positions, window)
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("window", [None, 30])
def test_positions_in_any_order(window: int | None) -> None:
    q, k, v = make(15, 60)
    generator = torch.Generator().manual_seed(2)
    k_positions = torch.randperm(60, generator=generator)
    q_positions = torch.randperm(60, generator=generator)[:15]

    out = causal_attention(q, k, v, q_positions, k_positions, window)

    expected = written_out(q, k, v, q_positions, k_positions, window)
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("window", [None, 9])
def test_chunks_equal_one_shot(window: int | None) -> None:
    q, k, v = make(100, 100)
    positions = torch.arange(100)
    whole = causal_attention(q, k, v, positions, positions, window)

    for start, stop in ((0, 1), (1, 37), (37, 100)):
        rows = slice(start, stop)
        part = causal_attention(q[rows], k[:stop], v[:stop], positions[rows], positions[:stop], window)
        torch.testing.assert_close(part, whole[rows], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("window", [None, 5])
def test_rows_a_mask_hides_are_never_read(window: int | None) -> None:
    q, k, v = make(4, 20)
    positions = torch.arange(20)
    rows = slice(8, 12)
    clean = causal_attention(q, k, v, positions[rows], positions, window, last_rows=False)
    hidden = (positions > 11) if window is None else (positions > 11) | (positions <= 8 - window)
    k[hidden], v[hidden] = 1e4, 1e4

    assert torch.equal(causal_attention(q, k, v, positions[rows], positions, window, last_rows=False), clean)


def test_caller_may_vouch_for_the_layout() -> None:
    q, k, v = make(30, 80)
    positions = torch.arange(80)
    found_out = causal_attention(q, k, v, positions[50:], positions)

    assert torch.equal(causal_attention(q, k, v, positions[50:], positions, last_rows=True), found_out)
    with pytest.raises(ValueError, match="cannot be the last"):
        causal_attention(k[:, :1], q[:, :1], q[:, :1], positions, positions[:30], last_rows=True)


def test_a_row_that_sees_nothing_gives_zeros() -> None:
    q, k, v = make(2, 3)

    out = causal_attention(q, k, v, torch.tensor([0, 5]), torch.tensor([3, 4, 5]))

    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert bool(out[1].abs().sum() > 0)


def test_no_rows() -> None:
    q, k, v = make(0, 3)
    assert causal_attention(q, k, v, torch.arange(0), torch.arange(3)).shape == (0, 6, 16)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_every_grouping_and_half_precision(kv_heads: int) -> None:
    q, k, v = make(24, 50, kv_heads=kv_heads)
    positions = torch.arange(50)
    expected = written_out(q, k, v, positions[26:], positions, None)

    out = causal_attention(q, k, v, positions[26:], positions)
    half = causal_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), positions[26:], positions)

    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=0.02, atol=0.03)


def test_strided_inputs() -> None:
    fused = torch.randn(40, 10, 16)
    q, k, v = fused.split([6, 2, 2], 1)
    positions = torch.arange(40)

    out = causal_attention(q, k, v, positions, positions)

    expected = written_out(q, k, v, positions, positions, None)
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("q", "k", "v", "nq", "nk", "window"),
    [
        ((2, 4, 8), (3, 2, 8), (3, 1, 8), 2, 3, None),
        ((2, 4, 8), (3, 3, 8), (3, 3, 8), 2, 3, None),
        ((2, 4, 8), (3, 2, 4), (3, 2, 4), 2, 3, None),
        ((2, 4, 8), (3, 2, 8), (3, 2, 8), 3, 3, None),
        ((2, 4, 8), (3, 2, 8), (3, 2, 8), 2, 2, None),
        ((2, 4, 8), (3, 2, 8), (3, 2, 8), 2, 3, 0),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], nq: int, nk: int, window: int | None
) -> None:
    with pytest.raises(ValueError, match=r"fit|differ|positive"):
        causal_attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), torch.arange(nq), torch.arange(nk), window)
