"""When requests arrive: renewal processes whose rate may change over time, from a seed.

Gaps are drawn for a process of rate 1 and carried over to the clock by the inverse of the cumulative rate, so that a
ramp keeps the burstiness of its gaps, and a Poisson process under a changing rate is exactly one (time rescaling;
Cox and Lewis 1966).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from ..errors import InvalidRequest

if TYPE_CHECKING:
    import numpy as np

RATES = "a number above 0, inf (all at once), or a ramp of RATE@SECONDS, such as 1@0,10@60,2@90"
MAX_RATE = 1e6  # requests a second
_POINT = re.compile(r"\s*([0-9.eE+-]+)\s*@\s*([0-9.eE+-]+)\s*s?\s*")


@dataclass(frozen=True)
class RateProfile:
    """Requests a second over time: linear between points, constant behind the last.

    Attributes:
        times_s: of the points, from 0, rising.
        rates: requests a second at the points; the last is above 0. One point of rate inf: all at once.
    """

    times_s: tuple[float, ...]
    rates: tuple[float, ...]

    @classmethod
    def constant(cls, rate: float) -> RateProfile:
        """The same rate for ever."""
        return cls((0.0,), (rate,))

    @property
    def at_once(self) -> bool:
        return math.isinf(self.rates[0])

    def time_of(self, count: float) -> float:
        """When the expected number of arrivals reaches `count`, in seconds."""
        if self.at_once:
            return 0.0
        left = count
        for place in range(len(self.times_s) - 1):
            length_s = self.times_s[place + 1] - self.times_s[place]
            begin, end = self.rates[place], self.rates[place + 1]
            inside = (begin + end) / 2 * length_s
            if left < inside:
                return self.times_s[place] + _within(left, begin, (end - begin) / length_s)
            left -= inside
        return self.times_s[-1] + left / self.rates[-1]


def _within(count: float, rate: float, slope: float) -> float:
    """The time t at which rate·t + slope·t²/2 = count; this form of the root loses no digits at a small slope."""
    # a ramp may begin with rate 0, where the first request of an even process is due at once
    return 0.0 if count == 0 else 2 * count / (rate + math.sqrt(max(0.0, rate * rate + 2 * slope * count)))


def parse_rate(text: str, option: str = "--request-rate") -> RateProfile:
    """A rate as it is typed.

    Raises:
        InvalidRequest: it is none.
    """
    text = text.strip()
    if "@" not in text:
        rate = _number(text, option)
        if not 0 < rate <= MAX_RATE and rate != math.inf:
            raise InvalidRequest(option, f"got {text[:64]!r}", RATES)
        return RateProfile.constant(rate)
    points = []
    for part in text.split(","):
        found = _POINT.fullmatch(part)
        if found is None:
            raise InvalidRequest(option, f"{part[:64]!r} is no point of a ramp", RATES)
        points.append((_number(found[2], option), _number(found[1], option)))
    times = tuple(time for time, _ in points)
    rates = tuple(rate for _, rate in points)
    if times[0] != 0 or any(late <= early for early, late in pairwise(times)):
        raise InvalidRequest(option, "the times of a ramp begin with 0 and rise", RATES)
    if any(not 0 <= rate <= MAX_RATE for rate in rates) or not all(map(math.isfinite, times)) or rates[-1] <= 0:
        raise InvalidRequest(option, f"rates of a ramp lie in [0, {MAX_RATE:g}], and the last above 0", RATES)
    return RateProfile(times, rates)


def _number(text: str, option: str) -> float:
    try:
        value = float(text)
    except ValueError as exc:
        raise InvalidRequest(option, f"got {text[:64]!r}", RATES) from exc
    if math.isnan(value):
        raise InvalidRequest(option, f"got {text[:64]!r}", RATES)
    return value


def arrival_times(profile: RateProfile, burstiness: float, generator: np.random.Generator) -> Iterator[float]:
    """Endless times of arrival in seconds, not falling.

    Args:
        burstiness: shape of the gamma distribution of gaps: 1 = Poisson, below 1 = bursts, above 1 = more even,
            inf = equal gaps, the first request arriving at once.
    """
    count = 0.0
    if math.isinf(burstiness):
        while True:
            yield profile.time_of(count)
            count += 1.0
    while True:
        count += float(generator.gamma(burstiness, 1.0 / burstiness))
        yield profile.time_of(count)
