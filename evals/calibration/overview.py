"""The tables that close a calibration."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .records import Finalist, Report, Tried

FILE_WIDTH = 140  # characters a line where no terminal says how many
SHOWN = 8  # candidates of a stage
FEW_SAMPLES = 5


def first_cut_rows(candidates: Sequence[Tried]) -> list[tuple[str, ...]]:
    """The best candidates of a stage: label, error, and costs as shares."""
    measured = sorted((one for one in candidates if one.error is not None), key=lambda one: (one.error, one.label))
    return [
        (one.label, f"{one.error:.4f}", f"{one.costs.prefill:.3f}", f"{one.costs.shipped:.3f}", f"{one.costs.held:.3f}")
        for one in measured[:SHOWN]
        if one.costs is not None
    ]


def finalist_rows(report: Report) -> list[tuple[str, ...]]:
    """Every finalist: label, means by context, how far behind the best, costs as counted, a remark."""
    return [
        (
            one.label,
            *(f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in one.means.values()),
            f"{one.behind[0]:+.3f} [{one.behind[1]:+.3f}, {one.behind[2]:+.3f}]",
            f"{one.prefill:.3f}",
            f"{one.shipped:.3f}",
            f"{one.held:.3f}",
            _remark(report, one),
        )
        for one in report.finalists
    ]


def _remark(report: Report, one: Finalist) -> str:
    words = []
    if one.label == report.chosen:
        words.append("chosen")
    if one.label == report.best:
        words.append("best mean")
    elif one.label in report.tied:
        words.append("not told apart")
    if one.fingerprint == report.present.fingerprint:
        words.append("as it is now" + ("" if report.present.refused is None else ", over a budget"))
    return ", ".join(words)


def notes(report: Report, out: Path) -> Iterator[str]:
    """What was chosen, where it lies, and what it is worth."""
    chosen, samples = report.finalist(report.chosen), report.settings["second_cut"]["samples"]
    yield f"chosen: {', '.join(f'{key} = {value}' for key, value in chosen.choice.items())}"
    yield f"written to {out}; `kvsluice serve --profile {out}` serves with it, and eval takes it likewise"
    if report.present.refused is not None:
        yield f"the numbers as they are now could not be chosen: {report.present.label} {report.present.refused}"
    if samples < FEW_SAMPLES:
        yield f"{samples} samples a task tell little apart, and intervals are too narrow to trust: try more"
    for one in report.finalists:
        if one.fallbacks:
            yield f"{one.label} ran exact on {one.fallbacks} samples that were too short for it"


def print_overview(report: Report, out: Path) -> None:
    """The best of both stages, all finalists, and what was chosen."""
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False)
    costs = ("error", "prefill", "shipped", "held")
    for name, candidates in (("rows that go on", report.propagation), ("packed and read", report.cache)):
        rows = first_cut_rows(candidates)
        if rows:
            left = f"the best {len(rows)} of {sum(one.error is not None for one in candidates)}"
            console.print(_table(f"First cut, {name}: {left}", ("candidate", *costs), rows))
    contexts = [f"{int(context):,} tokens [95 %]" for context in report.finalists[0].means]
    header = ("candidate", *contexts, "behind the best [95 %]", *costs[1:], "")
    console.print(_table("Second cut: share of right answers", header, finalist_rows(report)))
    for note in notes(report, out):
        print(note)


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place and name else "left", no_wrap=bool(name))
    for row in rows:
        table.add_row(*row)
    return table
