"""What an early simulation of the recipes gave, and what the system measures in the same place.

The simulation was plain PyTorch on the evaluation model at 8K tokens, 8 samples for each of the eleven tasks. Its
averages are constants of that origin; the last two came from an earlier adapter of the same model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .pages import table
from .recorded import Run
from .results import Summary

CONTEXT = 8192
WIDE = 0.1  # differences above it are explained


@dataclass(frozen=True)
class Simulated:
    """One line of the simulation.

    Attributes:
        label: of the recipe or variant that does the same here.
        average: mean of the tasks' scores.
    """

    what: str
    label: str
    average: float


SIMULATED = (
    Simulated("full cache", "exact", 0.92),
    Simulated("`fastkv`", "fastkv", 0.37),
    Simulated("selective propagation of 20 % alone", "tsp-alone", 0.41),
    Simulated("landmarks of 8 rows, 6 % read", "chunks-8", 0.75),
    Simulated("landmarks of 4 rows, 6 % read", "chunks-4", 0.89),
    Simulated("10 % exact, the rest in 4 bits", "mikv", 0.93),
    Simulated("keys at rank 96 of 192", "lowrank", 0.95),
)


def _chunks(rows: int) -> str:
    retrieval = {"kind": "chunks", "chunk": rows, "outliers": 0, "budget_rate": 0.06, "landmark_bits": 16}
    return "exact:" + json.dumps({"retrieval": retrieval, "window": {"kind": "ends", "local": 32}})


VARIANTS: Mapping[str, str] = {
    "tsp-alone": 'exact:{"propagation": {"kind": "tsp", "rate": 0.2, "window": 8, "kernel": 7}}',
    "chunks-8": _chunks(8),
    "chunks-4": _chunks(4),
}
"""What `kvsluice eval --variant LABEL=...` takes for the lines that are no recipe of their own, by label."""


def comparison(runs: Sequence[Run]) -> str:
    """A table of simulated and measured averages; differences above `WIDE` in bold.

    Raises:
        ValueError: a variant ran with other slots than those it stands for.
    """
    rows = []
    for line in SIMULATED:
        found = _measured(line.label, runs)
        shown, apart = "not measured yet", ""
        if found is not None:
            shown = f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"
            apart = f"{found.mean - line.average:+.2f}".replace("-", "−")
            apart = f"**{apart}**" if _is_wide(line, found) else apart
        rows.append((line.what, f"`{line.label}`", f"{line.average:.2f}", shown, apart))
    return table(("what", "here", "simulated", "measured [95 %]", "difference"), rows, numbers_from=2)


def unexplained(runs: Sequence[Run], explanations: str) -> Iterator[str]:
    """Labels whose difference is above `WIDE` and has no item `- **label**: …` among the explanations."""
    explained = set(re.findall(r"^- \*\*`?([^*`]+)`?\*\*", explanations, re.MULTILINE))
    for line in SIMULATED:
        found = _measured(line.label, runs)
        if found is not None and _is_wide(line, found) and line.label not in explained:
            yield line.label


def _is_wide(line: Simulated, found: Summary) -> bool:
    return abs(found.mean - line.average) > WIDE


def _measured(label: str, runs: Sequence[Run]) -> Summary | None:
    for run in runs:
        row = run.summary(label, CONTEXT)
        if row is not None:
            if label in VARIANTS:
                _check_slots(label, run.results.recipes[label].slots)
            return row
    return None


def _check_slots(label: str, slots: Mapping[str, Any]) -> None:
    for slot, wanted in json.loads(VARIANTS[label].partition(":")[2]).items():
        for name, value in wanted.items():
            if slots[slot][name] != value:
                raise ValueError(f"{label} ran with {slot}.{name} = {slots[slot][name]}, it stands for {value}")
