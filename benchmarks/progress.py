"""How far a run is: one line for each thing that is about to be measured, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


def print_line(line: str) -> None:
    """To standard error, at once."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """Counts measurements.

    Args:
        show: takes a line.
    """

    def __init__(self, show: Callable[[str], None] = print_line) -> None:
        self._show = show
        self._began_s = time.monotonic()
        self._total = 0
        self._begun = 0

    def expect(self, measurements: int) -> None:
        """So many more will be made."""
        self._total += measurements

    def begin(self, what: str) -> None:
        """A measurement begins."""
        self._begun += 1
        self._show(f"bench: {self._begun} of {self._total}, after {time.monotonic() - self._began_s:.0f} s: {what}")

    def say(self, what: str) -> None:
        """Something worth knowing while it runs."""
        self._show(f"bench: {what}")
