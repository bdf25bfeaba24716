"""Runs of `kvsluice eval` as tables ask for them."""

from __future__ import annotations

from dataclasses import dataclass

from .costs import prefill_share
from .results import AVERAGE, Cell, EvalResults, Summary


@dataclass(frozen=True)
class Run:
    """A file of results and its name without `.json`."""

    name: str
    results: EvalResults

    @property
    def contexts(self) -> list[int]:
        return list(dict.fromkeys(cell.context for cell in self.results.cells))

    def summary(self, recipe: str, context: int, task: str = AVERAGE, turn: int | None = None) -> Summary | None:
        """The row of a recipe, of one turn or of all, or None where there is none."""
        wanted = (recipe, context, task, None, turn)
        for row in self.results.summary:
            if (row.recipe, row.context, row.task, row.depth, row.turn) == wanted:
                return row
        return None

    def by_average(self, context: int) -> list[Summary]:
        """The averages of a context, best first; those of transformers' own model left out."""
        rows = [self.summary(label, context) for label in self.results.recipes]
        less_is_better = self.results.suite == "ppl"
        found = [row for row in rows if row is not None]
        return sorted(found, key=lambda row: row.mean if less_is_better else -row.mean)

    def costs(self, recipe: str, context: int) -> tuple[float, float]:
        """Bytes shipped and held as shares of the cache in bf16, over all samples of a context."""
        cells = self.cells(recipe, context)
        whole = sum(cell.bf16_bytes * len(cell.scores) for cell in cells)
        shipped = sum(cell.payload_bytes * len(cell.scores) for cell in cells)
        held = sum(cell.resident_bytes * len(cell.scores) for cell in cells)
        return shipped / whole, held / whole

    def prefill(self, recipe: str, context: int) -> str:
        """Operations of prefill as a share of those of `exact`, in three digits; "" where unknown."""
        share = prefill_share(self.results, recipe, context)
        return "" if share is None else f"{share:.3f}"

    def fallbacks(self, context: int) -> str:
        """Which recipes ran `exact` on some samples, as a sentence; "" where none did."""
        parts = []
        for label in self.results.recipes:
            count, samples = self.num_fallbacks(label, context)
            if count:
                parts.append(f"`{label}` on {count} of {samples}")
        if not parts:
            return ""
        return f"Samples of {context:,} tokens too short for the recipe, which ran `exact`: {', '.join(parts)}."

    @property
    def is_reference(self) -> bool:
        """Whether the engines' operations ran in plain torch."""
        return self.results.settings.get("kernels") == "reference"

    def cells(self, recipe: str, context: int) -> list[Cell]:
        """Every task's cell."""
        return [cell for cell in self.results.cells if (cell.recipe, cell.context) == (recipe, context)]

    def num_fallbacks(self, recipe: str, context: int) -> tuple[int, int]:
        """How many samples ran `exact` instead, and of how many; the turns of a sample are one."""
        cells = [cell for cell in self.cells(recipe, context) if cell.turn in (None, 1)]
        return sum(cell.fallbacks for cell in cells), sum(len(cell.scores) for cell in cells)
