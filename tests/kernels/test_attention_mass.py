"""`attention_mass` against the attention matrix written out."""

from __future__ import annotations

import pytest
import torch

from kvsluice.kernels.attention_mass import attention_mass, reference


def written_out(q, k, q_positions, k_positions, window):
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("chd,mhd->hcm", q.double(), k.double().repeat_interleave(group, 1)) / q.shape[-1] ** 0.5
    hidden = k_positions > q_positions[:, None]
    if window is not None:
        hidden |= k_positions <= q_positions[:, None] - window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return weights.sum(1).unflatten(0, (-1, group)).sum(1).float()


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize(("c", "m"), [(1, 1), (7, 7), (33, 200), (200, 200)])
@pytest.mark.parametrize("window", [None, 20])
def test_column_sums(group: int, c: int, m: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK_KEYS", 64)
    monkeypatch.setattr(reference, "BLOCK_SCORES", 64 * 2 * group * 24)
    generator = torch.Generator().manual_seed(c + m)
    q = torch.randn(c, 2 * group, 64, generator=generator)
    k = torch.randn(m, 2, 64, generator=generator)
    k_positions = torch.arange(m) * 3
    q_positions = k_positions[m - c :]
    mass = attention_mass(q, k, q_positions, k_positions, window)
    assert mass.shape == (2, m) and mass.dtype == torch.float32
    assert torch.allclose(mass, written_out(q, k, q_positions, k_positions, window), atol=1e-5)
    assert mass.sum(1).tolist() == pytest.approx([c * group] * 2, rel=1e-4)


def test_blocks_of_queries_add_up() -> None:
    q, k, at = torch.randn(96, 6, 64), torch.randn(96, 2, 64), torch.arange(96)
    parts = torch.zeros(2, 96)
    for begin in (0, 40):
        end = 40 if begin == 0 else 96
        parts[:, :end] += attention_mass(q[begin:end], k[:end], at[begin:end], at[:end])
    assert torch.allclose(parts, attention_mass(q, k, at, at), atol=1e-5)


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k = torch.randn(4, 6, 64), torch.randn(9, 2, 64)
    with pytest.raises(ValueError, match="q_positions"):
        attention_mass(q, k, torch.arange(3), torch.arange(9))
    with pytest.raises(ValueError, match="does not fit"):
        attention_mass(q, k[..., :32], torch.arange(4), torch.arange(9))
