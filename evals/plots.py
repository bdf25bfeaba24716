"""Plots of accuracy as SVG text, the same bytes from the same numbers. matplotlib is imported when one is drawn.

Colours are Okabe and Ito's, which colour-blind readers can tell apart, and every family has a marker of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from .svg import LABEL_SIZE, as_text, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))
POINTS_PER_INCH = 72.0
MARKER_RADIUS = 4.0
LABEL_GAPS = (7.0, 16.0, 27.0, 40.0)
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Point:
    """One recipe at one context.

    Attributes:
        family: what recipes of one colour have in common.
        cost: above 0; what the horizontal axis says.
        mean, low, high: score and its 95 % interval.
    """

    label: str
    family: str
    context: int
    cost: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Box:
    """A rectangle in points, from the lower left corner of an axes."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        across = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        along = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(0.0, across) * max(0.0, along)


def accuracy_against_bytes(points: Sequence[Point], families: Sequence[str], title: str) -> str:
    """SVG: score with its interval against bytes on a logarithmic axis, one panel a context, one mark a recipe.

    Args:
        families: all that points may belong to, at most six; each has its colour and mark by its place here.
    """
    contexts = sorted({point.context for point in points})
    with drawing():
        from matplotlib.figure import Figure

        width, panel, top, bottom = 9.0, 3.9, 0.75, 0.6
        figure = Figure(figsize=(width, panel * len(contexts) + top + bottom))
        height = figure.get_figheight()
        grid = figure.subplots(len(contexts), 1, sharex=True, sharey=True, squeeze=False)
        figure.subplots_adjust(left=0.07, right=0.985, top=1 - top / height, bottom=bottom / height, hspace=0.1)
        for axes, context in zip(grid[:, 0], contexts, strict=True):
            shown = sorted((p for p in points if p.context == context), key=order_of)
            panel_of(axes, shown, points, families)
            axes.set_ylabel("average score")
            axes.set_title(f"{context:,} tokens", loc="left", fontsize=9, pad=4)
        grid[-1, 0].set_xlabel("bytes shipped ÷ bytes of the KV cache in bf16")
        legend_above(figure, grid[0, 0], 0.062, len(families))
        figure.suptitle(title, x=0.07, y=1 - 0.07 / height, ha="left", va="top", fontsize=10)
        return as_text(figure)


def order_of(point: Point) -> tuple[float, float, str]:
    """In which points are drawn and labelled."""
    return point.cost, -point.mean, point.label


