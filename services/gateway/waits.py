"""How long requests wait for a worker, as a gateway sees it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

RECENT_S = 10.0
MAX_RECENT = 64
AHEAD_S = 0.25  # of prompts that prefill workers are given ahead of those that they run
PROMPTS_AHEAD = 2  # that each is given whatever they take, so that none waits for the next one
CACHED_SHARE = 1 / 16  # of running a token, what one that need not run costs
FIXED_TOKENS = 32.0  # as many tokens' time a prompt takes beside its own
MEMORY_TOKENS = 16384.0  # of work, after which what a worker's speed was counts for 1/e


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


def work(num_tokens: float) -> float:
    """What a prompt costs, in tokens: however short it is, a pass through the model and a handoff are made for it."""
    return num_tokens + FIXED_TOKENS


def saved(cached_tokens: float) -> float:
    """What a prompt costs less, in tokens, whose first `cached_tokens` need not run: they are loaded and attended to.
    Under recipes that share only their lower layers they save less than that; it is an estimate."""
    return cached_tokens * (1 - CACHED_SHARE)


class Throughput:
    """How fast a worker runs prompts: their work over the time in which it had any. What a prompt says counts by its
    length, so that short ones, which say little of long ones, do not push those out of the mean.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since_s = 0.0
        self._seconds = self._work = 0.0  # the newest counts most

    def begin(self, idle: bool) -> None:
        """A prompt was given to the worker.

        Args:
            idle: it had none.
        """
        if idle:
            self._since_s = self._clock()

    def end(self, num_tokens: float | None) -> None:
        """A prompt has run that cost so many tokens; None = something else has that does not count."""
        now, since_s = self._clock(), self._since_s
        self._since_s = now
        if num_tokens is None:
            return
        keep = math.exp(-work(num_tokens) / MEMORY_TOKENS)
        self._seconds = self._seconds * keep + now - since_s
        self._work = self._work * keep + work(num_tokens)

    @property
    def seconds_per_token(self) -> float:
        """Of `work`; 0 where that is not known."""
        return self._seconds / self._work if self._work else 0.0


@dataclass(frozen=True)
class Backlog:
    """The prompts that prefill workers have not run. They take turns: a prompt waits for no more of a longer one than
    it is long itself.

    Attributes:
        prompts: tokens of each.
        num_workers: that run them.
        seconds_per_token: of `work`, of a worker; 0 = not known.
    """

    prompts: Sequence[int] = ()
    num_workers: int = 1
    seconds_per_token: float = 0.0

    def seconds(self, own: float, others: float = 0.0) -> float:
        """How long a prompt of `own` tokens takes that is given to a worker once others of so much work have been, as
        far as that is known; 0 where nothing is run: what nothing proves wrong keeps nobody out."""
        if not self.prompts:
            return 0.0
        return self.seconds_per_token * ((self._ahead(own) + others) / self.num_workers + work(own))

    def has_room(self, own: float) -> bool:
        """Whether a prompt of `own` tokens should be given to a worker now, rather than wait where turns are fair."""
        ahead_s = self.seconds_per_token * self._ahead(own) / self.num_workers
        return ahead_s <= AHEAD_S or len(self.prompts) < PROMPTS_AHEAD * self.num_workers

    def _ahead(self, own: float) -> float:
        """The work that a prompt of `own` tokens waits for."""
        return sum(work(min(tokens, own)) for tokens in self.prompts)
