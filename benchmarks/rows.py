"""What the parts share in making rows: what does not fit becomes a row that says so, and rows are compared."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..errors import KvsluiceError, Overloaded
from .bench_results import Row
from .subject import Bench
from .tables import seconds
from .timing import release

OUT_OF_MEMORY = "out of memory"


def measured(bench: Bench, empty: Row, measure: Callable[[Row], Row]) -> Row:
    """The row that a measurement makes of an empty one; where memory does not suffice, the empty row with the reason.

    Raises:
        KvsluiceError: whatever else the engines fail with.
    """
    (row,) = all_measured(bench, [empty], lambda empties: [measure(empties[0])])
    return row


def all_measured(bench: Bench, empties: Sequence[Row], measure: Callable[[Sequence[Row]], Sequence[Row]]) -> list[Row]:
    """The same for rows that are measured together."""
    try:
        rows = list(measure(empties))
    except torch.OutOfMemoryError:
        rows = _not_run(empties, OUT_OF_MEMORY)
    except Overloaded as exc:
        rows = _not_run(empties, exc.message)
    except KvsluiceError as exc:
        if "OutOfMemoryError" not in exc.message:  # the engines name the type of what they did not expect
            raise
        rows = _not_run(empties, OUT_OF_MEMORY)
    gc.collect()
    release(bench.device)
    for row in rows:
        bench.keep(row)
        bench.progress.say(f"  not run: {row.not_run}" if row.time is None else f"  {seconds(row.time.median_s)}")
    return rows


def _not_run(empties: Sequence[Row], reason: str) -> list[Row]:
    return [replace(empty, not_run=reason) for empty in empties]


def compared(rows: Sequence[Row], sides: Sequence[str]) -> list[Row]:
    """The rows, each with how many times as fast it is as the sides that ran in the same conditions."""
    out = []
    for row in rows:
        ratios = dict(row.ratios)
        for side in sides:
            other = next((one for one in rows if one.side == side and _alike(one, row) and one is not row), None)
            if row.time is not None and other is not None and other.time is not None:
                ratios[side] = other.time.median_s / row.time.median_s
        out.append(replace(row, ratios=ratios))
    return out


def _alike(one: Row, row: Row) -> bool:
    return (one.what, one.model, one.context, one.batch) == (row.what, row.model, row.context, row.batch)
