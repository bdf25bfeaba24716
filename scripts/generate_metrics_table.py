"""Writes the tables of docs/metrics.md from the catalogue of metrics. `tests/packaging` holds that they agree."""

from __future__ import annotations

import sys
from pathlib import Path

from kvsluice.services.metrics.catalog import TABLES, Metric

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"


def table(metrics: tuple[Metric, ...]) -> str:
    """The rows of one part of the catalogue, in Markdown."""
    lines = ["| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.exported_name}` | {metric.kind} | {labels} | {metric.text} |")
    return "\n".join(lines)


def updated(page: str) -> str:
    """The page with its tables written anew, between their markers."""
    for name, metrics in TABLES.items():
        begin, end = f"<!-- metrics: {name} -->\n", f"<!-- end metrics: {name} -->"
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{PAGE.name} lacks the markers of the table `{name}`")
        page = before + begin + table(metrics) + "\n" + end + after
    return page


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
    sys.stdout.write(f"{PAGE}: tables written\n")
