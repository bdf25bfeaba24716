"""Plots of a run, as SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .outcomes import FAILURES, SERVED, Outcome, open_at
from .results import RunResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SETTINGS = {
    "svg.hashsalt": "kvsluice",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
POINTS = 400  # of a line over time
BLUE, RED, GREY, GREEN = "#0072B2", "#D55E00", "#888888", "#009E73"


def plots(run: RunResults) -> dict[str, str]:
    """Title to SVG, of what the run has figures for."""
    import matplotlib
    from matplotlib.figure import Figure

    outcomes = run.outcomes()
    made = {}
    # a user's own matplotlibrc must not show
    settings: Any = {**matplotlib.rcParamsDefault, **SETTINGS}
    with matplotlib.rc_context(rc=settings):
        for title, draw in _DRAWN.items():
            figure = Figure(figsize=(8.0, 2.6), layout="constrained")
            axes = figure.subplots()
            if draw(axes, run, outcomes):
                axes.grid(color="#dddddd", linewidth=0.6)
                axes.set_axisbelow(True)
                text = io.StringIO()
                figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
                made[title] = text.getvalue()
    return made


def _first_tokens(axes: Axes, run: RunResults, outcomes: Sequence[Outcome]) -> bool:
    groups = (
        ("served", BLUE, [o for o in outcomes if o.status == SERVED and not o.warm_up]),
        ("warm-up", GREY, [o for o in outcomes if o.status == SERVED and o.warm_up]),
    )
    for label, colour, group in groups:
        if group:
            ttfts = [o.ttft_s or 0.0 for o in group]
            axes.plot([o.arrival_s for o in group], ttfts, ".", color=colour, markersize=3, label=label)
    failed = [o for o in outcomes if o.status in FAILURES]
    if failed:
        axes.plot(
            [o.arrival_s for o in failed], [o.e2el_s for o in failed], "x", color=RED, markersize=4, label="failed"
        )
    axes.set_xlabel("due, in seconds since the start")
    axes.set_ylabel("seconds to the first token")
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, ncols=3)
    return bool(outcomes)


def _distributions(axes: Axes, run: RunResults, outcomes: Sequence[Outcome]) -> bool:
    served = [o for o in outcomes if o.status == SERVED and not o.warm_up]
    lines = {
        "TTFT": (BLUE, sorted(o.ttft_s for o in served if o.ttft_s is not None)),
        "TPOT": (GREEN, sorted(o.tpot_s for o in served if o.tpot_s is not None)),
        "E2EL": (RED, sorted(o.e2el_s for o in served)),
    }
    for name, (colour, values) in lines.items():
        if values:
            shares = np.arange(1, len(values) + 1) / len(values)
            axes.step(np.maximum(values, 1e-5), shares, where="post", color=colour, label=name)
    if run.itl:
        middles, counts = zip(*run.itl, strict=True)
        axes.step(middles, np.cumsum(counts) / sum(counts), where="post", color=GREY, label="ITL")
    axes.set_xscale("log")
    axes.set_xlabel("seconds")
    axes.set_ylabel("share at or below")
    if served:
        axes.legend(frameon=False, ncols=4, loc="upper left")
    return bool(served)


def _under_way(axes: Axes, run: RunResults, outcomes: Sequence[Outcome]) -> bool:
    if not outcomes:
        return False
    times = np.linspace(0.0, max(o.end_s for o in outcomes), POINTS).tolist()
    axes.step(times, open_at(outcomes, times), where="post", color=BLUE)
    axes.set_xlabel("seconds since the start")
    axes.set_ylabel("requests under way")
    axes.set_ylim(bottom=0)
    return True


def _throughput(axes: Axes, run: RunResults, outcomes: Sequence[Outcome]) -> bool:
    if not run.tokens:
        return False
    counts = {second: count for second, count in run.tokens}  # noqa: C416 - pairs are lists in the file
    seconds = range(int(max(counts)) + 1)
    axes.step(list(seconds), [counts.get(second, 0) for second in seconds], where="post", color=GREEN)
    axes.set_xlabel("seconds since the start")
    axes.set_ylabel("answer tokens in the second")
    axes.set_ylim(bottom=0)
    return True


_DRAWN = {
    "Time to first token, by when a request was due": _first_tokens,
    "Latencies": _distributions,
    "Requests under way": _under_way,
    "Tokens": _throughput,
}
