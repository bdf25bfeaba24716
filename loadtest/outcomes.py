"""What became of requests, in memory that does not grow with the length of answers."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

SERVED, SHED, DEADLINE, FAILED, CANCELLED, DROPPED = "served", "shed", "deadline", "failed", "cancelled", "dropped"
STATUSES = (SERVED, SHED, DEADLINE, FAILED, CANCELLED, DROPPED)
FAILURES = (SHED, DEADLINE, FAILED, DROPPED)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request. Times are seconds since the start of the run.

    Attributes:
        arrival_s: when it was due; latencies count from there, however late the client was.
        sent_s: when it left the client; None = it never did.
        first_s, last_s: when its first and last tokens came, or None.
        status: one of `STATUSES`: served to its end; shed by the service; past its deadline; failed otherwise;
            cancelled as planned; dropped by the client, which had too many open.
        error: type of the error, or "".
        late_s: between when it was due and when the client came to it.
        warm_up: left out of the figures.
        effective: the recipe that ran, or "" where the door does not tell.
    """

    index: int
    turn: int
    recipe: str
    arrival_s: float
    sent_s: float | None
    first_s: float | None
    last_s: float | None
    end_s: float
    status: str
    error: str
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    late_s: float
    warm_up: bool
    effective: str = ""

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.first_s is None else self.first_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token without the first; None for answers of one token."""
        if self.first_s is None or self.last_s is None or self.output_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.output_tokens - 1)

    @property
    def e2el_s(self) -> float:
        """End-to-end latency: until the terminal reply."""
        return self.end_s - self.arrival_s


class LogHistogram:
    """Counts of durations in buckets that grow by 1 %: percentiles within half a percent, in fixed memory."""

    LEAST_S, GROWTH, NUM = 1e-6, 1.01, 2600  # up to 48 hours

    def __init__(self) -> None:
        self.counts = [0] * self.NUM
        self.total = 0
        self.sum_s = 0.0

    def add(self, value_s: float) -> None:
        place = int(math.log(max(value_s, self.LEAST_S) / self.LEAST_S) / _LOG_GROWTH)
        self.counts[min(place, self.NUM - 1)] += 1
        self.total += 1
        self.sum_s += value_s

    @property
    def mean_s(self) -> float | None:
        return self.sum_s / self.total if self.total else None

    def percentile(self, percent: float) -> float | None:
        """The value that `percent` % lie at or below, or None when there is none."""
        if not self.total:
            return None
        rank = max(1, math.ceil(percent / 100 * self.total))
        place = bisect_left(list(accumulate(self.counts)), rank)
        return float(self.LEAST_S * self.GROWTH ** (place + 0.5))

    def filled(self) -> list[tuple[float, int]]:
        """The buckets that hold something: middle in seconds, count."""
        return [(self.LEAST_S * self.GROWTH ** (i + 0.5), count) for i, count in enumerate(self.counts) if count]


_LOG_GROWTH = math.log(LogHistogram.GROWTH)


@dataclass
class ClientHealth:
    """How well the client itself kept up.

    Attributes:
        late: requests that it came to more than `late_after_s` after they were due.
        most_late_s: the worst of them.
        lag_p99_s, most_lag_s: by how much later than asked the event loop woke up.
        busy_share: of one core, that the event loop's thread used.
        max_rss_bytes: the most memory that the client's process has had.
        dropped: requests that were never sent, because too many were open.
    """

    late_after_s: float
    late: int = 0
    of: int = 0
    most_late_s: float = 0.0
    lag_p99_s: float = 0.0
    most_lag_s: float = 0.0
    busy_share: float = 0.0
    max_rss_bytes: int = 0
    dropped: int = 0

    MOST_LATE_SHARE = 0.01
    MOST_BUSY_SHARE = 0.9

    def complaint(self) -> str | None:
        """Why the figures do not describe the service, or None."""
        if self.dropped:
            return f"{self.dropped} requests were never sent: too many were open at once (--max-open)"
        if self.of and self.late > self.MOST_LATE_SHARE * self.of:
            return (
                f"{self.late} of {self.of} requests were sent more than {1e3 * self.late_after_s:.0f} ms late, the "
                f"worst {1e3 * self.most_late_s:.0f} ms"
            )
        if self.busy_share > self.MOST_BUSY_SHARE:
            return f"the client's event loop used {self.busy_share:.0%} of its core"
        return None


@dataclass
class Recording:
    """What a run gathers while it goes on.

    Attributes:
        outcomes: in the order in which requests ended.
        itl: gaps between two messages with tokens of a request, of counted requests.
        tokens: answer tokens by the second they came in, since the start; warm-up included.
        left_out: requests that are longer than the model takes.
        interrupted: the run was ended before its time.
        most_open: requests that were open at once.
    """

    health: ClientHealth
    outcomes: list[Outcome] = field(default_factory=list)
    itl: LogHistogram = field(default_factory=LogHistogram)
    tokens: dict[int, int] = field(default_factory=dict)
    left_out: int = 0
    interrupted: bool = False
    most_open: int = 0
    closed_loop: bool = False

    def counted(self) -> list[Outcome]:
        """Outcomes without the warm-up's, in order of arrival."""
        return sorted((one for one in self.outcomes if not one.warm_up), key=lambda one: (one.arrival_s, one.index))


def open_at(outcomes: Sequence[Outcome], times_s: Sequence[float]) -> list[int]:
    """How many requests were due and had not ended at each time."""
    begins, ends = sorted(one.arrival_s for one in outcomes), sorted(one.end_s for one in outcomes)
    return [bisect_right(begins, time_s) - bisect_right(ends, time_s) for time_s in times_s]
