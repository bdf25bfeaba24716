"""The tables that close a run: with the terminal's library where it is installed, else in plain text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from .bench_results import BenchResults, Row

FILE_WIDTH = 160  # characters a line where no terminal says how many
MOST_IN_A_LINE = 3  # figures
TOO_FAST = 0.8  # of a floor: no noise
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_SIZES = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def seconds(value: float) -> str:
    """With the unit that leaves at least one digit before the point."""
    size, unit = next((one for one in _UNITS if abs(value) >= one[0]), _UNITS[-1])
    return f"{value / size:.3g} {unit}" if value < 1e3 else f"{value:.0f} s"


def figure(name: str, value: float) -> str:
    """A number by the unit in its name."""
    if name.endswith("_bytes"):
        size, unit = next((one for one in _SIZES if value >= one[0]), (1, "B"))
        scaled = value / size
        return f"{scaled:,.0f} {unit}" if scaled >= 1000 else f"{scaled:.3g} {unit}"
    if name.endswith("_s") and not name.endswith("_per_s"):
        return seconds(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table_rows(rows: Sequence[Row], separator: str = ", ") -> Iterator[tuple[str, ...]]:
    """A header, and a line for each row. `separator` stands between the figures of one row."""
    yield ("what", "side", "context", "batch", "conditions", "median", "quartiles", "floor", "÷ floor", "times as fast",
           "figures")  # fmt: skip
    for row in rows:
        what = row.what.partition(": ")[2]
        start = (what or "-", row.side, _count(row.context), _count(row.batch), separator.join(_conditions(row)) or "-")
        ratios = separator.join(f"{ratio:.2f} × {other}" for other, ratio in row.ratios.items()) or "-"
        figures = separator.join(f"{name} {figure(name, value)}" for name, value in row.figures.items()) or "-"
        if row.time is None:
            yield (*start, "not run", "-", "-", "-", ratios, row.not_run or "-")
            continue
        time, floor = row.time, row.floor
        quartiles = f"{seconds(time.low_s)} to {seconds(time.high_s)}" if time.repeats > 1 else "-"
        over = ("-", "-") if floor is None else (seconds(floor.floor_s), f"{time.median_s / floor.floor_s:.2f}")
        yield (*start, seconds(time.median_s), quartiles, *over, ratios, figures)


def print_results(results: BenchResults) -> None:
    """The device's limits, and a table for every model and kind of thing that was timed."""
    limits = results.limits
    print(
        f"limits measured here: copy {limits.copy_bytes_per_s / 1e9:.4g} GB/s read and written, "
        f"matrix product {limits.gemm_flops_per_s / 1e12:.4g} TFLOP/s at {limits.gemm_size}³"
    )
    for title in dict.fromkeys(map(_title, results.rows)):
        _print_table(title, [row for row in results.rows if _title(row) == title])
    for row in results.rows:
        if row.parts:
            _print_cells(f"{_title(row)}: {_name(row)}, by kind of work", list(part_rows(row)))
    beaten = sum(_beats_floor(row) for row in results.rows)
    if beaten:
        print(
            f"{beaten} rows took clearly less than their floor: what they move lies in caches, or the limits were "
            "measured while something else kept the machine busy; measure again"
        )


def part_rows(row: Row) -> Iterator[tuple[str, ...]]:
    """A header, and a line for each kind of work of one row."""
    yield ("kind of work", "time", "share")
    total_s = sum(row.parts.values())
    for kind, part_s in row.parts.items():
        yield (kind, seconds(part_s), f"{part_s / total_s:.1%}")


def _name(row: Row) -> str:
    """What tells a row from others of its title."""
    numbers = f"{_count(row.batch)} × {_count(row.context)}"
    return ", ".join([row.side, numbers, *_conditions(row)])


def _beats_floor(row: Row) -> bool:
    return row.time is not None and row.floor is not None and row.time.median_s < TOO_FAST * row.floor.floor_s


def _title(row: Row) -> str:
    return f"{row.model}: {row.what.partition(': ')[0]}"


def _conditions(row: Row) -> list[str]:
    return [name if value is True else f"{name} {value}" for name, value in row.conditions.items()]


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _print_table(heading: str, rows: Sequence[Row]) -> None:
    # many figures of a row stand below each other, where cells may have lines
    many = any(len(row.figures) > MOST_IN_A_LINE for row in rows) and _rich() is not None
    _print_cells(heading, _columns(table_rows(rows, "\n" if many else ", ")))


def _print_cells(heading: str, shown: Sequence[tuple[str, ...]]) -> None:
    rich = _rich()
    if rich is None:
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in shown)
        print(heading, *(line.rstrip() for line in lines), sep="\n")
        return
    table = rich.table.Table(title=heading)
    for name in shown[0]:
        table.add_column(name)
    for row in shown[1:]:
        table.add_row(*row)
    rich.console.Console(width=None if sys.stdout.isatty() else FILE_WIDTH).print(table)


def _rich() -> Any:
    """The terminal's library; None on a bare machine."""
    try:
        import rich.console
        import rich.table
    except ImportError:
        return None
    return rich


def _columns(rows: Iterator[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Without the columns that say nothing."""
    whole = list(rows)
    kept = [column for column in zip(*whole, strict=True) if any(cell != "-" for cell in column[1:])]
    return list(zip(*kept, strict=True))