def legend_above(figure: Figure, axes: Axes, left: float, columns: int) -> None:
    """One line under the title that says what the marks of a panel are, from `left` of the figure's width on."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(left, 1 - 0.22 / figure.get_figheight()),
        ncols=columns,
        frameon=False,
        handletextpad=0.1,
        columnspacing=1.2,
    )


def needle_maps(scores: Mapping[tuple[str, int, float], float], labels: Sequence[str], title: str) -> str:
    """SVG: one small map a recipe, how often a needle is found by its depth and the prompt's length.

    Args:
        scores: mean score by (label, context, depth from 0 = start to 1 = end).
        labels: order of the maps.
    """
    contexts = sorted({context for _, context, _ in scores})
    depths = sorted({depth for _, _, depth in scores})
    columns = min(4, len(labels))
    rows = -(-len(labels) // columns)
    with drawing():
        from matplotlib.figure import Figure

        width, height, top, bottom = 9.0, 1.55 * rows + 1.1, 0.65, 0.5
        figure = Figure(figsize=(width, height))
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        figure.subplots_adjust(
            left=0.075, right=0.9, top=1 - top / height, bottom=bottom / height, hspace=0.32, wspace=0.08
        )
        mesh: Any = None
        for place, axes in enumerate(grid.flat):
            if place >= len(labels):
                axes.set_axis_off()
                continue
            label = labels[place]
            values = [[scores.get((label, context, depth), math.nan) for context in contexts] for depth in depths]
            mesh = axes.pcolormesh(values, vmin=0.0, vmax=1.0, cmap="cividis", edgecolors="white", linewidth=0.6)
            axes.set_title(label, fontsize=9, pad=3)
            axes.set_xticks([i + 0.5 for i in range(len(contexts))], [_thousands(c) for c in contexts])
            axes.set_yticks(*_depth_ticks(depths))
            axes.set_ylim(len(depths), 0)
            axes.set_facecolor("#bbbbbb")
        bar = figure.colorbar(mesh, cax=figure.add_axes((0.92, bottom / height, 0.015, 1 - (top + bottom) / height)))
        bar.set_label("share found", fontsize=8)
        figure.supxlabel("tokens in the prompt", fontsize=9, y=0.06 / height)
        figure.supylabel("depth of the needle", fontsize=9, x=0.004)
        figure.suptitle(title, x=0.075, y=1 - 0.07 / height, ha="left", va="top", fontsize=10)
        return as_text(figure)


def panel_of(
    axes: Axes,
    shown: Sequence[Point],
    everything: Sequence[Point],
    families: Sequence[str],
    marks: Sequence[float] = TICKS,
) -> None:
    """Draw points with their intervals and names, over an axis as wide as `everything` is; `marks` are its ticks."""
    shares = [point.cost for point in everything]
    low, high = min(shares) / 1.25, max(shares) * 1.25
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(-0.03, 1.03)
    ticks = [tick for tick in marks if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for family, (colour, marker) in zip(families, STYLES, strict=False):
        own = [point for point in shown if point.family == family]
        if not own:
            continue
        axes.errorbar(
            [point.cost for point in own],
            [point.mean for point in own],
            yerr=[[max(0.0, p.mean - p.low) for p in own], [max(0.0, p.high - p.mean) for p in own]],
            fmt=marker,
            color=colour,
            markersize=2 * MARKER_RADIUS - 2,
            elinewidth=1.0,
            capsize=2.0,
            label=family,
        )
    _name_points(axes, shown)


def _name_points(axes: Axes, shown: Sequence[Point]) -> None:
    """Write each label where it covers least, with a thin line to its mark when that is not beside it."""
    figure = axes.get_figure()
    assert figure is not None
    area = axes.get_position()
    size_in = figure.get_size_inches()  # type: ignore[union-attr]
    frame = Box(0.0, 0.0, area.width * size_in[0] * POINTS_PER_INCH, area.height * size_in[1] * POINTS_PER_INCH)
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()

    def place(share: float, score: float) -> tuple[float, float]:
        across = math.log(share / x0) / math.log(x1 / x0)
        return across * frame.width, (score - y0) / (y1 - y0) * frame.height

    taken = []
    for point in shown:
        x, y = place(point.cost, point.mean)
        bottom, top = place(point.cost, point.low)[1], place(point.cost, point.high)[1]
        taken.append(Box(x - MARKER_RADIUS, y - MARKER_RADIUS, 2 * MARKER_RADIUS, 2 * MARKER_RADIUS))
        taken.append(Box(x - 1.0, bottom, 2.0, top - bottom))
    for point in shown:
        x, y = place(point.cost, point.mean)
        box, gap = _best_box(point.label, x, y, frame, taken)
        taken.append(box)
        line = {"arrowstyle": "-", "color": "#888888", "linewidth": 0.6, "shrinkA": 0.0, "shrinkB": MARKER_RADIUS}
        axes.annotate(
            point.label,
            (point.cost, point.mean),
            xytext=(box.x + box.width / 2 - x, box.y + box.height / 2 - y),
            textcoords="offset points",
            ha="center",
            va="center_baseline",
            fontsize=LABEL_SIZE,
            arrowprops=line if gap > LABEL_GAPS[0] else None,
        )


def _best_box(label: str, x: float, y: float, frame: Box, taken: Sequence[Box]) -> tuple[Box, float]:
    """Where a label stands beside a mark at (x, y), and how far away: least overlap, then the nearest place."""
    width, height = 0.56 * LABEL_SIZE * len(label) + 2.0, 1.25 * LABEL_SIZE
    best: tuple[float, Box, float] | None = None
    directions = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
    for gap, (dx, dy) in product(LABEL_GAPS, directions):
        centre_x = x + dx * (gap + width / 2) if dx else x
        box = Box(centre_x - width / 2, y + dy * gap * (1.0 if dx == 0 else 0.8) - height / 2, width, height)
        outside = width * height - box.overlap(frame)
        cost = 10 * outside + sum(box.overlap(other) for other in taken) + 0.2 * gap
        if best is None or cost < best[0]:
            best = (cost, box, gap)
    assert best is not None
    return best[1], best[2]


def _thousands(num_tokens: int) -> str:
    """8192 as `8K`, 6000 as `6000`."""
    return f"{num_tokens // 1024}K" if num_tokens % 1024 == 0 else str(num_tokens)


def _depth_ticks(depths: Sequence[float]) -> tuple[list[float], list[str]]:
    """At most six ticks, from the first depth on."""
    places = range(0, len(depths), max(1, -(-(len(depths) - 1) // 5)))
    return [place + 0.5 for place in places], [f"{depths[place]:.0%}" for place in places]
