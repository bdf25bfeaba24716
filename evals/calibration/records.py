"""The report of a calibration: what was tried, what it cost, what was found, and what was chosen.

environment   hardware, versions, commit
model         name, fingerprint, adapter, dtype
settings      all that was asked for, budgets included
present       the open numbers as they were, with their costs and, where a budget does not allow them, why
propagation   candidates of the first stage, those that were refused included
cache         candidates of the second stage, likewise
finalists     what the retrieval suite says of those that went on, `exact` first
verdict       the best, the chosen one, and who could not be told apart
profile       what was written
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...models.profiles import Profile
from ..results import AVERAGE, EXACT, Cell, EvalResults, EvaluatedModel
from .candidates import Candidate, Costs
from .choosing import Verdict


@dataclass(frozen=True)
class Tried:
    """A candidate of the first cut.

    Attributes:
        choice: keys of a profile.
        fingerprint: of the recipe, every number filled in; None where it cannot be.
        costs: as shares of `exact`'s and of the cache in bf16; None where it cannot be.
        refused: why it was not measured, or None.
        error: mean relative error over the prompts; None where it was not measured.
        errors: of each prompt.
    """

    label: str
    choice: Mapping[str, Any]
    fingerprint: str | None
    costs: Costs | None
    refused: str | None
    error: float | None
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Finalist:
    """A candidate of the second cut, or `exact`.

    Attributes:
        fingerprint: of the recipe, every number filled in; the one that frames carry.
        costs: by shapes and layout, at the contexts; those that a choice goes by. None for `exact`.
        means: average of the tasks' means and its 95 % interval, by context.
        prefill, shipped, held: as the engines counted them over the samples, as shares of `exact`'s operations and of
            the cache in bf16.
        fallbacks: samples too short for the recipe, which ran `exact`.
        behind: how far the best one lies above it, with its 95 % interval.
    """

    label: str
    choice: Mapping[str, Any]
    fingerprint: str
    costs: Costs | None
    means: Mapping[str, tuple[float, float, float]]
    prefill: float
    shipped: float
    held: float
    fallbacks: int
    behind: tuple[float, float, float]


@dataclass(frozen=True)
class Report:
    """See the module's docstring."""

    environment: Mapping[str, Any]
    model: EvaluatedModel
    settings: Mapping[str, Any]
    present: Tried
    propagation: tuple[Tried, ...]
    cache: tuple[Tried, ...]
    finalists: tuple[Finalist, ...]
    best: str
    chosen: str
    tied: tuple[str, ...]
    profile: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def finalist(self, label: str) -> Finalist:
        """The one of that label."""
        return next(one for one in self.finalists if one.label == label)


def tried(candidates: Sequence[Candidate], errors: Mapping[str, Sequence[float]]) -> tuple[Tried, ...]:
    """Candidates with what was measured of them."""
    found = []
    for one in candidates:
        own = tuple(errors.get(one.label, ()))
        mean = sum(own) / len(own) if own else None
        fingerprint = None if one.recipe is None else one.recipe.fingerprint
        found.append(Tried(one.label, dict(one.choice), fingerprint, one.costs, one.refused, mean, own))
    return tuple(found)


def finalists_of(results: EvalResults, candidates: Sequence[Candidate], verdict: Verdict) -> tuple[Finalist, ...]:
    """What an evaluation found of them, and of `exact`."""
    choices = {one.label: one for one in candidates}
    found = []
    for label, recipe in results.recipes.items():
        cells = [cell for cell in results.cells if cell.recipe == label]
        one, behind = choices.get(label), verdict.behind[label]
        whole = _total(cells, "bf16_bytes")
        found.append(
            Finalist(
                label,
                {} if one is None else dict(one.choice),
                recipe.fingerprint,
                None if one is None else one.costs,
                {
                    str(row.context): (row.mean, row.low, row.high)
                    for row in results.summary
                    if (row.recipe, row.task, row.turn) == (label, AVERAGE, None)
                },
                _total(cells, "prefill_flops")
                / _total([cell for cell in results.cells if cell.recipe == EXACT], "prefill_flops"),
                _total(cells, "payload_bytes") / whole,
                _total(cells, "resident_bytes") / whole,
                sum(cell.fallbacks for cell in cells),
                (behind.mean, behind.low, behind.high),
            )
        )
    return tuple(found)


def make_report(
    results: EvalResults,
    settings: Mapping[str, Any],
    present: Candidate,
    first: tuple[tuple[Tried, ...], tuple[Tried, ...]],
    final: Sequence[Candidate],
    verdict: Verdict,
    profile: Profile,
) -> Report:
    """All of it together.

    Args:
        results: of the second cut.
        first: candidates of propagation, and of the cache.
        final: candidates of the second cut.
    """
    return Report(
        environment=results.environment,
        model=results.model,
        settings={**settings, "second_cut": dict(results.settings)},
        present=tried([present], {})[0],
        propagation=first[0],
        cache=first[1],
        finalists=finalists_of(results, final, verdict),
        best=verdict.best,
        chosen=verdict.chosen,
        tied=verdict.tied,
        profile=profile.stated(),
    )


def _total(cells: Sequence[Cell], name: str) -> float:
    return float(sum(len(cell.scores) * (getattr(cell, name) or 0.0) for cell in cells))
