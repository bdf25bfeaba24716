"""Window saliency against the published form: repeated keys, one softmax, sum, pool per head, sum over the group."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvsluice.benchmarks.live_bytes import LiveBytes
from kvsluice.kernels.window_saliency import reference, window_saliency


def published(q: Tensor, k: Tensor, kernel: int, pool: str, window: int | None = None) -> Tensor:
    """q [w, H, d], k [n, Hkv, d]; FastKV's code with its loops unrolled, in float32."""
    w, num_heads, d = q.shape
    n, num_kv, _ = k.shape
    repeated = k.repeat_interleave(num_heads // num_kv, dim=1)
    scores = torch.einsum("whd,nhd->hwn", q, repeated) / d**0.5
    at, rows = torch.arange(n), torch.arange(n - w, n)[:, None]
    mask = at > rows
    if window is not None:
        mask = mask | (at <= rows - window)
    attention = torch.softmax(scores.masked_fill(mask, -torch.inf).float(), dim=-1)
    mass = attention[:, :, : n - w].sum(dim=1)
    if pool == "max":
        pooled = F.max_pool1d(mass[None], kernel, stride=1, padding=kernel // 2)[0]
    else:
        pooled = F.avg_pool1d(mass[None], kernel, stride=1, padding=kernel // 2)[0]
    return pooled.view(num_kv, num_heads // num_kv, -1).sum(dim=1)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize(("pool", "kernel"), [("max", 7), ("avg", 5), ("max", 1)])
def test_equals_the_published_form(group: int, dim: int, pool: str, kernel: int) -> None:
    generator = torch.Generator().manual_seed(dim + group)
    q, k = torch.randn(8, 2 * group, dim, generator=generator), torch.randn(131, 2, dim, generator=generator)
    got = window_saliency(q, k, kernel, pool)
    assert got.shape == (2, 123) and got.dtype == torch.float32
    assert torch.allclose(got, published(q, k, kernel, pool), atol=1e-6)


def test_a_sliding_window_hides_what_the_layer_never_saw() -> None:
    generator = torch.Generator().manual_seed(7)
    q, k = torch.randn(8, 4, 16, generator=generator), torch.randn(60, 2, 16, generator=generator)
    got = window_saliency(q, k, 1, "max", positions=torch.arange(60), window=20)
    assert torch.allclose(got, published(q, k, 1, "max", window=20), atol=1e-6)
    assert got[:, : 60 - 8 + 1 - 20].eq(0).all() and got[:, 41:].gt(0).all()


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("w", [8, 40])
def test_blocks_of_keys_give_what_one_softmax_gives(
    monkeypatch: pytest.MonkeyPatch, w: int, window: int | None
) -> None:
    monkeypatch.setattr(reference, "BLOCK_ROWS", 32)
    generator = torch.Generator().manual_seed(9)
    q, k = torch.randn(w, 6, 16, generator=generator), torch.randn(301, 2, 16, generator=generator)
    got = window_saliency(q, k, 7, "max", positions=torch.arange(301), window=window)
    assert torch.allclose(got, published(q, k, 7, "max", window), atol=1e-6)


def test_scores_of_all_keys_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK_SCORES", 64 * 64)
    q, k = torch.randn(64, 4, 8), torch.randn(4000, 1, 8)
    with LiveBytes() as counter:
        window_saliency(q, k, 7, "max")
    assert counter.peak_bytes < 4 * 64 * 4000  # [w, n] floats, of one query head


def test_a_planted_key_and_its_neighbours_rank_first() -> None:
    generator = torch.Generator().manual_seed(8)
    q, k = torch.randn(8, 2, 16, generator=generator), 0.1 * torch.randn(100, 1, 16, generator=generator)
    k[40, 0] = 3 * q.mean(dim=(0, 1))
    scores = window_saliency(q, k, 7, "max")[0]
    assert sorted(scores.topk(7).indices.tolist()) == list(range(37, 44))


def test_nothing_before_the_window_gives_nothing() -> None:
    assert window_saliency(torch.randn(4, 2, 8), torch.randn(4, 1, 8), 7, "max").shape == (1, 0)


def test_refuses_what_it_cannot_do() -> None:
    q, k = torch.randn(4, 2, 8), torch.randn(9, 1, 8)
    with pytest.raises(ValueError, match="odd"):
        window_saliency(q, k, 4, "max")
    with pytest.raises(ValueError, match="last"):
        window_saliency(q, k[:3], 7, "max")
    with pytest.raises(ValueError, match="positions"):
        window_saliency(q, k, 7, "max", window=4)
