"""How often a choice may still run."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Turns:
    """What a started choice may still do.

    Attributes:
        replays: steps left that only replay tokens.
        left: turns that it may have, replays included; it waits for its end after the last one.
        leash: turns before `Scheduler.lengthen`; infinite where nothing has to keep up with it.
        slack: how much of the leash goes with the last replay.
    """

    replays: int = 0
    left: float = math.inf
    leash: float = math.inf
    slack: float = 0

    def spend(self, count: int, replayed: int) -> None:
        """Take so many turns, some of which only replay."""
        self.left -= count
        self.leash -= count
        self.replays -= replayed
        if replayed and not self.replays and self.slack:
            # one turn at least: rows are told at the beginning of one
            self.leash, self.slack = max(1, self.leash - self.slack), 0
