"""Causal attention put together from calls over spans of keys, with plain torch in place of the library's call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kvsluice.kernels.causal_attention import causal_attention, pieces
from kvsluice.kernels.causal_attention import triton as compiled
from kvsluice.kernels.dispatch import REFERENCE, TRITON, forced

# float32 sums of up to 3,000 products and as many weights
TOLERANCE = 4e-6


class Library:
    """Stands in for the fused call: softmax written out, and what was asked of it."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, bool]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> pieces.Partial:
        self.calls.append((len(q), len(k), causal))
        assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
        group = q.shape[1] // k.shape[1]
        wide_k, wide_v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
        scores = torch.einsum("chd,mhd->hcm", q.double(), wide_k) / q.shape[-1] ** 0.5
        if causal:
            assert len(q) == len(k)
            scores.masked_fill_(torch.ones(len(q), len(k), device=q.device).triu(1).bool(), float("-inf"))
        out = torch.einsum("hcm,mhd->chd", scores.softmax(-1), wide_v)
        return out.to(q.dtype), scores.logsumexp(-1).float()


def add(partials: Sequence[pieces.Partial], dtype: torch.dtype) -> pieces.Partial:
    lses = torch.stack([lse for _, lse in partials])
    weights = lses.softmax(0).transpose(1, 2)[..., None]
    out = sum(weight * out.float() for weight, (out, _) in zip(weights, partials, strict=True))
    return torch.as_tensor(out).to(dtype), lses.logsumexp(0)


def make(c: int, m: int, heads: int = 6, kv_heads: int = 2, d: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(c * 1000 + m)
    q = torch.randn(c, heads, d, generator=generator)
    return q, torch.randn(m, kv_heads, d, generator=generator), torch.randn(m, kv_heads, d, generator=generator)


def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    positions = torch.arange(len(k))
    with forced(REFERENCE):
        return causal_attention(q, k, v, positions[len(k) - len(q) :], positions, last_rows=True)


@pytest.mark.parametrize(
    ("c", "m"),
    [
        (1, 1),
        (128, 128),
        (100, 100),
        (129, 129),
        (128, 256),
        (1, 300),
        (77, 900),
        (128, 3000),
        (200, 1101),
        (300, 1024),
    ],
)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_pieces_equal_the_whole(c: int, m: int, kv_heads: int) -> None:
    q, k, v = make(c, m, kv_heads=kv_heads)
    got = pieces.lower_right(q, k, v, Library(), add)
    torch.testing.assert_close(got, expected(q, k, v), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("c", [300, 512, 520])
def test_more_rows_than_a_call_takes(monkeypatch: pytest.MonkeyPatch, c: int) -> None:
    monkeypatch.setattr(pieces, "MAX_ROWS", 256)
    q, k, v = make(c, 700)
    library = Library()
    got = pieces.lower_right(q, k, v, library, add)
    torch.testing.assert_close(got, expected(q, k, v), rtol=TOLERANCE, atol=TOLERANCE)
    # rows that begin between units make a block larger by less than a unit, and a power of two again
    assert max(rows for rows, _, _ in library.calls) <= (1024 if c == 512 else 512)


def test_a_long_prompt_asks_for_few_shapes_and_copies_nothing_that_fits() -> None:
    library, chunk = Library(), 256
    q, k, _ = make(1, 1, heads=1, kv_heads=1, d=1)
    rows = q.expand(chunk, 1, 1).contiguous()
    for m in range(chunk, 40 * chunk + 1, chunk):
        keys = k.expand(m, 1, 1).contiguous()
        pieces.lower_right(rows, keys, keys, library, add)
    assert set(library.calls) == {(chunk, chunk, True)} | {(chunk, chunk << i, False) for i in range(6)}


@pytest.mark.parametrize("num_keys", [0, 128, 384, 128 * 37, 131072, 130048])
def test_spans_cover_the_keys_once_by_powers_of_two(num_keys: int) -> None:
    ranges = pieces.spans(num_keys)
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(num_keys))
    lengths = [stop - start for start, stop in ranges]
    assert lengths == sorted(set(lengths), reverse=True)
    assert all((length // pieces.UNIT).bit_count() == 1 for length in lengths)


def test_16_bit_rows_are_merged_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.bfloat16() for x in make(128, 128 * 32))
    monkeypatch.setattr(pieces, "MAX_PARTIALS", 4)
    merges = []

    def noted(partials: Sequence[pieces.Partial], dtype: torch.dtype) -> pieces.Partial:
        merges.append((len(partials), dtype))
        return add(partials, dtype)

    got = pieces.lower_right(q, k, v, Library(), noted)
    # a square and five spans: four partials at most are held
    assert merges == [(4, torch.float32), (3, torch.bfloat16)]
    torch.testing.assert_close(got.float(), expected(q.float(), k.float(), v.float()), rtol=0.02, atol=4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "d"), [(2, 20), (2, 64), (3, 64), (8, 32)])
def test_the_compiled_merge_equals_the_written_out_one(
    device: torch.device, dtype: torch.dtype, count: int, d: int
) -> None:
    generator = torch.Generator().manual_seed(d)
    outs = [torch.randn(60, 3, d, generator=generator).to(device, dtype)[7:44] for _ in range(count - 1)]
    outs.append(torch.randn(3, 37, d, generator=generator).to(device).transpose(0, 1))
    # far apart and close together, so that each side wins somewhere
    lses = [(20 * torch.randn(3, 60, generator=generator)).to(device)[:, 7:44] for _ in range(count - 1)]
    lses.append((20 * torch.randn(3, 37, generator=generator)).to(device))
    partials = list(zip(outs, lses, strict=True))
    for wanted_dtype in (torch.float32, dtype):
        got, got_lse = compiled.merge(partials, wanted_dtype)
        want, want_lse = add(partials, torch.float32)
        assert got.dtype == wanted_dtype and got.is_contiguous()
        tolerance = 2e-6 if wanted_dtype == torch.float32 else 8e-3
        torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got_lse, want_lse, rtol=1e-6, atol=1e-6)


