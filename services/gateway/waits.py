"""How long requests wait for a worker, as a gateway sees it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

RECENT_S = 10.0
MAX_RECENT = 64
AHEAD_S = 0.25  # of prompts that prefill workers are given ahead of those that they run
PROMPTS_AHEAD = 2  # that each is given whatever they take, so that none waits for the next one
WEIGHT = 0.3  # of the newest prompt in the mean of a worker's speed


class Waits:
    """Waits that have a beginning and an end.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since_s: dict[tuple[str, int], float] = {}
        self._ended: deque[tuple[float, float]] = deque(maxlen=MAX_RECENT)  # when, after how long

    def begin(self, key: tuple[str, int]) -> None:
        self._since_s[key] = self._clock()

    def end(self, key: tuple[str, int]) -> None:
        """The wait was successful."""
        since_s = self._since_s.pop(key, None)
        if since_s is not None:
            now = self._clock()
            self._ended.append((now, now - since_s))

    def drop(self, key: tuple[str, int]) -> None:
        """The wait was given up."""
        self._since_s.pop(key, None)

    def clear(self) -> None:
        self._since_s.clear()
        self._ended.clear()

    def seconds(self) -> float:
        """The mean of the last waits, or the longest of those that go on, whichever is more; 0 where nobody waits."""
        now = self._clock()
        recent = [waited_s for ended_s, waited_s in self._ended if now - ended_s <= RECENT_S]
        mean_s = sum(recent) / len(recent) if recent else 0.0
        return max([mean_s, *(now - since_s for since_s in self._since_s.values())])


class Throughput:
    """How fast a worker runs prompts: tokens over the time in which it had any.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since_s = 0.0
        self._seconds_per_token: float | None = None

    def begin(self, idle: bool) -> None:
        """A prompt was given to the worker.

        Args:
            idle: it had none.
        """
        if idle:
            self._since_s = self._clock()

    def end(self, num_tokens: int) -> None:
        """A prompt of so many tokens has run."""
        now = self._clock()
        if num_tokens:
            sample = (now - self._since_s) / num_tokens
            known = self._seconds_per_token
            self._seconds_per_token = sample if known is None else known * (1 - WEIGHT) + sample * WEIGHT
        self._since_s = now

    def seconds(self, num_tokens: int) -> float:
        """How long so many tokens take; 0 where that is not known."""
        return num_tokens * (self._seconds_per_token or 0.0)


@dataclass(frozen=True)
class Backlog:
    """The prompts that prefill workers have not run. They take turns: a prompt waits for no more of a longer one than
    it is long itself.

    Attributes:
        prompts: tokens of each.
        num_workers: that run them.
        seconds_per_token: of a worker; 0 = not known.
    """

    prompts: Sequence[int] = ()
    num_workers: int = 1
    seconds_per_token: float = 0.0

    def seconds(self, own: float, others: float = 0.0) -> float:
        """How long a prompt of `own` tokens takes that is given to a worker once `others` tokens have been, as far as
        that is known; 0 where nothing is run: what nothing proves wrong keeps nobody out."""
        if not self.prompts:
            return 0.0
        ahead = sum(min(tokens, own) for tokens in self.prompts) + others
        return self.seconds_per_token * (ahead / self.num_workers + own)

    def has_room(self, own: float) -> bool:
        """Whether a prompt of `own` tokens should be given to a worker now, rather than wait where turns are fair."""
        ahead = sum(min(tokens, own) for tokens in self.prompts)
        ahead_s = self.seconds_per_token * ahead / self.num_workers
        return ahead_s <= AHEAD_S or len(self.prompts) < PROMPTS_AHEAD * self.num_workers
