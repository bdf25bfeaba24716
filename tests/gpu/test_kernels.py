"""Compiled kernels at the sizes of real prompts, against their references on the same GPU."""

from __future__ import annotations

import pytest
import torch

from kvsluice.kernels.attention_mass import attention_mass
from kvsluice.kernels.attention_partial import attention_partial, merge_partials
from kvsluice.kernels.dispatch import REFERENCE, TRITON, forced
from kvsluice.kernels.landmarks import score_landmarks, select_chunks
from kvsluice.kernels.quantize import dequantize, quantize
from kvsluice.kernels.rms_norm import rms_norm
from kvsluice.kernels.rope import apply_rope
from kvsluice.kernels.swiglu import swiglu
from kvsluice.kernels.window_saliency import window_saliency

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def random(*shape, dtype=F32):
    return torch.randn(*shape, device="cuda", dtype=F32).to(dtype)


@pytest.fixture(autouse=True)
def full_float32():
    torch.manual_seed(0)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def relative_error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def both(op, *args, **kwargs):
    with forced(REFERENCE):
        want = op(*args, **kwargs)
    with forced(TRITON):
        return op(*args, **kwargs), want


@pytest.mark.parametrize(
    "dtypes", [(BF16, BF16, BF16), (BF16, F32, F32), (F32, F32, F32), (F16, F16, F16), (F32, BF16, F16)]
)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(9, 3, 64), (32, 8, 128), (24, 3, 96), (4, 1, 256)])
def test_partial_attention_over_a_long_prompt(dtypes, heads, kv_heads, d):
    m = 20011
    q = random(11, heads, d, dtype=dtypes[0])
    k, v = (random(m, kv_heads, d, dtype=dtype).transpose(0, 1) for dtype in dtypes[1:])
    at, rows = torch.arange(m, device="cuda"), torch.arange(m - 11, m, device="cuda")
    for window in (None, 4000):
        (out, lse), (want, want_lse) = both(attention_partial, q, k, v, at, rows, window)
        assert relative_error(out, want) < 2e-5 and relative_error(lse, want_lse) < 2e-6
    with forced(TRITON):
        for i in (0, 4, 10):
            one, one_lse = attention_partial(q[i : i + 1], k, v, at, rows[i : i + 1], window)
            assert torch.equal(out[i], one[0]) and torch.equal(lse[i], one_lse[0])
        merged = merge_partials([(out, lse), (out, lse)])
    assert relative_error(merged, out) < 1e-6


def test_keys_beyond_two_to_the_31_elements():
    m = 2_200_000
    k = torch.zeros(m, 8, 128, dtype=BF16, device="cuda")
    k[-1] = 1.0
    q = torch.ones(1, 32, 128, dtype=BF16, device="cuda")
    with forced(TRITON):
        out, lse = attention_partial(
            q, k.transpose(0, 1), k.transpose(0, 1), None, torch.zeros(1, dtype=torch.int64, device="cuda")
        )
    share = torch.tensor(128**0.5, dtype=torch.float64).exp() / (
        torch.tensor(128**0.5, dtype=torch.float64).exp() + m - 1
    )
    torch.testing.assert_close(out.double().cpu(), share.expand(1, 32, 128), rtol=1e-4, atol=1e-7)
    assert lse.isfinite().all()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("window", [None, 1000])
