"""A calibration as SVG: errors of the first cut, and what the finalists are worth by what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..plots import STYLES, Point, order_of, panel_of
from ..results import EXACT
from ..svg import as_text, drawing
from .records import Report, Tried

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHARE_TICKS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.5, 2.0)
CHOSEN, OTHERS = "chosen", "other finalists"


def calibration_plot(report: Report) -> str:
    """SVG: error by T with a line for each share of the rows, error by bytes of the caches, and the finalists' average
    by prefill's operations, one panel a context; panels that would be empty are left out."""
    rows = [one for one in report.propagation if one.error is not None]
    packed = [one for one in report.cache if one.error is not None]
    contexts = [int(context) for context in report.finalists[0].means]
    count = bool(rows) + bool(packed) + len(contexts)
    with drawing():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.6 * count, 4.2))
        panels = list(figure.subplots(1, count, squeeze=False)[0])
        figure.subplots_adjust(left=0.22 / count, right=0.99, top=0.86, bottom=0.12, wspace=0.22)
        if rows:
            _by_layer(panels.pop(0), rows)
        if packed:
            _by_bytes(panels.pop(0), packed)
        for axes, context in zip(panels, contexts, strict=True):
            _finalists(axes, report, context)
        title = f"{report.settings['recipe']} on {report.model.name}: errors of the first cut, answers of the second"
        figure.suptitle(title, x=0.22 / count, ha="left", fontsize=10)
        return as_text(figure)


def _number(choice: Tried, ending: str) -> float | None:
    """A number of propagation, whatever its key begins with."""
    return next((value for key, value in choice.choice.items() if key.endswith(ending)), None)


def _by_layer(axes: Axes, candidates: Sequence[Tried]) -> None:
    """The best window's error at each layer, a line a rate."""
    best: dict[float, dict[float, float]] = {}
    for one in candidates:
        assert one.error is not None, "measured"
        layer, rate = _number(one, "_layer") or 0, _number(one, "_rate") or 0
        line = best.setdefault(rate, {})
        line[layer] = min(one.error, line.get(layer, one.error))
    for place, (rate, line) in enumerate(sorted(best.items())):
        colour, marker = STYLES[place % len(STYLES)]
        layers = sorted(line)
        name = f"{rate:.0%} of the rows" if rate else "as the recipe says"
        axes.plot(
            layers,
            [line[layer] for layer in layers],
            marker=marker,
            color=colour,
            markersize=4,
            linewidth=1,
            label=name,
        )
    _dress(axes, "layer T", "relative error of the last rows' final hidden state")
    axes.legend(frameon=False)
    axes.set_title("rows that go on", loc="left", fontsize=9, pad=4)


def _by_bytes(axes: Axes, candidates: Sequence[Tried]) -> None:
    """A mark a candidate, a colour for each way to store keys."""
    by_keys: dict[str, list[Tried]] = {}
    for one in candidates:
        by_keys.setdefault(one.label.partition("-")[0] if "key_codec" in one.choice else "", []).append(one)
    for place, (keys, own) in enumerate(by_keys.items()):
        colour, marker = STYLES[place % len(STYLES)]
        shipped = [one.costs.shipped for one in own if one.costs is not None]
        errors = [one.error for one in own if one.error is not None]
        axes.plot(shipped, errors, marker=marker, markersize=4, color=colour, linestyle="", label=keys or None)
    if list(by_keys) != [""]:
        axes.legend(frameon=False)
    _dress(axes, "bytes shipped ÷ bytes of the KV cache in bf16", "relative error of the answers' final hidden state")
    axes.set_title("packed and read", loc="left", fontsize=9, pad=4)


def _finalists(axes: Axes, report: Report, context: int) -> None:
    points = []
    for one in report.finalists:
        mean, low, high = one.means[str(context)]
        if one.label == EXACT:
            axes.axhspan(low, high, color="#eeeeee", zorder=0)
            axes.axhline(mean, color="#888888", linewidth=0.8, linestyle="--", zorder=0.5)
            continue
        family = CHOSEN if one.label == report.chosen else OTHERS
        points.append(Point(one.label, family, context, one.prefill, mean, low, high))
    panel_of(axes, sorted(points, key=order_of), points, (OTHERS, CHOSEN), SHARE_TICKS)
    axes.legend(frameon=False)
    axes.set_xlabel("floating-point operations of prefill ÷ those of exact")
    axes.set_ylabel("average score")
    axes.set_title(f"{context:,} tokens; band: exact", loc="left", fontsize=9, pad=4)


def _dress(axes: Axes, across: str, along: str) -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(along)
    axes.set_ylim(bottom=0)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
