"""`kvsluice bench kernels`: every operation of `kernels/` at a model's shapes, against its torch reference.

On a GPU the cache is emptied before each repetition, so bandwidth means the device's memory.
"""

from __future__ import annotations

import importlib.util
import pkgutil
from dataclasses import replace

import torch

from .. import kernels
from ..kernels.dispatch import REFERENCE, TRITON, forced, has_triton, runs
from .bench_results import Floor, Row
from .host_cases import host_cases
from .kernel_cases import BUILDERS, FOLDERS, Case, Inputs
from .rows import compared, measured
from .step_cases import step_cases
from .subject import Bench, Subject
from .timing import time_kernel

COMPILED_ONLY = frozenset({"hot_set"})


def measure(bench: Bench) -> list[Row]:
    """Two rows a case where a compiled kernel runs here, else one of the reference."""
    bench.progress.expect(len(bench.subjects) * len(bench.options.contexts))
    rows = []
    for subject in bench.subjects:
        for context in bench.options.contexts:
            bench.progress.begin(f"kernels of {subject.name} over {context} rows")
            rows += _rows(bench, subject, context)
        rows += [
            Row(what=f"kernel: {name}", side="-", model=subject.name, not_run="no case is written for it")
            for name in uncovered()
        ]
        if not runs(TRITON, bench.device):
            rows += [
                Row(what=f"kernel: {name}", side="-", model=subject.name, not_run="it runs on a GPU only")
                for name in sorted(COMPILED_ONLY)
            ]
    return compared(rows, (REFERENCE,))


def uncovered() -> list[str]:
    """Folders of `kernels/` without a case."""
    covered = FOLDERS | COMPILED_ONLY | {"step_attention"}
    return sorted({one.name for one in pkgutil.iter_modules(kernels.__path__) if one.ispkg} - covered)


def sides(device: torch.device, folder: str) -> tuple[str, ...]:
    """The implementations of an operation that run on a device."""
    compiled = importlib.util.find_spec(f"{kernels.__name__}.{folder}.{TRITON}") is not None
    return (TRITON, REFERENCE) if device.type == "cuda" and has_triton() and compiled else (REFERENCE,)


@torch.inference_mode()
def _rows(bench: Bench, subject: Subject, context: int) -> list[Row]:
    given = Inputs(subject.config, context, bench.device, bench.dtype, bench.options.seed)
    rows = []
    for build in (*BUILDERS, step_cases, host_cases):
        for case in build(given):
            for side in sides(bench.device, case.folder):
                empty = Row(what=f"kernel: {case.name}", side=side, model=subject.name, context=context)
                rows.append(measured(bench, empty, lambda row, case=case: _timed(bench, case, row)))  # type: ignore[misc]
    return rows


def _timed(bench: Bench, case: Case, empty: Row) -> Row:
    options = bench.options
    action = case.reference if empty.side == REFERENCE and case.reference is not None else case.action
    with forced(empty.side):
        time = time_kernel(bench.device, action, options.warmup, options.repeats)
    on_device, link = Floor.of(bench.limits, case.bytes_moved, case.flops), Floor.between(bench.limits, case.link_bytes)
    floor = max(on_device, link, key=lambda one: one.floor_s)
    figures = {"share_of_limit": floor.floor_s / time.median_s, "gb_per_s": floor.bytes_moved / time.median_s / 1e9}
    if case.flops:
        figures["tflop_per_s"] = case.flops / time.median_s / 1e12
    return replace(empty, time=time, floor=floor, figures=figures)
