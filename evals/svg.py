"""Plots as SVG text, the same bytes from the same numbers."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABEL_SIZE = 8.0  # points; letters are about 0.56 of it wide


@contextmanager
def drawing() -> Iterator[None]:
    """Settings under which the same numbers give the same file, and letters stay letters."""
    import matplotlib

    settings: Any = {
        "svg.hashsalt": "kvsluice",
        "svg.fonttype": "none",
        "font.family": "DejaVu Sans",
        "font.size": LABEL_SIZE,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    # a user's own matplotlibrc must not show
    with matplotlib.rc_context(rc={**matplotlib.rcParamsDefault, **settings}):
        yield


def as_text(figure: Figure) -> str:
    """The figure as a file holds it."""
    text = io.StringIO()
    figure.savefig(text, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
