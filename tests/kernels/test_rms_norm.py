"""`rms_norm` against its formula in float64."""

from __future__ import annotations

import pytest
import torch

from kvsluice.kernels.rms_norm import add_rms_norm, rms_norm


def formula(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


# one rounding of the result to the dtype and one of the normalised value before the weight
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-7), (torch.bfloat16, 1.6e-2)])
@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (3, 7, 64), (0, 16)])
def test_equals_the_formula(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (100 * torch.randn(shape, generator=generator)).to(dtype)
    weight = torch.randn(shape[-1], generator=generator).to(dtype)

    y = rms_norm(x, weight, 1e-5)

    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), formula(x, weight, 1e-5), rtol=tolerance, atol=tolerance)


def test_residual_is_added_before_and_returned() -> None:
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.ones(8)

    y, total = add_rms_norm(x, residual, weight, 1e-6)

    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(x + residual, weight, 1e-6))


def test_epsilon_bounds_small_rows() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 4), torch.ones(4), 1e-6), torch.zeros(2, 4))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="weight"):
        rms_norm(torch.zeros(2, 4), torch.ones(3), 1e-6)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(torch.zeros(2, 4), torch.zeros(2, 3), torch.ones(4), 1e-6)
