"""Compiled kernels build for an H100, which the interpreter does not show: types, shared memory, registers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia", reason="Triton here builds for no NVIDIA GPU")

SHARED_BYTES = 227 << 10  # of a block on compute capability 9.0
SPILLED_BYTES = 64  # of a thread; a few do no harm, and how many differs between compilers


def test_every_kernel_builds_and_keeps_to_its_registers(tmp_path: Path) -> None:
    program = Path(__file__).parent / "builds.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-P", str(program)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    built = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _, _ in built} >= {"_attend_split", "_column_sums", "_score", "_choose", "_encode", "_merge"}
    assert not [line for line in built if int(line[1]) > SHARED_BYTES or not 0 <= int(line[2]) <= SPILLED_BYTES]
