"""Compiles every kernel of `kernels/` for an H100, without one, and prints what came of it: a line a kernel and case.

The interpreter, which runs kernels where there is no GPU, shows neither errors of the compiler nor registers that
spill nor loads that are done element by element. Calls are those of the ops; instead of a launch the kernel is
compiled with the signature, alignment and options that the launch would have had. Exits with 1 when a kernel
does not compile or breaks a limit of `kernel_limits.py`.

    python scripts/compile_kernels.py                    every case
    python scripts/compile_kernels.py --quick            the cases of the suite
    python scripts/compile_kernels.py --case lowrank     cases whose name has that
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
os.environ.pop("TRITON_INTERPRET", None)  # it is read when Triton is imported
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / ".cache" / "triton"))

import triton  # noqa: E402
from kernel_cases import cases  # noqa: E402
from kernel_limits import DATA_LOADS, broken_limits  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

Loads = Mapping[str, Mapping[int, int]]


@dataclass(frozen=True)
class Build:
    """One kernel as one case launches it.

    Attributes:
        registers: a thread.
        local_bytes: a thread's memory off the chip: registers that spill, and tables that no register holds.
        shared_bytes: a block.
        loads: by place in the source, how many instructions load how many bytes a thread from global memory.
        num_products: matrix instructions.
    """

    kernel: str
    case: str
    registers: int
    local_bytes: int
    shared_bytes: int
    loads: Loads
    num_products: int


class Hopper:
    """Stands in for a driver of a GPU of compute capability 9.0."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(found: list[tuple[str, Any]]) -> Iterator[None]:
    """Within the context a launch compiles its kernel, of which it adds name and result to `found`, and nothing more:
    what the kernel would have written stays as it was allocated."""

    def compiled(kernel: Any, grid: Any) -> Any:
        return lambda *args, **kwargs: found.append(
            (kernel.__name__, kernel.run(*args, grid=grid, warmup=True, **kwargs))
        )

    driver.set_active(Hopper())
    launched, JITFunction.__getitem__ = JITFunction.__getitem__, compiled
    try:
        yield
    finally:
        JITFunction.__getitem__ = launched


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(BIN / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert found is not None, text
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def loads_of(ptx: str) -> dict[str, Counter[int]]:
    """See `Build.loads`."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', ptx, re.MULTILINE))
    loads: dict[str, Counter[int]] = {}
    place = "?"
    for line in ptx.splitlines():
        if at := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            place = place_name(files[at[1]], int(at[2]))
        elif load := re.search(r"\bld\.global[\w:.]*?(?:\.v(\d))?\.[bsuf](\d+)\s", line):
            loads.setdefault(place, Counter())[int(load[1] or 1) * int(load[2]) // 8] += 1
        elif load := re.search(r"\bcp\.async\.c[ag]\.shared\.global[^;]*\],\s*(0x[0-9a-f]+|\d+)", line):
            loads.setdefault(place, Counter())[int(load[1], 0)] += 1
    return loads


@cache
def _statements(path: str) -> tuple[tuple[int, int, str], ...]:
    """First and last line of every statement of a file's functions, and a name for it."""
    found = []
    for function in ast.walk(ast.parse(Path(path).read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Assign | ast.AugAssign):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                found.append((node.lineno, node.end_lineno or 0, f"{function.name}.{ast.unparse(target)}"))
            elif isinstance(node, ast.Return):
                found.append((node.lineno, node.end_lineno or 0, function.name))
    return tuple(found)


@cache
def place_name(path: str, line: int) -> str:
    """`function.variable` that a line assigns to, or the function that it returns from."""
    if not Path(path).is_file():
        return "?"
    return next((name for first, last, name in _statements(path) if first <= line <= last), f"{Path(path).name}:{line}")


def build(kernel: str, case: str, compiled: Any) -> Build:
    """What a compiled kernel takes."""
    ptx = compiled.asm["ptx"]
    registers, local_bytes = usage(compiled.asm["cubin"])
    products = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", ptx))
    return Build(kernel, case, registers, local_bytes, compiled.metadata.shared, loads_of(ptx), products)


def builds(quick: bool, part: str) -> Iterator[tuple[Build | None, str]]:
    """Every build, or None and what was wrong; a kernel that several cases launch alike comes once."""
    seen: set[str] = set()
    for name, action in cases(quick):
        if part not in name:
            continue
        found: list[tuple[str, Any]] = []
        try:
            with compiling(found):
                action()
        except Exception as exc:  # a compiler's errors share no class
            yield None, f"{name}: {type(exc).__name__}: {str(exc)[-2000:]}"
        for kernel, compiled in found:
            if compiled.hash not in seen:
                seen.add(compiled.hash)
                yield build(kernel, name, compiled), ""


def missing(found: list[Build]) -> list[str]:
    """Kernels that no case launches, and data whose loads have gone: a limit of neither would ever be broken."""
    names = {one.kernel for one in found}
    wrong = [f"no case launches {kernel}" for kernel in sorted(kernels() - names)]
    for kernel, places in DATA_LOADS.items():
        seen = {place for one in found if one.kernel == kernel for place in one.loads}
        wrong += [f"{kernel} has no load {place}; has it another name now?" for place in places if place not in seen]
    return wrong


def kernels() -> set[str]:
    """Names of the compiled functions that ask which program they are, which those called by others do not."""
    found = set()
    for path in (ROOT / "kernels").rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and "tl.program_id(" in ast.unparse(function):
                found.add(function.name)
    return found


def row(one: Build) -> str:
    """A line of the table. Loads of single numbers are left out."""
    loads = ", ".join(
        f"{place} {'+'.join(f'{count}x{width}' for width, count in sorted(widths.items(), reverse=True))}"
        for place, widths in one.loads.items()
        if "(" not in place and set(widths) != {8}
    )
    sizes = f"{one.registers:>4} {one.local_bytes:>6} {one.shared_bytes:>7} {one.num_products:>4}"
    return f"{one.kernel:<16} {one.case:<34} {sizes}  {loads}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel for an H100.")
    parser.add_argument("--quick", action="store_true", help="the cases of the test suite")
    parser.add_argument("--case", default="", help="cases whose name has this")
    given = parser.parse_args()
    print(f"Triton {triton.__version__}; loads as instructions x bytes a thread, by place in the source")
    print(f"{'kernel':<16} {'case':<34} {'regs':>4} {'local':>6} {'shared':>7} {'mma':>4}  loads")
    wrong, found = [], []
    for one, error in builds(given.quick, given.case):
        if one is None:
            wrong.append(error)
            continue
        print(row(one), flush=True)
        found.append(one)
        wrong += broken_limits(one.kernel, one.case, one.local_bytes, one.shared_bytes, one.loads)
    if not given.case:
        wrong += missing(found)
    print("\n".join(wrong) or "all kernels keep to their limits")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
