"""The compiled `attention_partial` and its merge against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvsluice.kernels.attention_partial import attention_partial, merge_partials, reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# float32 sums in another order and fast exponentials; 16-bit values meet weights of 16 bits
ATOL, ATOL_16 = 1e-5, 5e-5


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def check(got, want, atol=ATOL):
    (out, lse), (want_out, want_lse) = got, want
    assert out.dtype == lse.dtype == F32 and out.shape == want_out.shape and lse.shape == want_lse.shape
    assert torch.equal(lse.isinf(), want_lse.isinf())
    torch.testing.assert_close(out, want_out, atol=atol, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=atol, rtol=1e-5)


@pytest.mark.parametrize(("group", "dim"), [(1, 64), (3, 64), (4, 128), (8, 96), (3, 80), (17, 16)])
@pytest.mark.parametrize("window", [None, 40])
def test_shared_keys_in_views_that_callers_pass(compiled, device, generator, group, dim, window):
    num_kv, m = 2, 77
    q = torch.randn(7, num_kv * group, dim, generator=generator).to(device)
    k, v = (torch.randn(m, num_kv, dim, generator=generator).to(device).transpose(0, 1) for _ in range(2))
    at, rows = torch.arange(m, device=device), torch.tensor([76, 3, 0, 90, 50, 12, 200], device=device)
    want = reference.attention_partial(q, k, v, at, rows, window, None)
    check(compiled(attention_partial, q, k, v, at, rows, window), want)


@pytest.mark.parametrize("dtypes", list(itertools.product((F32, F16, BF16), repeat=3)))
def test_every_mix_of_dtypes(compiled, device, generator, dtypes):
    q, k, v = (
        torch.randn(*shape, generator=generator).to(device, dtype)
        for shape, dtype in zip(((3, 6, 64), (2, 100, 64), (2, 100, 64)), dtypes, strict=True)
    )
    at, rows = torch.arange(100, device=device), torch.tensor([99, 60, 7], device=device)
    want = reference.attention_partial(q, k, v, at, rows, None, None)
    check(compiled(attention_partial, q, k, v, at, rows), want, ATOL if dtypes[2] == F32 else ATOL_16)


@pytest.mark.parametrize("m", [1, 255, 600])
@pytest.mark.parametrize("lead", ["", "h", "qh"])
@pytest.mark.parametrize("own_keys", [False, True])
def test_splits_masks_and_keys_of_each_row(compiled, device, generator, m, lead, own_keys):
    num_rows, num_kv = 2, 2
    q = torch.randn(num_rows, 6, 64, generator=generator).to(device)
    shape = (num_rows, num_kv, m, 64) if own_keys else (num_kv, m, 64)
    k, v = torch.randn(2, *shape, generator=generator).to(device)
    of = {"": (), "h": (num_kv,), "qh": (num_rows, num_kv)}[lead]
    at = torch.randint(0, 30, (*of, m), generator=generator).to(device, torch.int32)
    valid = (torch.rand(*of, m, generator=generator) > 0.3).to(device)
    rows = torch.tensor([29, 12], device=device)
    want = reference.attention_partial(q, k, v, at, rows, 15, valid)
    check(compiled(attention_partial, q, k, v, at, rows, 15, valid=valid), want)
    check(
        compiled(attention_partial, q, k, v, None, rows), reference.attention_partial(q, k, v, None, rows, None, None)
    )


def test_positions_with_heads_last_in_memory(compiled, device, generator):
    q = torch.randn(2, 6, 64, generator=generator).to(device)
    k, v = torch.randn(2, 3, 70, 64, generator=generator).to(device)
    at = torch.randint(0, 50, (70, 3), generator=generator).to(device).T
    rows = torch.tensor([30, 49], device=device)
    want = reference.attention_partial(q, k, v, at, rows, None, None)
    check(compiled(attention_partial, q, k, v, at, rows), want)


def test_a_row_that_sees_nothing_gives_zeros(compiled, device):
    q, k = torch.randn(2, 2, 16, device=device), torch.randn(1, 600, 16, device=device)
    at, rows = torch.arange(5, 605, device=device), torch.tensor([2, 700], device=device)
    out, lse = compiled(attention_partial, q, k, k, at, rows)
    assert out[0].eq(0).all() and lse[0].eq(-torch.inf).all() and lse[1].isfinite().all()
    assert compiled(merge_partials, [(out, lse), (out, lse)])[0].eq(0).all()
    out, lse = compiled(attention_partial, q, k[:, :0], k[:, :0], at[:0], rows)
    assert out.eq(0).all() and lse.eq(-torch.inf).all()


def test_no_rows_give_nothing(compiled, device):
    k = torch.randn(1, 9, 16, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    out, lse = compiled(attention_partial, torch.empty(0, 2, 16, device=device), k, k, None, none)
    assert out.shape == (0, 2, 16) and lse.shape == (0, 2)
    assert compiled(merge_partials, [(out, lse), (out, lse)]).shape == (0, 2, 16)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("m", [9, 400])
def test_rows_together_equal_rows_alone(compiled, device, generator, monkeypatch, same_bits, dtype, m):
    q = torch.randn(7, 9, 64, generator=generator).to(device, dtype)
    k, v = torch.randn(2, 3, m, 64, generator=generator).to(device, dtype)
    at, rows = torch.arange(m, device=device), torch.arange(m - 7, m, device=device)
    out, lse = compiled(attention_partial, q, k, v, at, rows, 250)
    for i in range(0, 7, 2):
        one, one_lse = compiled(attention_partial, q[i : i + 1], k, v, at, rows[i : i + 1], 250)
        assert same_bits(out[i], one[0]) and same_bits(lse[i], one_lse[0])
    # and so in several launches
    monkeypatch.setattr("kvsluice.kernels.attention_partial.triton.SPLIT_BYTES", 1 << 15)
    again, again_lse = compiled(attention_partial, q, k, v, at, rows, 250)
    assert same_bits(out, again) and same_bits(lse, again_lse)


@pytest.mark.parametrize("num_parts", [1, 2, 5, 9])
@pytest.mark.parametrize("dim", [64, 96])
def test_merge(compiled, device, generator, num_parts, dim):
    parts = [
        (torch.randn(4, 6, dim, generator=generator).to(device), 9 * torch.randn(4, 6, generator=generator).to(device))
        for _ in range(num_parts)
    ]
    for out, lse in parts[:-1]:
        out[1], lse[1] = 0, -torch.inf
    merged = compiled(merge_partials, parts)
    torch.testing.assert_close(merged, reference.merge_partials(parts), atol=1e-6, rtol=1e-5)
    alone = compiled(merge_partials, [(out[2:3], lse[2:3]) for out, lse in parts])
    assert torch.equal(merged[2:3], alone)
