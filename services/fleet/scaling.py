"""How many workers a group needs. Pure policy over numbers and times: no clock of its own, no transport.

Two things are looked at. *Queue time*, how long requests wait for the group: above its target the group grows.
*Token pressure*, the share in use of what the group has (KV cache, or time at work): the group gets the size at which
the share would be the target's. Growth follows whichever asks for more, after `up_after_s` of asking, and at most
doubles; shrinking follows pressure alone, one worker at a time, and only where no smaller wish was ever exceeded for
`down_after_s`. After each change nothing happens for `cooldown_s`, so that the change can be seen first. What is not
known asks for nothing, and nothing shrinks while it is not.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from ..settings.cluster import ScalingTargets


@dataclass(frozen=True)
class Sample:
    """What is known of a group at one time.

    Attributes:
        at_s: monotonic seconds.
        queue_s: how long a request waits for the group; None = not known.
        usage: share of it in use, 0 to 1; None = not known.
    """

    at_s: float
    queue_s: float | None
    usage: float | None


class Scaler:
    """Decides for one group, from sample to sample.

    Args:
        minimum, maximum: of workers.
    """

    def __init__(self, minimum: int, maximum: int, targets: ScalingTargets) -> None:
        self._minimum, self._maximum, self._targets = minimum, maximum, targets
        self._wishes: deque[tuple[float, int]] = deque()
        self._changed_s = -math.inf
        self._more_since_s: float | None = None

    def decide(self, sample: Sample, count: int) -> int:
        """How many workers there should be from now on.

        Args:
            count: of workers that are wanted so far.
        """
        bounded = min(max(count, self._minimum), self._maximum)
        if bounded != count:
            self._change(sample.at_s)
            return bounded
        wish = self._wish(sample, count)
        self._note(sample.at_s, wish, count)
        if sample.at_s - self._changed_s < self._targets.cooldown_s:
            return count
        if self._more_since_s is not None and sample.at_s - self._more_since_s >= self._targets.up_after_s:
            self._change(sample.at_s)
            return min(self._maximum, 2 * max(1, count), wish)
        if self._fewer_would_do(sample.at_s, count):
            self._change(sample.at_s)
            return max(self._minimum, count - 1)
        return count

    def _wish(self, sample: Sample, count: int) -> int:
        """The size that this sample asks for; `count` where it is about right or not known."""
        targets, wish = self._targets, 0
        if sample.queue_s is not None and sample.queue_s > targets.target_queue_s * (1 + targets.tolerance):
            wish = math.ceil(max(1, count) * sample.queue_s / targets.target_queue_s)
        if sample.usage is None or sample.queue_s is None:
            return max(wish, count)
        off = sample.usage / targets.target_token_usage
        if off > 1 + targets.tolerance:
            wish = max(wish, math.ceil(count * off))
        else:
            # what the group would need with the tolerance to spare: a size that is left only to be taken again is none
            wish = max(wish, min(count, math.ceil(count * off * (1 + targets.tolerance))))
        return wish

    def _note(self, at_s: float, wish: int, count: int) -> None:
        if wish > count:
            self._more_since_s = at_s if self._more_since_s is None else self._more_since_s
        else:
            self._more_since_s = None
        self._wishes.append((at_s, wish))
        # one wish older than the window stays: it says that the window is covered
        while len(self._wishes) > 1 and self._wishes[1][0] <= at_s - self._targets.down_after_s:
            self._wishes.popleft()

    def _fewer_would_do(self, at_s: float, count: int) -> bool:
        covered = self._wishes[0][0] <= at_s - self._targets.down_after_s
        return covered and max(wish for _, wish in self._wishes) < count

    def _change(self, at_s: float) -> None:
        self._changed_s, self._more_since_s = at_s, None
        self._wishes.clear()