def test_the_compiled_merge_serves_the_pieces(device: torch.device) -> None:
    q, k, v = (x.to(device) for x in make(150, 900))
    got = pieces.lower_right(q, k, v, Library(), compiled.merge)
    torch.testing.assert_close(got.cpu(), expected(*make(150, 900)), rtol=TOLERANCE, atol=TOLERANCE)


def test_what_the_library_refuses_runs_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def refuse(*args: Any) -> Any:
        calls.append(args)
        raise RuntimeError("No valid execution plans built.")

    monkeypatch.setattr(compiled, "_suits_cudnn", lambda *tensors: True)
    monkeypatch.setattr(compiled, "_refused", set())
    monkeypatch.setattr(compiled, "attend", refuse)
    q, k, v = make(130, 260)
    positions = torch.arange(260)
    for _ in range(2):
        with forced(TRITON):
            got = causal_attention(q, k, v, positions[130:], positions, last_rows=True)
        torch.testing.assert_close(got, expected(q, k, v), rtol=TOLERANCE, atol=TOLERANCE)
    assert len(calls) == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_a_full_or_broken_device_is_no_refusal(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def fail(*args: Any) -> Any:
        raise error("out of memory")

    monkeypatch.setattr(compiled, "_suits_cudnn", lambda *tensors: True)
    monkeypatch.setattr(compiled, "_refused", set())
    monkeypatch.setattr(compiled, "attend", fail)
    q, k, v = make(130, 260)
    positions = torch.arange(260)
    with forced(TRITON), pytest.raises(error):
        causal_attention(q, k, v, positions[130:], positions, last_rows=True)
    assert not compiled._refused


def test_tensors_of_a_cpu_never_reach_the_library() -> None:
    q, k, v = (x.bfloat16() for x in make(200, 2000))
    assert not compiled._suits_cudnn(q, k, v)
    assert not compiled._suits_flash(q, k, v)


@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(32, 8, 128), (9, 3, 64), (4, 4, 96)])
def test_the_libraries_take_the_calls_and_keep_the_layout(heads: int, kv_heads: int, d: int) -> None:
    # on the meta device: signatures and shapes, no numbers
    q = torch.empty(256, heads, d, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1024, kv_heads, d, dtype=torch.bfloat16, device="meta")
    for keys, causal in ((k, False), (k[:256], True)):
        out, lse = compiled.attend(q, keys, keys, causal)
        assert out.shape == q.shape and out.is_contiguous()
        assert lse.shape == (heads, 256) and lse.dtype == torch.float32
    for window in (None, 100):
        out = compiled._flash(q, k, k, window)
        assert out.shape == q.shape and out.is_contiguous()
