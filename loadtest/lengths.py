"""Distributions of lengths in tokens and of times in seconds, as options name them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import InvalidRequest

if TYPE_CHECKING:
    import numpy as np

FORMS = (
    "a number, uniform:LOW..HIGH, lognormal:MEAN,SIGMA (mean of the values, deviation of their logarithms), or "
    "empirical:FILE (a number a line)"
)
MAX_VALUE = 2**24
MAX_EMPIRICAL = 10_000_000


class Distribution(Protocol):
    """Draws numbers, in whatever unit the option has."""

    def draw(self, generator: np.random.Generator) -> float: ...


@dataclass(frozen=True)
class Fixed:
    """Always the same."""

    value: float

    def draw(self, generator: np.random.Generator) -> float:
        return self.value


@dataclass(frozen=True)
class Uniform:
    """Evenly between two ends."""

    low: float
    high: float

    def draw(self, generator: np.random.Generator) -> float:
        return float(generator.uniform(self.low, self.high))


@dataclass(frozen=True)
class Lognormal:
    """Few long, many short.

    Attributes:
        mean: of the values themselves.
        sigma: standard deviation of their logarithms.
    """

    mean: float
    sigma: float

    def draw(self, generator: np.random.Generator) -> float:
        return float(generator.lognormal(math.log(self.mean) - self.sigma**2 / 2, self.sigma))


@dataclass(frozen=True)
class Empirical:
    """One of the given values, each as likely as the others."""

    values: Sequence[float]

    def draw(self, generator: np.random.Generator) -> float:
        return float(self.values[int(generator.integers(len(self.values)))])


def draw_tokens(distribution: Distribution, generator: np.random.Generator) -> int:
    """A whole number of tokens, at least 1 and at most `MAX_VALUE`."""
    return max(1, min(MAX_VALUE, round(distribution.draw(generator))))


def parse_distribution(text: str, option: str, least: float = 0.0) -> Distribution:
    """A distribution as it is typed.

    Args:
        least: the smallest number that it may name.

    Raises:
        InvalidRequest: it is none, or its numbers lie outside [least, 2**24].
    """
    kind, colon, rest = text.strip().partition(":")
    if not colon:
        return Fixed(_number(kind, option, least))
    parse = _PARSERS.get(kind)
    if parse is None:
        raise InvalidRequest(option, f"{kind[:32]!r} is no distribution", FORMS)
    return parse(rest, option, least)


def _uniform(rest: str, option: str, least: float) -> Distribution:
    low, dots, high = rest.partition("..")
    if not dots:
        raise InvalidRequest(option, f"uniform:{rest[:64]}", FORMS)
    ends = _number(low, option, least), _number(high, option, least)
    if ends[0] > ends[1]:
        raise InvalidRequest(option, f"uniform:{rest[:64]} ends below its begin", FORMS)
    return Uniform(*ends)


def _lognormal(rest: str, option: str, least: float) -> Distribution:
    mean, comma, sigma = rest.partition(",")
    if not comma:
        raise InvalidRequest(option, f"lognormal:{rest[:64]}", FORMS)
    value, spread = _number(mean, option, least), _number(sigma, option, 0.0)
    if value <= 0 or spread > 5:
        raise InvalidRequest(option, f"lognormal:{rest[:64]}", f"{FORMS}; a mean above 0, a deviation of at most 5")
    return Lognormal(value, spread)


def _empirical(rest: str, option: str, least: float) -> Distribution:
    values = []
    try:
        with Path(rest).expanduser().open(encoding="utf-8") as lines:
            for place, line in enumerate(lines):
                if place >= MAX_EMPIRICAL:
                    raise InvalidRequest(option, f"{rest} is too long", f"at most {MAX_EMPIRICAL} lines")
                if line.strip():
                    values.append(_number(line.strip(), f"{option}, line {place + 1}", least))
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidRequest(option, f"cannot read {rest[:256]}", "a file with a number a line") from exc
    if not values:
        raise InvalidRequest(option, f"{rest[:256]} is empty", "a file with a number a line")
    return Empirical(tuple(values))


_PARSERS: Mapping[str, Callable[[str, str, float], Distribution]] = {
    "uniform": _uniform,
    "lognormal": _lognormal,
    "empirical": _empirical,
}


def _number(text: str, option: str, least: float) -> float:
    try:
        value = float(text)
    except ValueError as exc:
        raise InvalidRequest(option, f"got {text[:64]!r}", FORMS) from exc
    if not least <= value <= MAX_VALUE:
        raise InvalidRequest(option, f"got {text[:64]!r}", f"numbers from {least:g} to {MAX_VALUE}: {FORMS}")
    return value
