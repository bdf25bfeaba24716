"""How a run goes on, on the terminal."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .driver import Observer, Unwatched
from .outcomes import FAILURES, SERVED, Outcome

RECENT = 64  # requests that the median is taken over


class TerminalProgress:
    """Counts what is under way, done and failed, and shows the median of recent first tokens."""

    def __init__(self, bar: Progress, total: int, title: str) -> None:
        self._bar, self._task = bar, bar.add_task(title, total=total, now="")
        self._counts: Counter[str] = Counter()
        self._open, self._tokens = 0, 0
        self._recent: deque[float] = deque(maxlen=RECENT)

    def began(self) -> None:
        self._open += 1
        self._show(0)

    def tokens(self, count: int) -> None:
        self._tokens += count

    def ended(self, outcome: Outcome) -> None:
        self._open -= outcome.sent_s is not None
        self._counts[outcome.status] += 1
        if outcome.ttft_s is not None:
            self._recent.append(outcome.ttft_s)
        self._show(1)

    def _show(self, advance: int) -> None:
        failed = sum(self._counts[status] for status in FAILURES)
        now = f"{self._open} open, {self._counts[SERVED]} served, {failed} failed, {self._tokens} tokens"
        if self._recent:
            now += f", TTFT {1e3 * median(self._recent):.0f} ms"
        self._bar.update(self._task, advance=advance, now=now)


@contextmanager
def watching(total: int, title: str, is_shown: bool) -> Iterator[Observer]:
    """An observer that shows progress on standard error, where that is a terminal and it is wanted."""
    console = Console(stderr=True)
    if not is_shown or not console.is_terminal:
        yield Unwatched()
        return
    columns: tuple[Any, ...] = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[now]}"))
    # redrawn four times a second, however many tokens come
    with Progress(*columns, TimeElapsedColumn(), console=console, refresh_per_second=4) as bar:
        yield TerminalProgress(bar, total, title)
