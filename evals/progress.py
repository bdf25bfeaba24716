"""How far an evaluation is: a bar on a terminal, else a line now and then, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from .suites import Unit

LINE_EVERY_S = 30.0


class Progress(Protocol):
    """Told of each sample that is done."""

    def advance(self, num_tokens: int) -> None: ...


class _Lines:
    """Plain lines, one every `LINE_EVERY_S` seconds and a last one."""

    def __init__(self, num_samples: int, num_tokens: int, name: str) -> None:
        self._num_samples, self._num_tokens, self._name = num_samples, num_tokens, name
        self._done, self._tokens_done = 0, 0
        self._began = self._said = time.monotonic()

    def advance(self, num_tokens: int) -> None:
        self._done += 1
        self._tokens_done += num_tokens
        now = time.monotonic()
        if now - self._said >= LINE_EVERY_S or self._done == self._num_samples:
            self._said = now
            left_s = (now - self._began) * (self._num_tokens / self._tokens_done - 1)
            say(
                f"{self._done} of {self._num_samples} samples after {now - self._began:.0f} s, "
                f"about {left_s:.0f} s left",
                self._name,
            )


def say(what: str, name: str = "eval") -> None:
    """One line of what goes on, and in what."""
    print(f"{name}: {what}", file=sys.stderr, flush=True)


@contextmanager
def progress(everything: Sequence[Unit], left: Sequence[Unit], name: str = "eval") -> Iterator[Progress]:
    """Progress over the units that are left. Time is taken to go with a sample's tokens.

    Args:
        name: of what goes on.
    """
    num_tokens = sum(unit.context for unit in left)
    if len(left) < len(everything):
        say(f"{len(everything) - len(left)} of {len(everything)} samples are done already", name)
    if not sys.stderr.isatty():
        yield _Lines(len(left), num_tokens, name)
        return
    try:
        from .progress_bar import terminal_bar
    except ImportError:  # a bare machine
        yield _Lines(len(left), num_tokens, name)
        return
    with terminal_bar(len(left), num_tokens, name) as bar:
        yield bar