def test_column_sums_of_a_long_prompt(dtype, window):
    m, c = 9001, 2500
    q, k = random(c, 9, 64, dtype=dtype), random(m, 3, 64, dtype=dtype)
    at = torch.arange(m, device="cuda")
    got, want = both(attention_mass, q, k, at[-c:], at, window)
    assert relative_error(got, want) < 1e-5
    got, want = both(window_saliency, q[:16], k, 7, "max", positions=at, window=window)
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_rows_of_a_layer(dtype):
    step = torch.finfo(dtype).eps
    x, weight = random(5000, 4096, dtype=dtype), random(4096, dtype=dtype)
    assert relative_error(*both(rms_norm, x, weight, 1e-5)) < max(step, 1e-6)
    assert relative_error(*both(swiglu, *random(3000, 2 * 14336, dtype=dtype).chunk(2, -1))) < max(step, 1e-6)
    angles = torch.rand(5000, 64, device="cuda").repeat(1, 2) * 1e4
    got, want = both(apply_rope, random(5000, 48, 128, dtype=dtype)[:, :32], angles.cos(), angles.sin())
    assert torch.equal(got, want)


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_decoding_a_long_prompt(axis):
    args = (*quantize(random(16000, 8, 128), 4, 64, axis), 4, 64, axis, 128)
    got, want = both(dequantize, *args)
    assert torch.equal(got, want)


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_packing_a_long_prompt_gives_the_bits_of_a_cpu(axis, bits):
    x = random(20011, 8, 128, dtype=BF16) * 3 + 10
    with forced(TRITON):
        got = quantize(x, bits, 64, axis)
    with forced(REFERENCE):
        on_gpu, want = quantize(x, bits, 64, axis), quantize(x.cpu(), bits, 64, axis)
    for one, other, third in zip(got, on_gpu, want, strict=True):
        assert torch.equal(one.cpu(), third) and torch.equal(other.cpu(), third)


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_packing_beyond_two_to_the_31_elements(axis):
    x = torch.zeros(2_200_000, 8, 128, dtype=BF16, device="cuda")
    x[-128:] = random(128, 8, 128, dtype=BF16)
    with forced(TRITON):
        whole, last = quantize(x, 4, 32, axis), quantize(x[-128:], 4, 32, axis)
        assert all(torch.equal(one[-len(other) :], other) for one, other in zip(whole, last, strict=True))
        tail = tuple(one[-len(other) :] for one, other in zip(whole, last, strict=True))
        decoded = dequantize(*whole, 4, 32, axis, 128)
        assert torch.equal(decoded[-128:], dequantize(*tail, 4, 32, axis, 128))


@pytest.mark.parametrize("n", [1000, 32768, 250001])
@pytest.mark.parametrize("share_hidden", [0.0, 0.2])
def test_choosing_among_the_chunks_of_a_long_prompt(n, share_hidden):
    # steps of a head's own, so that no rounding reorders the shares
    order = torch.stack([torch.randperm(n, device="cuda") for _ in range(3 * 32)]).view(3, 32, n)
    scores = order * ((1 + torch.arange(32, device="cuda") / 77) * 8 / 1000)[:, None]
    hidden = torch.rand(3, 8, n, device="cuda") < share_hidden if share_hidden else None
    (got, valid), (want, want_valid) = both(select_chunks, scores, 8, 512, hidden)
    assert torch.equal(got, want)
    assert (valid is None and want_valid is None) or torch.equal(valid, want_valid)
    with forced(TRITON):
        for _ in range(5):
            assert torch.equal(select_chunks(scores, 8, 512, hidden)[0], got)
        alone, _ = select_chunks(scores[1:2], 8, 512, None if hidden is None else hidden[1:2])
    assert torch.equal(alone[0], got[1])


def test_scoring_and_choosing_wait_for_nothing(without_waiting):
    q, codes, scale = random(2, 32, 128, dtype=BF16), random(32768, 8, 128).to(torch.int8), random(32768, 8, dtype=F16)
    hidden = torch.zeros(1, 8, 32768, dtype=torch.bool, device="cuda")

    def step():
        with forced(TRITON):
            return select_chunks(score_landmarks(q, codes, scale), 8, 256, hidden)

    want, _ = step()
    with without_waiting():
        got, _ = step()
    assert torch.equal(got, want)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        captured, _ = step()
    with torch.inference_mode():
        captured.zero_()
    graph.replay()
    assert torch.equal(captured, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_a_device_that_is_not_the_current_one():
    x = torch.randn(300, 8, 128, device="cuda:1")
    scores = torch.randn(2, 8, 5000, device="cuda:1")
    with forced(TRITON):
        assert torch.cuda.current_device() == 0
        packed = quantize(x, 4, 32, "token")
        back = dequantize(*packed, 4, 32, "token", 128)
        chunks, _ = select_chunks(scores, 2, 100, None)
        normed = rms_norm(x, x[0, 0], 1e-5)
    with torch.cuda.device(1), forced(TRITON):
        assert torch.equal(back, dequantize(*quantize(x, 4, 32, "token"), 4, 32, "token", 128))
        assert torch.equal(chunks, select_chunks(scores, 2, 100, None)[0])
        assert torch.equal(normed, rms_norm(x, x[0, 0], 1e-5))
