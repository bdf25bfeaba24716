"""What tests of compiled kernels need: a device that runs them, and outputs that show what a kernel left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvsluice.kernels.dispatch import TRITON, forced


@pytest.fixture
def device() -> torch.device:
    """Where compiled kernels run: a GPU, or the CPU under Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def interpreted(device: torch.device) -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return device.type == "cpu"


@pytest.fixture
def compiled() -> Callable[..., Any]:
    """`compiled(op, *args, **kwargs)` calls an op's compiled implementation. Memory that it allocates holds NaN, or the
    largest integer, until it is written."""

    def call(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        torch.use_deterministic_algorithms(True)
        try:
            with forced(TRITON):
                return op(*args, **kwargs)
        finally:
            torch.use_deterministic_algorithms(False)

    return call


@pytest.fixture
def same_bits(device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], bool]:
    """Whether two results of compiled kernels are of the same bits. Under the interpreter products are numpy's, whose
    last bits depend on a row's place on some processors."""
    if device.type == "cuda":
        return torch.equal
    return lambda one, other: torch.allclose(one, other, atol=1e-5, rtol=1e-5)
