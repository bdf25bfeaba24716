"""The progress bar of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TerminalBar:
    """Advances by tokens, so that the time left is right when contexts differ, and counts samples."""

    def __init__(self, bar: Progress, num_samples: int, num_tokens: int, name: str) -> None:
        self._bar, self._num_samples, self._done = bar, num_samples, 0
        self._task = bar.add_task(name, total=num_tokens, samples=self._samples)

    @property
    def _samples(self) -> str:
        return f"{self._done}/{self._num_samples} samples"

    def advance(self, num_tokens: int) -> None:
        self._done += 1
        self._bar.update(self._task, advance=num_tokens, samples=self._samples)


@contextmanager
def terminal_bar(num_samples: int, num_tokens: int, name: str) -> Iterator[TerminalBar]:
    """A bar on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[samples]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        yield TerminalBar(bar, num_samples, num_tokens, name)
