"""What follows a failed attempt. Pure policy: no transport, no clock of its own.

    fresh ──(workers lost)──> fresh                       nothing was told: another pair begins anew
      └─(tokens were told)──> restore ──> replay ──> …    from the store where it was kept, else from the prompt
    a session's later turn ──────^

An attempt that goes on is given the tokens that were told. They are the truth: whoever goes on feeds them, and draws
only what comes behind them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from ...errors import (
    CorruptFrame,
    Fenced,
    KvsluiceError,
    OutOfMemory,
    Overloaded,
    SequenceLost,
    StoreUnavailable,
    WorkerLost,
)
from .membership import Member

_OTHERS_MAY_GO_ON = (WorkerLost, OutOfMemory, SequenceLost, StoreUnavailable, CorruptFrame, Fenced)
FIRST_WAIT_S, MOST_WAIT_S = 0.05, 2.0
REFILL_S = 60.0


class Start(Enum):
    """Where an attempt begins."""

    FRESH = "fresh"  # with the prompt; nothing was told
    REPLAY = "replay"  # with the prompt; what was told is fed to decode
    RESTORE = "restore"  # with what the store holds


class RetryBudget:
    """A token bucket: how many attempts that follow a failed one may begin, over all requests.

    Args:
        burst: at once, and in every minute.
        clock: monotonic seconds.
    """

    def __init__(self, burst: int, clock: Callable[[], float]) -> None:
        self._burst, self._clock = burst, clock
        self._left, self._at_s = float(burst), clock()

    def take(self) -> bool:
        """Whether one more may begin."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at_s) * self._burst / REFILL_S)
        self._at_s = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


@dataclass
class Failover:
    """The attempts at one request.

    Args:
        max_migrations: attempts that may follow the first.
        budget: shared by all requests.
        keeps: the request is kept in a store.
        in_session: other gateways may go on with the sequence; whoever is fenced by one of them ends.
        continues: something goes before the answer, which the store holds.

    Attributes:
        blame: how often each worker failed; those with the least of it are taken.
        migrations: attempts that followed another.
    """

    max_migrations: int
    budget: RetryBudget
    keeps: bool
    in_session: bool = False
    continues: bool = False
    blame: Counter[Member] = field(default_factory=Counter)
    migrations: int = 0
    start: Start = Start.FRESH

    def __post_init__(self) -> None:
        if self.continues:
            self.start = Start.RESTORE

    def next(self, error: KvsluiceError, has_begun: bool, blamed: set[Member]) -> float:
        """Plan the attempt that follows. Returns seconds to wait before it: the links need a moment to notice.

        Args:
            has_begun: tokens were told.
            blamed: workers that may be at fault.

        Raises:
            KvsluiceError: the request ends with this.
        """
        was = self.start
        if not isinstance(error, (SequenceLost, Fenced)):  # a worker that says so is sound
            self.blame.update(blamed)
        self.start = self._start(error, has_begun)
        if not self._may_follow(error, has_begun):
            raise error
        if was is Start.RESTORE and self.start is Start.REPLAY:
            return 0.0  # the store did not have it: the same migration by the other way
        if self.migrations >= self.max_migrations:
            raise type(error)(f"{error.message}; given up after {self.migrations + 1} attempts") from error
        if not self.budget.take():
            raise type(error)(f"{error.message}; too many requests are tried again already") from error
        self.migrations += 1
        return min(MOST_WAIT_S, FIRST_WAIT_S * (1 << (self.migrations - 1)))

    def _start(self, error: KvsluiceError, has_begun: bool) -> Start:
        if not (has_begun or self.continues):
            return Start.FRESH
        lost = isinstance(error, (SequenceLost, StoreUnavailable, CorruptFrame, Fenced))
        return Start.REPLAY if lost or not self.keeps else Start.RESTORE

    def _may_follow(self, error: KvsluiceError, has_begun: bool) -> bool:
        if isinstance(error, Overloaded):
            return has_begun  # its client has tokens already: it waits for room
        if isinstance(error, Fenced) and self.in_session:
            return False
        return isinstance(error, _OTHERS_MAY_GO_ON)
