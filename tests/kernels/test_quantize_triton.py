"""Compiled decoding against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch

from kvsluice.kernels.quantize import dequantize, dequantize_chunks, quantize, reference


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("shape", [(1, 1), (70, 3, 64), (33, 96), (5, 2, 3, 30), (40, 8, 128), (2, 1100)])
@pytest.mark.parametrize("group", [32, 24, 2000])
def test_all_rows(compiled, device, bits, axis, shape, group):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    args = (*quantize(x, bits, group, axis), bits, group, axis, shape[-1])
    assert torch.equal(compiled(dequantize, *args), reference.dequantize(*args))


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("axis", "group"), [("channel", 32), ("channel", 8), ("token", 32), ("token", 40)])
@pytest.mark.parametrize(("chunk", "dim"), [(8, 64), (4, 96), (1, 30)])
def test_chosen_chunks(compiled, device, bits, axis, group, chunk, dim):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(72, 3, dim, generator=generator).to(device)
    heads = torch.randint(0, 3, (13,), generator=generator).to(device)
    chunks = torch.randint(0, 72 // chunk, (13,), generator=generator).to(device)
    args = (*quantize(x, bits, group, axis), heads, chunks, chunk, bits, group, axis, dim)
    assert torch.equal(compiled(dequantize_chunks, *args), reference.dequantize_chunks(*args))


def test_nothing_chosen_and_no_rows(compiled, device):
    packed = quantize(torch.randn(8, 2, 64, device=device), 4, 8, "channel")
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert compiled(dequantize_chunks, *packed, none, none, 8, 4, 8, "channel", 64).shape == (0, 8, 64)
    empty = tuple(t[:0] for t in packed)
    assert compiled(dequantize, *empty, 4, 8, "channel", 64).shape == (0, 2, 64)
