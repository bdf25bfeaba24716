"""Who goes on from the first cut to the second, and who wins that. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..results import Cell
from ..statistics import Interval, paired
from .candidates import Candidate, Choice, Costs, Subject, label_of


@dataclass(frozen=True)
class Verdict:
    """What the second cut has found.

    Attributes:
        best: label of the best mean.
        chosen: the cheapest of those that are no worse than the best as far as the samples can tell.
        tied: candidates that are not told apart from the best, itself included.
        behind: label -> how far the best one lies above it, over the same samples; of others that ran beside, too.
    """

    best: str
    chosen: str
    tied: tuple[str, ...]
    behind: Mapping[str, Interval]


def ranked(candidates: Sequence[Candidate], errors: Mapping[str, float]) -> list[Candidate]:
    """Measured candidates, the least error first; of equal errors the cheaper one."""

    def place(one: Candidate) -> tuple[float, float, str]:
        assert one.costs is not None, "measured because it is allowed"
        return errors[one.label], one.costs.together, one.label

    return sorted((one for one in candidates if one.label in errors), key=place)


def finalists(
    subject: Subject, propagations: Sequence[Candidate], caches: Sequence[Candidate], count: int
) -> list[Candidate]:
    """The candidates of the second cut, at most `count`, and the numbers as they are now beside them: to compare with
    where they are over a budget, else as one more candidate.

    The stages were measured one after the other, so what goes on is the best of both, and then in turn the next cache
    under the best propagation and the next propagation with the best cache.

    Args:
        propagations, caches: ranked; caches hold the best propagation's numbers, too. Either may be empty.
    """
    best = caches[0].choice if caches else propagations[0].choice
    of_caches = [one.choice for one in caches[1:]]
    of_propagations = [{**best, **one.choice} for one in propagations[1:]]
    mixed = [choice for pair in zip(of_caches, of_propagations, strict=False) for choice in pair]
    shorter = len(mixed) // 2
    found: dict[str, Candidate] = {}
    for choice in (best, *mixed, *of_caches[shorter:], *of_propagations[shorter:]):
        one = subject.candidate(label_of(choice, subject.shape), choice)
        if one.refused is None and one.recipe is not None and len(found) < count:
            found.setdefault(one.recipe.fingerprint, one)
    present = subject.present()
    if present.costs is None or present.recipe is None or present.recipe.fingerprint in found:
        return list(found.values())
    if any(one.label == present.label for one in found.values()):  # names do not say all of a codec
        present = replace(present, label=f"{present.label}-now")
    return [*found.values(), present]


def choose(cells: Sequence[Cell], costs: Mapping[str, Costs], beside: Sequence[str] = ()) -> Verdict:
    """The best mean over contexts and tasks, or whoever is cheaper and not told apart from it.

    Args:
        cells: of one evaluation.
        costs: of each candidate that may be chosen.
        beside: labels that are compared with the best one, and may not.
    """
    means = {label: _mean(cells, label) for label in costs}
    best = max(costs, key=lambda label: (means[label], -costs[label].together))
    behind = {label: paired(cells, best, label) for label in (*costs, *beside)}
    tied = tuple(label for label in costs if behind[label].low <= 0 <= behind[label].high)
    chosen = min(tied, key=lambda label: (costs[label].together, costs[label].held, -means[label]))
    return Verdict(best, chosen, tied, behind)


def merged(present: Choice, chosen: Choice) -> dict[str, object]:
    """What a profile says now, with what was chosen in its place."""
    return {**present, **chosen}


def _mean(cells: Sequence[Cell], label: str) -> float:
    own = [sum(cell.scores) / len(cell.scores) for cell in cells if cell.recipe == label]
    return sum(own) / len(own)
