"""The highest rate at which goals are met, by bisection.

The rate is doubled while it passes, or halved while it does not, until one that passes and one that does not enclose
the answer; then their geometric mean is tried until they are close. A trial passes when every goal is met, the queue
had stopped growing, and the client kept up.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

LEAST_RATE = 1e-3  # below it nothing is looked for


@dataclass(frozen=True)
class Trial:
    """One run of a search.

    Attributes:
        is_met: every goal was.
        is_stationary: the queue had stopped growing, as far as could be told.
        invalid: why the client is what was measured, or None.
    """

    rate: float
    is_met: bool
    is_stationary: bool
    invalid: str | None = None
    interrupted: bool = False

    @property
    def passes(self) -> bool:
        return self.is_met and self.is_stationary and self.invalid is None and not self.interrupted

    @property
    def shown(self) -> str:
        """The verdict in words."""
        if self.interrupted:
            return "interrupted"
        if self.invalid is not None:
            return f"invalid, {self.invalid}"
        if not self.is_met:
            return "missed"
        return "met" if self.is_stationary else "met, but the queue was still growing: does not count"


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        max_rate: the highest rate that passed, or None.
        above: the lowest rate above it that did not, or None.
        why: why it ended there.
    """

    max_rate: float | None
    above: float | None
    why: str
    trials: tuple[Trial, ...]

    @property
    def shown(self) -> str:
        if self.max_rate is None:
            return f"Maximum request rate: none found ({self.why})"
        upper = "" if self.above is None else f", {self.above:.4g} is too much"
        return f"Maximum request rate (req/s): {self.max_rate:.4g}{upper} ({self.why})"

    def to_json(self) -> dict[str, Any]:
        """As the file of results holds it."""
        trials = [asdict(trial) | {"shown": trial.shown} for trial in self.trials]
        return {"max_rate": self.max_rate, "above": self.above, "why": self.why, "shown": self.shown, "trials": trials}


async def find_max_rate(
    attempt: Callable[[float], Awaitable[Trial]], first: float, most: float, tolerance: float, max_trials: int
) -> Found:
    """Search.

    Args:
        attempt: makes a run at a rate in requests a second.
        first: where to begin.
        most: never tried above.
        tolerance: the search ends when the rates enclosing the answer are closer than this share.
        max_trials: it ends then in any case.
    """
    trials: list[Trial] = []
    low: float | None = None
    high: float | None = None
    why = f"{max_trials} trials"
    rate = min(first, most)
    while len(trials) < max_trials:
        trial = await attempt(rate)
        trials.append(trial)
        if trial.interrupted:
            why = "interrupted"
            break
        low, high = (rate, high) if trial.passes else (low, rate)
        if low is not None and high is not None and high / low <= 1 + tolerance:
            why = "the client cannot send more" if _by_client(trials, high) else "close enough"
            break
        if low is not None and low >= most:
            why = "the highest rate that was to be tried"
            break
        if low is None and high is not None and high / 2 < LEAST_RATE:
            why = "missed at the lowest rate"
            break
        rate = _next_rate(low, high, most)
    return Found(low, high, why, tuple(trials))


def _next_rate(low: float | None, high: float | None, most: float) -> float:
    if low is not None and high is not None:
        return math.sqrt(low * high)
    if low is not None:
        return min(2 * low, most)
    assert high is not None
    return high / 2


def _by_client(trials: list[Trial], rate: float) -> bool:
    return any(trial.rate == rate and trial.invalid is not None for trial in trials)
