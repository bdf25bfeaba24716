"""What a kernel may take on an H100 before it is slow without anybody noticing; checked by `compile_kernels.py`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

SHARED_BYTES = 227 << 10  # of a block on compute capability 9.0
# registers of a thread that spill: 16 numbers or so, which the cache next to the processor holds
LOCAL_BYTES = 64


@dataclass(frozen=True)
class Allowance:
    """A kernel that may do worse.

    Attributes:
        kernel: its name.
        case: a part of the name of the cases.
        num_bytes: how much it may spill, or how little it may load at a time.
        reason: why that is accepted.
    """

    kernel: str
    case: str
    num_bytes: int
    reason: str


MORE_SPILLED = (
    Allowance("attend_items", "", 128, "it is held to 128 registers, so that twice as many of its warps fit"),
    Allowance("attend_items", "llama-3.1-8b fp32 xkv-kv", 1024, "two products in float32, where models are bfloat16"),
)

NARROWER_LOADS = {
    "code_block.packed": (
        Allowance("attend_items", "smollm2-135m sluice", 2, "rows of rank 30 are aligned to 2 bytes each"),
    ),
}

# kernel -> loads that carry its data -> the least bytes a thread and load. The memory's bandwidth needs 4, and loads of
# fewer bytes cannot go to shared memory while the processor computes.
DATA_LOADS: dict[str, dict[str, int]] = {
    "attend_items": {
        "dense_block": 8,
        "code_block.packed": 4,
        "_factor_rows.out": 4,
        "_basis_block": 8,
    },
    "score_chunks": {"score_chunks.means": 16},
    "merge_items": {"merge_items.rows": 16},
    "append_rows": {"append_rows.k": 4, "append_rows.v": 4},
    "_attend_split": {"_attend.k": 16, "_attend.v": 16},
    "_denominators": {"_denominators.k": 16},
    "_column_sums": {"_column_sums.columns": 16, "_column_sums.q": 16},
    "_merge_splits": {"_merge_splits.outs": 4},
    "_merge": {"_merge.merged": 16},
    "_score": {"_score.means": 8},
    "_multiply": {"_multiply.left": 4, "_multiply.right": 4},
    "_rms_norm": {"_rms_norm.x": 16},
    "_add_rms_norm": {"_add_rms_norm.x": 16, "_add_rms_norm.residual": 16},
    "_rotate": {"_rotate.low": 8, "_rotate.high": 8},
    "pack_rows": {"pack_rows.x": 8},
    "project_rows": {"project_rows.left": 8, "project_rows.right": 8},
    "pack_factors": {"pack_factors.x": 8},
    "shift_rows": {"shift_rows.x": 8},
    "_swiglu": {"_swiglu.gate": 16, "_swiglu.up": 16},
}


def broken_limits(
    kernel: str, case: str, local_bytes: int, shared_bytes: int, loads: Mapping[str, Mapping[int, int]]
) -> Iterator[str]:
    """What is wrong with a compiled kernel, a line each; `loads` as `compile_kernels.Build` has them."""
    where = f"{kernel} in {case}"
    most = max([LOCAL_BYTES, *_allowed(MORE_SPILLED, kernel, case)])
    if local_bytes > most:
        yield f"{where}: {local_bytes} bytes of registers spill, {most} may"
    if shared_bytes > SHARED_BYTES:
        yield f"{where}: {shared_bytes} bytes of shared memory, {SHARED_BYTES} are there"
    for place, least in DATA_LOADS.get(kernel, {}).items():
        least = min([least, *_allowed(NARROWER_LOADS.get(place, ()), kernel, case)])
        narrow = min(loads.get(place, {least: 0}))
        if narrow < least:
            yield f"{where}: {place} is loaded {narrow} bytes at a time, not {least}"


def _allowed(allowances: Iterable[Allowance], kernel: str, case: str) -> list[int]:
    return [one.num_bytes for one in allowances if one.kernel == kernel and one.case in case]
