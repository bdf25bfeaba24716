"""How long requests wait for a worker, as a gateway sees it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

RECENT_S = 10.0
MAX_RECENT = 64
AHEAD_S = 0.25  # of prompts that prefill workers are given ahead of those that they run
PROMPTS_AHEAD = 2  # that each is given whatever they take, so that none waits for the next one
CACHED_SHARE = 1 / 16  # of running a token, what one that need not run costs
FIXED_TOKENS = 32.0  # as many tokens' time a prompt takes beside its own
REACH = 16.0  # times the longest prompt that has run lately are all that its time says anything of
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
    """What a prompt costs less, in tokens, where so many need not run in any layer: they are loaded and attended to."""
    return cached_tokens * (1 - CACHED_SHARE)


@dataclass(frozen=True)
class Speed:
    """How long prompts take a worker.

    Attributes:
        seconds_per_token: of `work`; 0 = not known.
        most_work: of one prompt, that this says anything of: a longer one takes at least as long.
    """

    seconds_per_token: float = 0.0
    most_work: float = math.inf

    def seconds(self, num_tokens: float) -> float:
        """Of a prompt that costs so many tokens, at least; 0 where that is not known."""
        return self.seconds_per_token * min(work(num_tokens), self.most_work)


def mean_speed(speeds: Iterable[Speed]) -> Speed:
    """Of several workers, as far as theirs are known."""
    known = [one for one in speeds if one.seconds_per_token]
    if not known:
        return Speed()
    return Speed(sum(one.seconds_per_token for one in known) / len(known), max(one.most_work for one in known))


class Throughput:
    """How fast a worker runs prompts: their work over the time in which it had any. What a prompt says counts by its
    length, so that short ones, which say little of long ones, do not push those out of the mean.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since_s = 0.0
        self._seconds = self._work = self._longest = 0.0  # the newest counts most

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
        own = work(num_tokens)
        keep = math.exp(-own / MEMORY_TOKENS)
        self._seconds = self._seconds * keep + now - since_s
        self._work = self._work * keep + own
        self._longest = max(self._longest * keep, own)

    @property
    def speed(self) -> Speed:
        """By what has run."""
        return Speed(self._seconds / self._work, REACH * self._longest) if self._work else Speed()


@dataclass(frozen=True)
class Backlog:
    """The prompts that prefill workers have not run. They take turns: a prompt waits for no more of a longer one than
    it is long itself.

    Attributes:
        prompts: tokens of each.
        num_workers: that run them.
        speed: of a worker.
    """

    prompts: Sequence[float] = ()
    num_workers: int = 1
    speed: Speed = Speed()

    def seconds(self, own: float, others_s: float = 0.0) -> float:
        """How long a prompt of `own` tokens takes that is given to a worker once others that take so long have been, as
        far as that is known; 0 where nothing is run: what nothing proves wrong keeps nobody out."""
        if not self.prompts:
            return 0.0
        return (self._ahead_s(own) + others_s) / self.num_workers + self.speed.seconds(own)

    def has_room(self, own: float) -> bool:
        """Whether a prompt of `own` tokens should be given to a worker now, rather than wait where turns are fair."""
        ahead_s = self._ahead_s(own) / self.num_workers
        return ahead_s <= AHEAD_S or len(self.prompts) < PROMPTS_AHEAD * self.num_workers

    def _ahead_s(self, own: float) -> float:
        """How long a prompt of `own` tokens waits for others, on one worker."""
        return sum(self.speed.seconds(min(tokens, own)) for tokens in self.prompts)
