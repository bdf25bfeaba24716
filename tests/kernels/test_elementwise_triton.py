"""The compiled `rms_norm`, `apply_rope` and `swiglu` against their references."""

from __future__ import annotations

import pytest
import torch

from kvsluice.kernels.rms_norm import add_rms_norm, rms_norm
from kvsluice.kernels.rms_norm import reference as rms_reference
from kvsluice.kernels.rope import apply_rope
from kvsluice.kernels.rope import reference as rope_reference
from kvsluice.kernels.swiglu import reference as swiglu_reference
from kvsluice.kernels.swiglu import swiglu

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# a few steps of the dtype, where float32 intermediates round the other way
STEP = {F32: 4e-6, F16: 2e-3, BF16: 2.4e-2}


@pytest.fixture(params=[F32, F16, BF16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def random(device, dtype):
    generator = torch.Generator().manual_seed(4)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)


@pytest.fixture
def same(interpreted, dtype):
    """Asserts equal bits; Triton's interpreter cuts float32 to bfloat16 instead of rounding it."""

    def check(got, want):
        if interpreted and dtype == BF16:
            near(got, want, dtype)
        else:
            assert torch.equal(got, want)

    return check


def near(got, want, dtype):
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=STEP[dtype], atol=STEP[dtype] / 16)


@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (37, 64), (3, 7, 96), (2, 3, 2, 16), (2, 4096), (0, 16)])
def test_rms_norm(compiled, random, dtype, shape):
    x, weight = 30 * random(*shape), random(shape[-1])
    near(compiled(rms_norm, x, weight, 1e-5), rms_reference.rms_norm(x, weight, 1e-5), dtype)


def test_rms_norm_of_heads_inside_a_wider_buffer(compiled, random, dtype):
    fused, weight = random(11, 9, 64), random(64)
    for x in (fused[:, :5], fused[:, 5:7], fused.transpose(0, 1)):
        near(compiled(rms_norm, x, weight, 1e-6), rms_reference.rms_norm(x, weight, 1e-6), dtype)


@pytest.mark.parametrize("shape", [(1, 576), (5, 123), (3, 2, 64), (0, 16)])
def test_add_rms_norm(compiled, random, same, dtype, shape):
    x, residual, weight = random(*shape), random(*shape), random(shape[-1])
    (y, total), (want, want_total) = (
        compiled(add_rms_norm, x, residual, weight, 1e-5),
        rms_reference.add_rms_norm(x, residual, weight, 1e-5),
    )
    same(total, want_total)
    near(y, want, dtype)


@pytest.mark.parametrize(("n", "heads", "d"), [(1, 1, 2), (5, 9, 64), (3, 24, 128), (4, 3, 96), (0, 2, 8)])
@pytest.mark.parametrize("per_head", [False, True])
def test_rope_rounds_as_the_reference(compiled, random, same, device, n, heads, d, per_head):
    fused = random(n, heads + 3, d)
    angles = torch.randn((n, heads, d // 2) if per_head else (n, d // 2)).to(device)
    cos, sin = (torch.cat((t, t), -1) for t in (angles.cos(), angles.sin()))
    for x in (fused[:, :heads], fused[:, 3:].contiguous()):
        wide = (cos, sin) if per_head else (cos[:, None], sin[:, None])
        same(compiled(apply_rope, x, cos, sin), rope_reference.apply_rope(x, *wide))


@pytest.mark.parametrize(("n", "f"), [(1, 1), (3, 1024), (2, 1536), (5, 1100), (0, 8)])
def test_swiglu(compiled, random, dtype, n, f):
    gate, up = (10 * random(n, 2 * f)).chunk(2, -1)
    near(compiled(swiglu, gate, up), swiglu_reference.swiglu(gate, up), dtype)


def test_rows_together_equal_rows_alone_bit_for_bit(compiled, random):
    x, residual, weight = random(40, 96), random(40, 96), random(96)
    gate, up = random(40, 96), random(40, 96)
    for op, args in (
        (lambda x: rms_norm(x, weight, 1e-6), (x,)),
        (lambda x, residual: add_rms_norm(x, residual, weight, 1e-6)[0], (x, residual)),
        (swiglu, (gate, up)),
    ):
        together = compiled(op, *args)
        for i in (0, 5, 39):
            assert torch.equal(together[i], compiled(op, *(t[i : i + 1] for t in args))[0])
