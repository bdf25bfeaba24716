"""Causal attention on the GPU: cuDNN's calls and their merge against the reference, at the sizes of real prompts."""

from __future__ import annotations

import pytest
import torch

from kvsluice.kernels.causal_attention import causal_attention, pieces, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def compiled():
    return pytest.importorskip("kvsluice.kernels.causal_attention.triton")


@pytest.fixture(autouse=True)
def full_float32():
    torch.manual_seed(0)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def make(c, m, heads, kv_heads, d, dtype):
    q = torch.randn(c, heads, d, device="cuda").to(dtype)
    return q, *(torch.randn(m, kv_heads, d, device="cuda").to(dtype) for _ in range(2))


def relative_error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def in_float32(q, k, v, q_at, k_at, window=None):
    """Softmax written out in full float32, some rows at a time."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    blocks = []
    for rows, at in zip(q.float().split(256), q_at.split(256), strict=True):
        scores = torch.einsum("chd,mhd->hcm", rows, k) / q.shape[-1] ** 0.5
        hidden = k_at[None] > at[:, None]
        if window is not None:
            hidden |= k_at[None] <= at[:, None] - window
        blocks.append(torch.einsum("hcm,mhd->chd", scores.masked_fill_(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(blocks)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(32, 8, 128), (28, 4, 128), (9, 3, 64), (8, 1, 64), (4, 4, 96)])
@pytest.mark.parametrize(
    ("c", "m"), [(2048, 2048), (2000, 2000), (512, 9 * 512), (77, 4173), (2048, 2048 + 1000), (9000, 9000), (64, 1024)]
)
def test_cudnn_equals_float32_within_rounding(compiled, dtype, heads, kv_heads, d, c, m):
    q, k, v = make(c, m, heads, kv_heads, d, dtype)
    at = torch.arange(m, device="cuda")
    assert compiled._suits_cudnn(q, k, v)
    got = causal_attention(q, k, v, at[m - c :], at, last_rows=True)
    assert not compiled._refused, "cuDNN was tried and has no plan"
    assert got.shape == q.shape and got.dtype == dtype
    limit = 3 * torch.finfo(dtype).eps
    assert relative_error(got, in_float32(q, k, v, at[m - c :], at)) < limit


def test_the_log_of_the_sum_is_natural_and_of_scaled_scores(compiled):
    q, k, v = make(256, 1024, 8, 2, 64, BF16)
    out, lse = compiled.attend(q, k, v, False)
    assert out.shape == q.shape and lse.shape == (8, 256) and lse.dtype == F32
    scores = torch.einsum("chd,mhd->hcm", q.float(), k.float().repeat_interleave(4, 1)) / 8
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=2e-3, atol=2e-3)
    out, lse = compiled.attend(q, k[:256], v[:256], True)
    scores = scores[..., :256].masked_fill(torch.ones(256, 256, device="cuda").triu(1).bool(), -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=2e-3, atol=2e-3)


def test_chunks_equal_one_pass_and_rows_repeat_bit_for_bit(compiled):
    q, k, v = make(8192, 8192, 32, 8, 128, BF16)
    at = torch.arange(8192, device="cuda")
    whole = causal_attention(q, k, v, at, at, last_rows=True)
    for begin, end in ((0, 2048), (2048, 4096), (4096, 4608), (6144, 8192), (7000, 8192)):
        args = q[begin:end], k[:end], v[:end], at[begin:end], at[:end]
        part = causal_attention(*args, last_rows=True)
        assert relative_error(part, whole[begin:end]) < 3 * torch.finfo(BF16).eps
        assert torch.equal(part, causal_attention(*args, last_rows=True))


def test_rows_behind_the_last_and_memory_that_was_never_written_do_not_matter(compiled):
    q, k, v = make(700, 3000, 8, 2, 128, BF16)
    at = torch.arange(2000, device="cuda")
    clean = causal_attention(q, k[:2000], v[:2000], at[1300:], at, last_rows=True)
    k[2000:], v[2000:] = torch.nan, torch.nan
    assert torch.equal(causal_attention(q, k[:2000], v[:2000], at[1300:], at, last_rows=True), clean)
    assert clean.isfinite().all()


def test_strided_heads_of_a_fused_projection(compiled):
    fused = torch.randn(1500, 48, 128, device="cuda", dtype=BF16)
    q, k, v = fused.split([32, 8, 8], 1)
    at = torch.arange(1500, device="cuda")
    got = causal_attention(q, k, v, at, at, last_rows=True)
    assert relative_error(got, in_float32(q, k, v, at, at)) < 3 * torch.finfo(BF16).eps


@pytest.mark.parametrize(
    ("dtype", "c", "m"), [(F32, 512, 2048), (F32, 700, 700), (BF16, 1, 5000), (BF16, 30, 31), (F16, 100, 500)]
)
def test_what_cudnn_is_not_asked_for_runs_all_the_same(compiled, dtype, c, m):
    q, k, v = make(c, m, 8, 2, 128, dtype)
    at = torch.arange(m, device="cuda")
    assert not compiled._suits_cudnn(q, k, v)
    got = causal_attention(q, k, v, at[m - c :], at, last_rows=True)
    limit = 2e-3 if dtype == F32 else 3 * torch.finfo(dtype).eps  # float32's fused kernel may multiply in TF32
    assert relative_error(got, in_float32(q, k, v, at[m - c :], at)) < limit


def test_16_bit_rows_never_reach_the_choice_of_torch(compiled, monkeypatch):
    def chosen(*args, **options):
        raise AssertionError("it may plan for every length")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", chosen)
    for c, m in ((1, 1), (1, 700), (3, 3), (77, 77), (100, 900), (700, 5000)):
        q, k, v = make(c, m, 8, 2, 128, BF16)
        at = torch.arange(m, device="cuda")
        got = causal_attention(q, k, v, at[m - c :], at, last_rows=True)
        assert relative_error(got, in_float32(q, k, v, at[m - c :], at)) < 3 * torch.finfo(BF16).eps


@pytest.mark.parametrize("window", [1, 100, 4096])
@pytest.mark.parametrize(("c", "m"), [(512, 512), (512, 6000), (3000, 5001)])
def test_a_window_needs_no_mask_where_positions_have_no_gaps(compiled, monkeypatch, window, c, m):
    q, k, v = make(c, m, 8, 2, 128, BF16)
    at = torch.arange(m, device="cuda")
    want = in_float32(q, k, v, at[m - c :], at, window)
    masked = causal_attention(q, k, v, at[m - c :], at, window, last_rows=True)
    monkeypatch.setattr(reference, "by_position", None)
    got = causal_attention(q, k, v, at[m - c :], at, window, last_rows=True, no_gaps=True)
    for one in (masked, got):
        assert relative_error(one, want) < 3 * torch.finfo(BF16).eps


def test_a_long_prompt_plans_for_few_shapes(compiled, monkeypatch):
    shapes = set()
    real = compiled.attend

    def noted(q, k, v, causal):
        shapes.add((len(q), len(k), causal))
        return real(q, k, v, causal)

    monkeypatch.setattr(compiled, "attend", noted)
    chunk, m = 2048, 65536
    q, k, v = make(chunk, m, 32, 8, 128, BF16)
    at = torch.arange(m, device="cuda")
    for end in range(chunk, m + 1, chunk):
        causal_attention(q, k[:end], v[:end], at[end - chunk : end], at[:end], last_rows=True)
    assert len(shapes) == 1 + (m // chunk - 1).bit_length()
    assert pieces.padded_rows(chunk) == chunk
