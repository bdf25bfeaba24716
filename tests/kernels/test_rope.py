"""`apply_rope` against rotation of complex numbers."""

from __future__ import annotations

import pytest
import torch

from kvsluice.kernels.rope import apply_rope


def rotate_complex(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("n", "heads", "d"), [(1, 1, 2), (5, 3, 64), (0, 2, 8)])
def test_equals_complex_rotation(n: int, heads: int, d: int, per_head: bool) -> None:
    x = torch.randn(n, heads, d)
    angles = torch.randn((n, heads, d // 2) if per_head else (n, d // 2), dtype=torch.float64)
    both = torch.cat((angles, angles), -1)

    y = apply_rope(x, both.cos().float(), both.sin().float())

    expected = rotate_complex(x, angles if per_head else angles[:, None].expand(n, heads, -1))
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)


def test_angle_zero_changes_nothing_and_norms_stay() -> None:
    x = torch.randn(4, 2, 6)
    angles = torch.randn(4, 3)
    both = torch.cat((angles, angles), -1)

    assert torch.equal(apply_rope(x, torch.ones(4, 6), torch.zeros(4, 6)), x)
    torch.testing.assert_close(apply_rope(x, both.cos(), both.sin()).norm(dim=-1), x.norm(dim=-1))


def test_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    frequencies = 1.0 / 100 ** (torch.arange(0, 8, 2) / 8)

    def at(x: torch.Tensor, position: int) -> torch.Tensor:
        angles = (position * frequencies).repeat(2)[None]
        return apply_rope(x, angles.cos(), angles.sin())

    torch.testing.assert_close((at(q, 17) * at(k, 5)).sum(), (at(q, 112) * at(k, 100)).sum(), rtol=1e-4, atol=1e-5)


def test_half_precision_is_rotated_in_float32() -> None:
    x = torch.randn(6, 2, 32).bfloat16()
    angles = 1000 * torch.randn(6, 32)
    cos, sin = angles.cos(), angles.sin()

    y = apply_rope(x, cos, sin)

    assert y.dtype == torch.bfloat16
    assert torch.equal(y, apply_rope(x.float(), cos, sin).bfloat16())


@pytest.mark.parametrize(
    ("x", "cos", "sin"), [((2, 1, 3), (2, 3), (2, 3)), ((2, 1, 4), (2, 2), (2, 2)), ((2, 1, 4), (2, 4), (1, 4))]
)
def test_shapes_that_do_not_fit_are_refused(x: tuple[int, ...], cos: tuple[int, ...], sin: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must|does not fit|differ"):
        apply_rope(torch.zeros(x), torch.zeros(cos), torch.zeros(sin))
