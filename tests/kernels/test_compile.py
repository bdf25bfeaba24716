"""Every kernel compiles for an H100, and takes what it may take there: registers, shared memory, wide loads."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia", reason="Triton here compiles for no NVIDIA GPU")

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SPEC = importlib.util.spec_from_file_location("kernel_limits", SCRIPTS / "kernel_limits.py")
assert SPEC is not None and SPEC.loader is not None
limits = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = limits
SPEC.loader.exec_module(limits)

WIDE = {"score_chunks.means": {16: 4}}


def test_every_kernel_compiles_and_keeps_to_its_limits():
    """The script says what is wrong: an error of the compiler, a kernel that no case launches, a limit that is broken.
    What it compiles stays in a cache, so that a second run is quick."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "compile_kernels.py"), "--quick"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attend_items" in done.stdout


@pytest.mark.parametrize(
    ("kernel", "local_bytes", "shared_bytes", "loads", "said"),
    [
        ("score_chunks", 65, 0, WIDE, "spill"),
        ("score_chunks", 0, (227 << 10) + 1, WIDE, "shared memory"),
        ("score_chunks", 0, 0, {"score_chunks.means": {16: 4, 2: 1}}, "2 bytes at a time"),
    ],
)
def test_a_kernel_that_takes_too_much_is_named(kernel, local_bytes, shared_bytes, loads, said):
    (line,) = limits.broken_limits(kernel, "case", local_bytes, shared_bytes, loads)
    assert kernel in line and said in line


def test_a_kernel_within_its_limits_is_not():
    assert not list(limits.broken_limits("score_chunks", "case", 64, 227 << 10, WIDE))
