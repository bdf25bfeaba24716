"""The compiled column sums, and the window saliency made of them, against their references."""

from __future__ import annotations

import pytest
import torch

from kvsluice.kernels.attention_mass import attention_mass
from kvsluice.kernels.attention_mass import reference as mass_reference
from kvsluice.kernels.window_saliency import reference as saliency_reference
from kvsluice.kernels.window_saliency import window_saliency

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def random(device):
    generator = torch.Generator().manual_seed(5)
    return lambda *shape, dtype=F32: torch.randn(*shape, generator=generator).to(device, dtype)


@pytest.mark.parametrize(("group", "dim"), [(1, 64), (3, 64), (4, 128), (8, 96), (3, 20)])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("window", [None, 40])
def test_window_saliency(compiled, random, device, group, dim, dtype, window):
    q, k = random(8, 2 * group, dim, dtype=dtype), random(131, 2, dim, dtype=dtype)
    at = torch.arange(131, device=device) * 2
    args = (q, k, 7, "max")
    got = compiled(window_saliency, *args, positions=at, window=window)
    want = saliency_reference.window_saliency(*args, None if window is None else at, window)
    assert got.shape == (2, 123)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("w", "n"), [(1, 700), (16, 1300), (33, 64), (4, 4)])
def test_splits_of_the_keys_and_odd_sizes(compiled, random, w, n):
    q, k = random(w, 6, 64), random(n, 2, 64)
    got = compiled(window_saliency, q, k, 5, "avg")
    torch.testing.assert_close(
        got, saliency_reference.window_saliency(q, k, 5, "avg", None, None), atol=2e-5, rtol=2e-5
    )


@pytest.mark.parametrize("window", [None, 1, 90])
def test_queries_amid_keys_with_gaps(compiled, random, device, window):
    k_at = torch.arange(200, device=device) ** 2 // 7
    q_at = k_at[50:170:3]
    q, k = random(len(q_at), 6, 64), random(200, 2, 64)
    got = compiled(attention_mass, q, k, q_at, k_at, window)
    torch.testing.assert_close(got, mass_reference.attention_mass(q, k, q_at, k_at, window), atol=1e-4, rtol=2e-5)
    assert got.sum(1).tolist() == pytest.approx([len(q_at) * 3] * 2, rel=1e-4)


def test_mixed_dtypes_and_views(compiled, random, device):
    at = torch.arange(90, device=device)
    q, k = random(30, 9, 64, dtype=F16)[:, :6], random(2, 90, 64).transpose(0, 1)
    got = compiled(attention_mass, q, k, at[60:], at)
    torch.testing.assert_close(got, mass_reference.attention_mass(q, k, at[60:], at, None), atol=1e-4, rtol=2e-5)
