"""Which implementation of an op runs."""

from __future__ import annotations

import pytest
import torch

from kvsluice.kernels.dispatch import REFERENCE, TRITON, backend, require

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_reference_runs_everywhere_and_triton_on_cuda_where_there_is_one() -> None:
    both = {REFERENCE: "plain", TRITON: "compiled"}

    assert backend(CPU, both) == "plain"
    assert backend(CUDA, both) == "compiled"
    assert backend(CUDA, {REFERENCE: "plain"}) == "plain"


def test_require() -> None:
    require(True, "never")
    with pytest.raises(ValueError, match="so wrong"):
        require(False, "so wrong")
