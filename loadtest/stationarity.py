"""Whether a run had come to rest, or its queue went on growing.

An open loop above capacity still answers, later and later; how late its percentiles are says only how long the run
was. So the number of requests under way is looked at over the run, in blocks of equally many arrivals: where it rises
from block to block (Kendall's rank correlation with time) and by more than half of where it began, the run was no
steady state.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from .outcomes import Outcome, open_at

BLOCKS = 10
LEAST_REQUESTS = 3 * BLOCKS
TAU = 0.6  # with ten blocks, chance alone exceeds it about once in a hundred runs
GROWTH, SLACK = 1.5, 1.0  # factor from the first third to the last, and requests on top


def is_stationary(outcomes: Sequence[Outcome]) -> bool | None:
    """Whether the number of open requests had stopped growing.

    Args:
        outcomes: those that count, in order of arrival.

    Returns:
        None where there are too few to say.
    """
    if len(outcomes) < LEAST_REQUESTS or outcomes[0].arrival_s == outcomes[-1].arrival_s:
        return None
    levels = [
        float(np.mean(part)) for part in np.array_split(open_at(outcomes, [o.arrival_s for o in outcomes]), BLOCKS)
    ]
    first, last = float(np.mean(levels[: BLOCKS // 3])), float(np.mean(levels[-(BLOCKS // 3) :]))
    return not (kendall_tau(levels) >= TAU and last > GROWTH * first + SLACK)


def kendall_tau(values: Sequence[float]) -> float:
    """Rank correlation of values with their order, from -1 to 1; ties count nothing."""
    pairs = [np.sign(late - early) for early, late in combinations(values, 2)]
    return float(np.sum(pairs) / len(pairs)) if pairs else 0.0
