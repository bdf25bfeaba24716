"""Which implementation of an op runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kvsluice.kernels.dispatch import REFERENCE, TRITON, Modules, backend, forced, require

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_reference_runs_everywhere_and_triton_on_cuda_where_there_is_one() -> None:
    both = {REFERENCE: "plain", TRITON: "compiled"}

    assert backend(CPU, both) == "plain"
    assert backend(CUDA, both) == "compiled"
    assert backend(CUDA, {REFERENCE: "plain"}) == "plain"


def test_one_can_be_forced_for_a_while_where_the_op_has_it() -> None:
    both = {REFERENCE: "plain", TRITON: "compiled"}

    with forced(TRITON):
        assert backend(CPU, both) == "compiled"
        assert backend(CPU, {REFERENCE: "plain"}) == "plain"
        with forced(REFERENCE):
            assert backend(CUDA, both) == "plain"
        assert backend(CPU, both) == "compiled"
    assert backend(CPU, both) == "plain"


def test_modules_are_imported_when_they_are_wanted() -> None:
    modules = Modules("kvsluice.kernels.rope", REFERENCE, TRITON)

    assert set(modules) == {REFERENCE, TRITON}
    assert modules[REFERENCE].__name__ == "kvsluice.kernels.rope.reference"
    with pytest.raises(KeyError):
        Modules("kvsluice.kernels.rope", REFERENCE)[TRITON]


def test_ops_on_a_cpu_leave_the_compiler_out() -> None:
    """Start-up stays light, and a machine without Triton runs."""
    program = (
        "import sys, torch; from kvsluice.kernels.swiglu import swiglu; "
        "import kvsluice.kernels.attention_partial, kvsluice.kernels.sparse_reconstruct; "
        "swiglu(torch.ones(1, 2), torch.ones(1, 2)); print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_require() -> None:
    require(True, "never")
    with pytest.raises(ValueError, match="so wrong"):
        require(False, "so wrong")
