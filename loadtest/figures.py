"""The figures of a run, by the names that `vllm bench serve` gives them in its JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .goals import is_good
from .outcomes import SERVED, SHED, STATUSES, LogHistogram, Outcome, Recording

PERCENTILES = (99.0,)

Figures = dict[str, Any]


def measure(recording: Recording, bounds: Mapping[str, float], percentiles: Sequence[float] = PERCENTILES) -> Figures:
    """Figures over the counted requests; latencies in ms, over those that were served.

    Args:
        bounds: of a good request, in seconds by metric; empty = no goodput is told.

    Throughput counts what was served within the run's duration, which begins when the first counted request is due and
    ends with the last one.
    """
    outcomes = recording.counted()
    served = [one for one in outcomes if one.status == SERVED]
    begin_s = min((one.arrival_s for one in outcomes), default=0.0)
    duration_s = max((one.end_s for one in outcomes), default=0.0) - begin_s
    total_input, total_output = sum(o.input_tokens for o in served), sum(o.output_tokens for o in served)
    found: Figures = {
        "duration": duration_s,
        "completed": len(served),
        "counts": {status: sum(one.status == status for one in outcomes) for status in STATUSES},
        "errors": dict(Counter(one.error for one in outcomes if one.error)),
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "cached_tokens": sum(one.cached_tokens for one in served),
        "request_throughput": _rate(len(served), duration_s),
        "output_throughput": _rate(total_output, duration_s),
        "total_token_throughput": _rate(total_input + total_output, duration_s),
        "max_output_tokens_per_s": max(recording.tokens.values(), default=0),
        "max_concurrent_requests": recording.most_open,
        "offered_rate": _offered(outcomes),
        "num_warmups": len(recording.outcomes) - len(outcomes),
        "left_out": recording.left_out,
        "interrupted": recording.interrupted,
        "effective_recipes": dict(Counter(one.effective for one in served if one.effective)),
    }
    if bounds:
        found["request_goodput"] = _rate(sum(is_good(one, bounds) for one in served), duration_s)
    found |= _statistics("ttft", [one.ttft_s for one in served if one.ttft_s is not None], percentiles)
    found |= _statistics("tpot", [one.tpot_s for one in served if one.tpot_s is not None], percentiles)
    found |= _of_histogram("itl", recording.itl, percentiles)
    found |= _statistics("e2el", [one.e2el_s for one in served], percentiles)
    found |= _statistics("shed", [one.e2el_s for one in outcomes if one.status == SHED], percentiles)
    return found


def by_recipe(recording: Recording, percentiles: Sequence[float] = PERCENTILES) -> dict[str, Figures]:
    """The main figures of each recipe, where a run has several; "" = the server's default."""
    outcomes = [one for one in recording.counted() if one.status == SERVED]
    names = sorted({one.recipe for one in outcomes})
    if len(names) < 2:
        return {}
    return {name: _of_recipe([one for one in outcomes if one.recipe == name], percentiles) for name in names}


def _of_recipe(outcomes: Sequence[Outcome], percentiles: Sequence[float]) -> Figures:
    return {
        "completed": len(outcomes),
        "total_output_tokens": sum(one.output_tokens for one in outcomes),
        **_statistics("ttft", [one.ttft_s for one in outcomes if one.ttft_s is not None], percentiles),
        **_statistics("tpot", [one.tpot_s for one in outcomes if one.tpot_s is not None], percentiles),
        **_statistics("e2el", [one.e2el_s for one in outcomes], percentiles),
    }


def percentile_key(percent: float, metric: str) -> str:
    """The name of a percentile, such as p99_ttft_ms or p99.9_ttft_ms."""
    return f"p{percent:g}_{metric}_ms"


def _statistics(metric: str, values_s: Sequence[float], percentiles: Sequence[float]) -> Figures:
    if not values_s:
        return {}
    values = 1e3 * np.array(values_s)
    found = {
        f"mean_{metric}_ms": float(values.mean()),
        f"median_{metric}_ms": float(np.median(values)),
        f"std_{metric}_ms": float(values.std()),
    }
    return found | {percentile_key(p, metric): float(np.percentile(values, p)) for p in percentiles}


def _of_histogram(metric: str, histogram: LogHistogram, percentiles: Sequence[float]) -> Figures:
    mean_s = histogram.mean_s
    if mean_s is None:
        return {}
    found = {f"mean_{metric}_ms": 1e3 * mean_s, f"median_{metric}_ms": 1e3 * (histogram.percentile(50) or 0.0)}
    return found | {percentile_key(p, metric): 1e3 * (histogram.percentile(p) or 0.0) for p in percentiles}


def _rate(count: float, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 else 0.0


def _offered(outcomes: Sequence[Outcome]) -> float | None:
    """Requests a second that were due; None for fewer than two, or all at once."""
    span_s = outcomes[-1].arrival_s - outcomes[0].arrival_s if len(outcomes) > 1 else 0.0
    return (len(outcomes) - 1) / span_s if span_s > 0 else None
