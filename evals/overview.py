"""The table that closes an evaluation."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from statistics import fmean

from .costs import prefill_share
from .results import AVERAGE, TRANSFORMERS, Cell, EvalResults, Summary
from .statistics import over_turns

FILE_WIDTH = 120  # characters a line where no terminal says how many
FEW_SAMPLES = 5  # a task
HIT_HEADER = ("recipe", "found", "prefill of a hit ÷ of a miss", "answers unlike a miss's")
HEADER = ("recipe", "mean [95 %]", "to exact [95 %]", "prefill", "shipped", "held", "fell back")


def overview_rows(results: EvalResults, context: int) -> Iterator[tuple[str, ...]]:
    """One row a recipe: mean score, difference to `exact`, operations of prefill as a share of those of `exact`, and
    bytes shipped and held as shares of bf16's."""
    for row in results.summary:
        if (row.context, row.task, row.turn) == (context, AVERAGE, None):
            cells = _cells(results, row.recipe, context)
            share = None if row.recipe == TRANSFORMERS else prefill_share(results, row.recipe, context)
            prefill = "-" if share is None else f"{share:.3f}"
            yield (row.recipe, _mean(row), _difference(row), prefill, *_costs(row.recipe, cells))


def _cells(results: EvalResults, recipe: str, context: int) -> list[Cell]:
    """One a sample's place: the turns of a conversation have their costs in common."""
    cells = (cell for cell in results.cells if (cell.recipe, cell.context) == (recipe, context))
    return [cell for cell in cells if cell.turn in (None, 1)]


def turn_rows(results: EvalResults, context: int) -> Iterator[tuple[str, ...]]:
    """One row a recipe: the mean of each turn, and how far the last lies above the first; nothing where there are no
    turns."""
    rows = [row for row in results.summary if (row.context, row.task) == (context, AVERAGE) and row.turn is not None]
    for recipe in dict.fromkeys(row.recipe for row in rows):
        means = (_mean(row) for row in rows if row.recipe == recipe)
        cells = [cell for cell in results.cells if (cell.recipe, cell.context) == (recipe, context)]
        change = over_turns(cells)
        yield (recipe, *means, f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]")


def hit_rows(results: EvalResults, context: int) -> Iterator[tuple[str, ...]]:
    """One row a recipe: what prompts found of an earlier one's beginning, in the mean, and how many answered otherwise
    than when they ran whole; nothing where none looked."""
    for recipe in dict.fromkeys(cell.recipe for cell in results.cells):
        cells = [one for one in results.cells if (one.recipe, one.context) == (recipe, context) and one.hit is not None]
        hits = [one.hit for one in cells if one.hit is not None]
        if hits:
            shares = (fmean(one.cached_share for one in hits), fmean(one.flops_share for one in hits))
            unlike, prompts = sum(one.unlike for one in hits), sum(len(one.scores) for one in cells)
            yield (recipe, *(f"{share:.3f}" for share in shares), f"{unlike} of {prompts}")


def _mean(row: Summary) -> str:
    return f"{row.mean:.3f} [{row.low:.3f}, {row.high:.3f}]"


def _difference(row: Summary) -> str:
    if row.difference is None:
        return "-"
    return f"{row.difference:+.3f} [{row.difference_low:+.3f}, {row.difference_high:+.3f}]"


def _costs(recipe: str, cells: Sequence[Cell]) -> tuple[str, str, str]:
    if recipe == TRANSFORMERS:
        return "-", "-", "-"
    whole = sum(cell.bf16_bytes for cell in cells)
    shipped, held = (sum(getattr(cell, name) for cell in cells) for name in ("payload_bytes", "resident_bytes"))
    fallbacks, samples = sum(cell.fallbacks for cell in cells), sum(len(cell.scores) for cell in cells)
    return f"{shipped / whole:.3f}", f"{held / whole:.3f}", f"{fallbacks} of {samples}" if fallbacks else "-"


def title(results: EvalResults, context: int) -> str:
    """What a table is about."""
    unit = "nats a token, less is better" if results.suite == "ppl" else "share of right answers"
    return (
        f"{results.suite} at {context} tokens: {unit}; operations of prefill as a share of exact's; bytes sent "
        "(shipped) and kept on decode (held) as shares of the bf16 cache's; samples that ran exact instead (fell back)"
    )


def notes(results: EvalResults) -> Iterator[str]:
    """What must be known of the tables to read them rightly."""
    cells = results.cells
    for recipe, context in dict.fromkeys((cell.recipe, cell.context) for cell in cells):
        own = _cells(results, recipe, context)
        reason = next((cell.fallback_reason for cell in own if cell.fallback_reason), None)
        if reason is not None:
            count, samples = sum(cell.fallbacks for cell in own), sum(len(cell.scores) for cell in own)
            yield f"{recipe} ran exact on {count} of {samples} samples at {context} tokens: {reason}"
    fewest = min(len(cell.scores) for cell in cells)
    if fewest < FEW_SAMPLES:
        yield f"{fewest} samples a task: intervals are too narrow to trust, and one of no width says nothing"


def print_overview(results: EvalResults) -> None:
    """A table for every context, and how `exact` compares with transformers where that is known."""
    for context in dict.fromkeys(cell.context for cell in results.cells):
        _print_table(title(results, context), [HEADER, *overview_rows(results, context)])
        by_turn = list(turn_rows(results, context))
        if by_turn:
            header = (HEADER[0], *(f"turn {place}" for place in range(1, len(by_turn[0]) - 1)), "last to first")
            _print_table(f"{results.suite} at {context} tokens: share of right answers by turn", [header, *by_turn])
        hits = list(hit_rows(results, context))
        if hits:
            what = "share of prompts' tokens found, and what that saved"
            _print_table(f"{results.suite} at {context} tokens: {what}", [HIT_HEADER, *hits])
    for note in notes(results):
        print(f"note: {note}")
    if results.against is not None:
        own = results.against
        tokens = "" if own.equal_tokens is None else f", equal tokens on {own.equal_tokens}"
        print(f"exact and transformers: equal scores on {own.equal_scores} of {own.samples} samples{tokens}")


def _print_table(heading: str, rows: Sequence[Sequence[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # a bare machine
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        print(heading, *lines, sep="\n")
        return
    table = Table(title=heading)
    for name in rows[0]:
        table.add_column(name, justify="left" if name == HEADER[0] else "right")
    for row in rows[1:]:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else FILE_WIDTH).print(table)
