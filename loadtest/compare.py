"""Two runs beside each other: every statistic, and how far their difference can be trusted.

Intervals are of the percentile bootstrap (Efron and Tibshirani 1993): requests of both runs are drawn anew with
replacement, and the difference of the statistic is taken each time. Requests are drawn in blocks of neighbours in time
(Künsch 1989), because what one waits, its neighbours wait as well; single requests would claim too much.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ..errors import InvalidRequest
from .outcomes import SERVED, Outcome
from .results import RunResults, load

NUM_RESAMPLES = 2000
LEVEL = 0.95
LEAST_REQUESTS = 10
WIDTH = 110

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]


@dataclass(frozen=True)
class Difference:
    """A statistic of two runs.

    Attributes:
        before, after: of either, in ms.
        low, high: ends of the interval of after - before; None where a run has too few requests.
    """

    name: str
    before: float
    after: float
    low: float | None
    high: float | None

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def compare(before: Sequence[Outcome], after: Sequence[Outcome], seed: int = 0) -> list[Difference]:
    """Mean, median and 99th percentile of each latency, over what both runs served.

    Args:
        before, after: counted outcomes in order of arrival.
    """
    rows = []
    for metric, take in _METRICS.items():
        own, other = (_values(outcomes, take) for outcomes in (before, after))
        if own.size == 0 or other.size == 0:
            continue
        drawn = [_resampled(values, seed + place) for place, values in enumerate((own, other))]
        for name, statistic in _STATISTICS.items():
            values = float(statistic(own[None, :])[0]), float(statistic(other[None, :])[0])
            low = high = None
            if min(own.size, other.size) >= LEAST_REQUESTS:
                differences = statistic(drawn[1]) - statistic(drawn[0])
                low, high = (float(p) for p in np.percentile(differences, [50 * (1 - LEVEL), 50 * (1 + LEVEL)]))
            rows.append(Difference(f"{name} {metric}", *values, low, high))
    return rows


def _values(outcomes: Sequence[Outcome], take: Callable[[Outcome], float | None]) -> Floats:
    found = [take(one) for one in outcomes if one.status == SERVED]
    return 1e3 * np.array([value for value in found if value is not None], dtype=np.float64)


def _resampled(values: Floats, seed: int) -> Floats:
    """float64 [resamples, n]: runs of neighbours, drawn with replacement until there are n; the end joins the start."""
    size = len(values)
    length = max(1, round(size ** (1 / 3)))
    generator = np.random.default_rng([seed, size])
    starts = generator.integers(size, size=(NUM_RESAMPLES, math.ceil(size / length)))
    places = (starts[:, :, None] + np.arange(length)) % size
    return np.asarray(values[places.reshape(NUM_RESAMPLES, -1)[:, :size]])


_METRICS: dict[str, Callable[[Outcome], float | None]] = {
    "TTFT": lambda one: one.ttft_s,
    "TPOT": lambda one: one.tpot_s,
    "E2EL": lambda one: one.e2el_s,
}
_STATISTICS: dict[str, Statistic] = {
    "mean": lambda values: np.asarray(values.mean(axis=1)),
    "median": lambda values: np.asarray(np.median(values, axis=1)),
    "P99": lambda values: np.asarray(np.percentile(values, 99, axis=1)),
}
_FIGURES = {
    "Request throughput (req/s)": "request_throughput",
    "Request goodput (req/s)": "request_goodput",
    "Output token throughput (tok/s)": "output_throughput",
    "Total token throughput (tok/s)": "total_token_throughput",
}


def compare_files(before: Path, after: Path, seed: int = 0) -> str:
    """The comparison as text.

    Raises:
        InvalidRequest: a file is none, or was written without requests.
    """
    if seed < 0:
        raise InvalidRequest("--seed", f"got {seed}", "whole numbers from 0")
    runs = [load(path).last for path in (before, after)]
    counted = [sorted((o for o in run.outcomes() if not o.warm_up), key=lambda o: o.arrival_s) for run in runs]
    table = Table("", "before", "after", "change", "95 % interval", title=f"{before.name} → {after.name}")
    for name, key in _FIGURES.items():
        own, other = (run.figures.get(key) for run in runs)
        if own is not None and other is not None:
            table.add_row(name, f"{own:.2f}", f"{other:.2f}", _change(own, other), "")
    for row in compare(counted[0], counted[1], seed):
        interval = "too few" if row.low is None else f"{row.low:+.1f} … {row.high:+.1f} ms"
        change = _change(row.before, row.after) + ("" if row.is_clear or row.low is None else " (unclear)")
        table.add_row(f"{row.name} (ms)", f"{row.before:.1f}", f"{row.after:.1f}", change, interval)
    console = Console(file=io.StringIO(), width=WIDTH, force_terminal=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue() + _notes(runs)


def _change(before: float, after: float) -> str:
    return f"{(after - before) / before:+.1%}" if before else ""


def _notes(runs: Sequence[RunResults]) -> str:
    """What makes the comparison less than it looks."""
    notes = [
        f"INVALID: {name}: {run.invalid}\n" for name, run in zip(("before", "after"), runs, strict=True) if run.invalid
    ]
    if runs[0].rate != runs[1].rate:
        notes.append(f"note: the rates differ: {runs[0].rate} and {runs[1].rate}\n")
    return "".join(notes)
