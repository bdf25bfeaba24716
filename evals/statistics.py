"""Means of paired samples and how far they can be trusted: the paired bootstrap, seeded, percentile intervals.

Every recipe sees the same samples, so one resampling of sample indices serves all of them, and a difference between
two recipes is resampled as a difference: what is hard about a sample cancels. A mean of tasks resamples the samples of
each task on its own, for the tasks are fixed and the samples drawn (Efron and Tibshirani 1993, chapters 8 and 13).
Sample i of a needle's depths is one text and one number, and the turns of sample i are one document, so depths and
turns are resampled together: they are not so many independent samples.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .results import AVERAGE, EXACT, Cell, Summary

NUM_RESAMPLES = 10_000
LEVEL = 0.95
SEED = 20_240_406

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean, and the 95 % interval of its bootstrap."""

    mean: float
    low: float
    high: float


def resampled_means(scores: Floats, stratum: str, num_resamples: int = NUM_RESAMPLES) -> Floats:
    """Scores [..., samples] -> float64 [..., resamples]: means of as many samples drawn with replacement.

    Which are drawn depends on the number of samples and the stratum's name alone."""
    generator = np.random.default_rng([SEED, zlib.crc32(stratum.encode())])
    num_samples = scores.shape[-1]
    counts = generator.multinomial(num_samples, np.full(num_samples, 1 / num_samples), size=num_resamples)
    means: Floats = scores @ counts.T / num_samples
    return means


def interval(scores: Floats, resampled: Floats) -> Interval:
    """The mean of `scores`, between the outer percentiles of resampled means."""
    low, high = np.percentile(resampled, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(float(scores.mean()), float(low), float(high))


@dataclass(frozen=True)
class _Stratum:
    """One task (and depth, and turn) of one context; depths and turns of a task resample the same indices.

    Attributes:
        scores: recipe -> float64 [samples].
        resampled: recipe -> float64 [resamples], means of resampled samples.
    """

    task: str
    depth: float | None
    turn: int | None
    scores: Mapping[str, Floats]
    resampled: Mapping[str, Floats]


def summarize(cells: Sequence[Cell]) -> tuple[Summary, ...]:
    """Means and intervals of every cell, and before them of the mean of each context's tasks, depths and turns; where
    there are turns, also of the mean of each turn's tasks, and of each task's turns."""
    rows: list[Summary] = []
    for context in dict.fromkeys(cell.context for cell in cells):
        strata = _strata([cell for cell in cells if cell.context == context])
        for recipe in dict.fromkeys(cell.recipe for cell in cells if cell.context == context):
            rows.append(_row(recipe, context, AVERAGE, None, strata))
            rows += _means_of_turns(recipe, context, strata)
            rows += [_row(recipe, context, one.task, one.depth, [one], one.turn) for one in strata]
    return tuple(rows)


def _means_of_turns(recipe: str, context: int, strata: Sequence[_Stratum]) -> Iterator[Summary]:
    turns = [one.turn for one in strata if one.turn is not None]
    for turn in dict.fromkeys(turns):
        yield _row(recipe, context, AVERAGE, None, [one for one in strata if one.turn == turn], turn)
    for task in dict.fromkeys(one.task for one in strata) if turns else ():
        yield _row(recipe, context, task, None, [one for one in strata if one.task == task])


def over_turns(cells: Sequence[Cell]) -> Interval:
    """How far the mean of tasks in the last turn lies above that in the first, over the same samples.

    Args:
        cells: of one recipe and context, one a task and turn.
    """
    turns = [cell.turn for cell in cells if cell.turn is not None]
    names = {min(turns): "first", max(turns): "last"}
    ends = [replace(cell, recipe=names[cell.turn], turn=None) for cell in cells if cell.turn in names]
    return _mean_of_strata(_strata(ends), "last", "first")


def beside(own: Sequence[Cell], other: Sequence[Cell]) -> Interval:
    """How far the mean of tasks of some cells lies above that of others, over the samples that both have.

    Args:
        own, other: one cell a task (and depth) of one context; tasks that only one side has are left out.
    """
    pairs = []
    for cell in own:
        twin = next((one for one in other if (one.task, one.depth) == (cell.task, cell.depth)), None)
        if twin is not None:
            both = min(len(cell.scores), len(twin.scores))
            pairs += [replace(cell, recipe="own", scores=cell.scores[:both])]
            pairs += [replace(twin, recipe="other", scores=twin.scores[:both])]
    return _mean_of_strata(_strata(pairs), "own", "other")


def paired(cells: Sequence[Cell], own: str, other: str) -> Interval:
    """How far the mean of one recipe lies above that of another over the same samples: of all tasks, depths, turns and
    contexts.

    Args:
        cells: that both recipes have, and others'.
    """
    contexts = dict.fromkeys(cell.context for cell in cells)
    strata = [one for context in contexts for one in _strata([cell for cell in cells if cell.context == context])]
    return _mean_of_strata(strata, own, other)


def _strata(cells: Sequence[Cell]) -> list[_Stratum]:
    strata = []
    for task, depth, turn in dict.fromkeys(map(_place, cells)):
        own = [cell for cell in cells if _place(cell) == (task, depth, turn)]
        scores = np.array([cell.scores for cell in own], dtype=np.float64)
        resampled = resampled_means(scores, f"{own[0].context} {task}")
        names = [cell.recipe for cell in own]
        strata.append(
            _Stratum(task, depth, turn, dict(zip(names, scores, strict=True)), dict(zip(names, resampled, strict=True)))
        )
    return strata


def _place(cell: Cell) -> tuple[str, float | None, int | None]:
    return cell.task, cell.depth, cell.turn


def _row(
    recipe: str,
    context: int,
    task: str,
    depth: float | None,
    strata: Sequence[_Stratum],
    turn: int | None = None,
) -> Summary:
    own = _mean_of_strata(strata, recipe)
    difference = None
    if all(EXACT in one.scores for one in strata):
        difference = _mean_of_strata(strata, recipe, EXACT)
    return Summary(
        recipe,
        context,
        task,
        depth,
        own.mean,
        own.low,
        own.high,
        None if difference is None else difference.mean,
        None if difference is None else difference.low,
        None if difference is None else difference.high,
        turn,
    )


def _mean_of_strata(strata: Sequence[_Stratum], recipe: str, base: str | None = None) -> Interval:
    """The mean of the strata's means; of paired differences to `base` where that is given."""

    def values(group: Mapping[str, Floats]) -> Floats:
        return group[recipe] if base is None else group[recipe] - group[base]

    means = np.array([values(one.scores).mean() for one in strata])
    return interval(means, np.mean([values(one.resampled) for one in strata], axis=0))
