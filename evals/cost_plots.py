"""Plots of what answers are worth by what they cost, and by the turn in which they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .plots import STYLES, TICKS, Point, legend_above, order_of, panel_of
from .svg import as_text, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLOPS_TICKS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.5, 2.0)


@dataclass(frozen=True)
class Cost:
    """One column of panels.

    Attributes:
        name: of its axis.
        points: as `plots.Point` has them; their `cost` is this one.
        ticks: marks of the axis that may be shown.
    """

    name: str
    points: Sequence[Point]
    ticks: Sequence[float] = TICKS


@dataclass(frozen=True)
class TurnScore:
    """A recipe's mean in one turn, with its 95 % interval."""

    mean: float
    low: float
    high: float


def accuracy_against_costs(costs: Sequence[Cost], reference: str, families: Sequence[str], title: str) -> str:
    """SVG: score with its interval against each cost on a logarithmic axis; a row of panels a context, a mark a recipe.

    Args:
        reference: label whose score is drawn as a line, with its interval as a band.
        families: all that points may belong to, at most six; each has its colour and mark by its place here.
    """
    contexts = sorted({point.context for cost in costs for point in cost.points})
    with drawing():
        from matplotlib.figure import Figure

        panel, top, bottom = 3.9, 0.75, 0.6
        figure = Figure(figsize=(5.2 * len(costs), panel * len(contexts) + top + bottom))
        height = figure.get_figheight()
        grid = figure.subplots(len(contexts), len(costs), sharex="col", sharey=True, squeeze=False)
        edges = {"top": 1 - top / height, "bottom": bottom / height}
        figure.subplots_adjust(left=0.06, right=0.99, hspace=0.1, wspace=0.04, **edges)
        for context, row in zip(contexts, grid, strict=True):
            for axes, cost in zip(row, costs, strict=True):
                own = [point for point in cost.points if point.context == context]
                _draw_reference(axes, own, reference)
                panel_of(axes, sorted(own, key=order_of), cost.points, families, cost.ticks)
            row[0].set_ylabel("average score")
            row[0].set_title(f"{context:,} tokens", loc="left", fontsize=9, pad=4)
        for axes, cost in zip(grid[-1], costs, strict=True):
            axes.set_xlabel(cost.name)
        legend_above(figure, grid[0, 0], 0.052, len(families))
        figure.suptitle(title, x=0.06, y=1 - 0.07 / height, ha="left", va="top", fontsize=10)
        return as_text(figure)


def accuracy_by_turn(scores: Mapping[int, Mapping[str, Sequence[TurnScore]]], title: str) -> str:
    """SVG: the mean of each turn with its interval, a line a recipe, one panel a context.

    Args:
        scores: context -> label -> one score a turn, the first turn first.
    """
    with drawing():
        from matplotlib.figure import Figure

        panel, top, bottom = 3.0, 0.5, 0.5
        figure = Figure(figsize=(9.0, panel * len(scores) + top + bottom))
        height = figure.get_figheight()
        grid = figure.subplots(len(scores), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        figure.subplots_adjust(left=0.07, right=0.82, top=1 - top / height, bottom=bottom / height, hspace=0.16)
        for axes, context in zip(grid, sorted(scores), strict=True):
            _turn_panel(axes, scores[context])
            axes.set_title(f"{context:,} tokens", loc="left", fontsize=9, pad=4)
        grid[-1].set_xlabel("turn")
        figure.suptitle(title, x=0.07, y=1 - 0.07 / height, ha="left", va="top", fontsize=10)
        return as_text(figure)


def _draw_reference(axes: Axes, points: Sequence[Point], label: str) -> None:
    for point in points:
        if point.label == label:
            axes.axhspan(point.low, point.high, color="#eeeeee", zorder=0)
            axes.axhline(point.mean, color="#888888", linewidth=0.8, linestyle="--", zorder=0.5)


def _turn_panel(axes: Axes, scores: Mapping[str, Sequence[TurnScore]]) -> None:
    shift = 0.12 / max(1, len(scores) - 1)  # so that the intervals of a turn stand side by side
    for place, (label, turns) in enumerate(scores.items()):
        colour, marker = STYLES[place % len(STYLES)]
        means = [turn.mean for turn in turns]
        below = [max(0.0, turn.mean - turn.low) for turn in turns]
        above = [max(0.0, turn.high - turn.mean) for turn in turns]
        axes.errorbar(
            [turn + place * shift - 0.06 for turn in range(1, len(turns) + 1)],
            means,
            yerr=[below, above],
            marker=marker,
            linestyle="-" if place < len(STYLES) else "--",
            color=colour,
            markersize=5.0,
            linewidth=1.0,
            elinewidth=0.8,
            capsize=2.0,
            label=label,
        )
    axes.set_xticks(range(1, 1 + max(len(turns) for turns in scores.values())))
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("right answers")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
