"""Compiled packing and decoding against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch

from kvsluice.kernels.quantize import dequantize, dequantize_chunks, quantize, reference


def check_packed(compiled, x, bits, group, axis):
    got = compiled(quantize, x, bits, group, axis)
    want = reference.quantize(x.cpu(), bits, group, axis)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype and one.is_contiguous() and torch.equal(one.cpu(), other)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("shape", [(1, 1), (70, 3, 64), (33, 96), (5, 2, 3, 30), (37, 2, 128), (2, 300), (0, 2, 64)])
@pytest.mark.parametrize("group", [32, 3, 2000])
def test_packing(compiled, device, bits, axis, shape, group):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device) * 3 + 40
    check_packed(compiled, x, bits, group, axis)


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_packing_of_views_in_other_dtypes(compiled, device, axis, dtype):
    fused = torch.randn(26, 5, 48, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    for x in (fused[:, 2:5], fused[5:25:3, :, 10:], fused.transpose(0, 1), fused.permute(2, 0, 1)[:, :, None]):
        check_packed(compiled, x, 4, 16, axis)


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_packing_of_groups_at_the_ends_of_the_range(compiled, device, axis, bits):
    generator = torch.Generator().manual_seed(3)
    sizes = torch.tensor([0.0, 1e-40, 1e-7, 6e-5, 1.0, 3e3, 6.4e4])
    x = (torch.rand(7, 1, 64, generator=generator) * 2 - 1) * sizes[:, None, None]
    constant = sizes[:, None, None].expand(7, 1, 64)
    # codes between two integers
    halves = torch.arange(64).view(1, 1, 64).expand(7, 1, 64) / 2
    for rows in (x, constant, -constant, halves):
        check_packed(compiled, rows.to(device), bits, 16, axis)


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
