"""How far the engine launches ahead of the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

PACKS_AHEAD = 2


class Event(Protocol):
    """A point in a stream of the device's work."""

    def synchronize(self) -> None: ...


class Pace:
    """Holds the engine back where the device is `packs_ahead` packs behind.

    Two keep the device busy. More only make what comes in between wait behind them: a short prompt that arrives, a
    cancel, a reader who holds a prompt back.

    Args:
        mark: an event behind what the engine has launched so far.
    """

    def __init__(self, mark: Callable[[], Event], packs_ahead: int = PACKS_AHEAD) -> None:
        self._mark = mark
        self._packs_ahead = packs_ahead
        self._launched: deque[Event] = deque()

    def launched(self) -> None:
        """A pack has been launched; waits until fewer than `packs_ahead` before it are unfinished."""
        self._launched.append(self._mark())
        if len(self._launched) > self._packs_ahead:
            self._launched.popleft().synchronize()


def make_pace(device: torch.device) -> Pace | None:
    """None on a CPU, which finishes what it launches."""
    if device.type != "cuda":
        return None

    def mark() -> Event:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    return Pace(mark)
