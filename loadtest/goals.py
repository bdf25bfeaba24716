"""Goals: of a run as percentiles (`--slo ttft_p99=2s,errors=1%`), and of a request (`--goodput ttft:2000`)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from ..errors import InvalidRequest
from .outcomes import CANCELLED, FAILURES, LogHistogram, Outcome

METRICS = ("ttft", "tpot", "itl", "e2el")
SLOS = "METRIC_STATISTIC=TIME with ttft, tpot, itl, e2el; mean, median, p1 to p100; ms or s; or errors=SHARE"
GOODPUTS = "METRIC:MILLISECONDS with ttft, tpot, e2el"
MAX_TIME_S = 1e6
_GOAL = re.compile(r"(ttft|tpot|itl|e2el)_(mean|median|p\d{1,2}(?:\.\d{1,3})?|p100)=(\d+(?:\.\d+)?)(ms|s)")
_ERRORS = re.compile(r"errors=(\d+(?:\.\d+)?)(%?)")


@dataclass(frozen=True)
class Goal:
    """A bound on one statistic of a run.

    Attributes:
        metric: of `METRICS`, or errors.
        statistic: mean, median or pN; "" for errors.
        bound: seconds, or a share.
    """

    metric: str
    statistic: str
    bound: float

    @property
    def name(self) -> str:
        return f"{self.metric}_{self.statistic}" if self.statistic else self.metric

    @property
    def percent(self) -> float:
        """Which percentile; that of a mean counts as the 50th."""
        return float(self.statistic[1:]) if self.statistic.startswith("p") else 50.0

    def shown(self, value: float | None) -> str:
        """A value of the statistic in its unit."""
        if value is None:
            return "nothing measured"
        if self.metric == "errors":
            return f"{value:.2%}"
        return "never" if math.isinf(value) else f"{1e3 * value:.2f} ms"


@dataclass(frozen=True)
class Verdict:
    """A goal and what came of it.

    Attributes:
        value: seconds or a share; inf where so many requests failed that the percentile has no value; None where
            nothing was measured, which meets no goal.
    """

    goal: Goal
    value: float | None

    @property
    def is_met(self) -> bool:
        return self.value is not None and self.value <= self.goal.bound


def parse_slo(text: str) -> tuple[Goal, ...]:
    """Goals as they are typed, with commas between them.

    Raises:
        InvalidRequest: one is none, or stands there twice.
    """
    goals = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found, errors = _GOAL.fullmatch(part), _ERRORS.fullmatch(part)
        if found is not None:
            goals.append(Goal(found[1], found[2], float(found[3]) / (1e3 if found[4] == "ms" else 1.0)))
        elif errors is not None:
            goals.append(Goal("errors", "", float(errors[1]) / (100 if errors[2] else 1)))
        else:
            raise InvalidRequest("--slo", f"got {part[:64]!r}", SLOS)
    names = [goal.name for goal in goals]
    if not goals or len(set(names)) < len(names) or any(goal.bound > MAX_TIME_S for goal in goals):
        raise InvalidRequest("--slo", f"got {text[:64]!r}", f"{SLOS}; each at most once, with commas between them")
    return tuple(goals)


def parse_goodput(texts: Sequence[str]) -> dict[str, float]:
    """Bounds of a request in seconds by metric, as vLLM's `--goodput` takes them (in ms).

    Raises:
        InvalidRequest: one is none.
    """
    found = {}
    for text in (part for given in texts for part in given.replace(",", " ").split()):
        metric, colon, value = text.partition(":")
        try:
            bound_s = float(value) / 1e3
        except ValueError:
            bound_s = math.nan
        if not colon or metric not in ("ttft", "tpot", "e2el") or not 0 <= bound_s <= MAX_TIME_S:
            raise InvalidRequest("--goodput", f"got {text[:64]!r}", GOODPUTS)
        found[metric] = bound_s
    return found


def request_bounds(goals: Sequence[Goal]) -> dict[str, float]:
    """What a single request has to keep for the goals of a run: of each metric the bound of its highest percentile."""
    found: dict[str, Goal] = {}
    for goal in goals:
        if goal.metric in ("ttft", "tpot", "e2el"):
            other = found.get(goal.metric)
            found[goal.metric] = goal if other is None or goal.percent >= other.percent else other
    return {metric: goal.bound for metric, goal in found.items()}


def is_good(outcome: Outcome, bounds: Mapping[str, float]) -> bool:
    """Whether a request was served within the bounds; an answer of one token keeps any bound on tpot."""
    if outcome.status != "served":
        return False
    values = {"ttft": outcome.ttft_s, "tpot": outcome.tpot_s, "e2el": outcome.e2el_s}
    return all(values[metric] is None or (values[metric] or 0.0) <= bound for metric, bound in bounds.items())


def judge(goals: Sequence[Goal], outcomes: Sequence[Outcome], itl: LogHistogram) -> tuple[Verdict, ...]:
    """What came of each goal. A request that failed took for ever: it counts in every percentile, at the far end.

    Args:
        outcomes: those that count; cancelled ones are left out.
    """
    wanted = [one for one in outcomes if one.status != CANCELLED]
    return tuple(Verdict(goal, _value(goal, wanted, itl)) for goal in goals)


def _value(goal: Goal, outcomes: Sequence[Outcome], itl: LogHistogram) -> float | None:
    failed = sum(one.status in FAILURES for one in outcomes)
    if goal.metric == "errors":
        return failed / len(outcomes) if outcomes else None
    if goal.metric == "itl":
        return itl.mean_s if goal.statistic == "mean" else itl.percentile(goal.percent)
    served = {"ttft": _ttft, "tpot": _tpot, "e2el": _e2el}[goal.metric](outcomes)
    if not served and not failed:
        return None
    values = sorted(served) + [math.inf] * failed
    return fmean(values) if goal.statistic == "mean" else percentile(values, goal.percent)


def _ttft(outcomes: Sequence[Outcome]) -> list[float]:
    return [one.ttft_s for one in outcomes if one.status == "served" and one.ttft_s is not None]


def _tpot(outcomes: Sequence[Outcome]) -> list[float]:
    return [one.tpot_s for one in outcomes if one.status == "served" and one.tpot_s is not None]


def _e2el(outcomes: Sequence[Outcome]) -> list[float]:
    return [one.e2el_s for one in outcomes if one.status == "served"]


def percentile(values: Sequence[float], percent: float) -> float:
    """As numpy's, of rising values that may end in infinities."""
    place = (len(values) - 1) * percent / 100
    low, share = int(place), place - int(place)
    if share == 0 or values[low] == values[min(low + 1, len(values) - 1)]:
        return values[low]
    # inf where the upper neighbour is
    return values[low] + share * (values[low + 1] - values[low])
