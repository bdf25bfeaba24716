"""`swiglu` against its formula."""

from __future__ import annotations

import pytest
import torch

from kvsluice.kernels.swiglu import swiglu


def test_equals_the_formula_and_leaves_its_inputs_alone() -> None:
    both = torch.randn(5, 2 * 123)
    before = both.clone()
    gate, up = both.chunk(2, -1)

    y = swiglu(gate, up)

    wide = gate.double()
    torch.testing.assert_close(y.double(), wide / (1 + (-wide).exp()) * up.double(), rtol=1e-6, atol=1e-6)
    assert torch.equal(both, before)
    assert y.dtype == torch.float32


def test_large_values_do_not_overflow() -> None:
    assert torch.equal(swiglu(torch.tensor([[-200.0, 200.0]]), torch.ones(1, 2)), torch.tensor([[-0.0, 200.0]]))


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="differ"):
        swiglu(torch.zeros(2, 3), torch.zeros(2, 4))
