"""Arrival processes against what is known of them."""

from __future__ import annotations

import math
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsluice.errors import InvalidRequest
from kvsluice.loadtest.arrivals import RateProfile, arrival_times, parse_rate

NUM = 20_000


def times(profile: RateProfile, burstiness: float, num: int = NUM, seed: int = 3) -> list[float]:
    return list(islice(arrival_times(profile, burstiness, np.random.default_rng(seed)), num))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_gamma_distributions_mean_and_deviation(burstiness):
    gaps = np.diff(times(RateProfile.constant(5.0), burstiness))
    deviation = 0.2 / math.sqrt(burstiness)
    # five standard errors of the mean; the deviation's own error is below 5 % at these counts
    assert abs(gaps.mean() - 0.2) < 5 * deviation / math.sqrt(NUM)
    assert gaps.std() == pytest.approx(deviation, rel=0.05)


def test_a_poisson_process_has_as_much_variance_as_mean_in_every_window():
    counts = np.bincount(np.array(times(RateProfile.constant(10.0), 1.0)).astype(int))[:-1]
    assert counts.mean() == pytest.approx(10.0, rel=0.03)
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=5 * math.sqrt(2 / len(counts)))


def test_equal_gaps_and_all_at_once():
    assert times(RateProfile.constant(4.0), math.inf, 4) == [0.0, 0.25, 0.5, 0.75]
    assert times(parse_rate("inf"), 1.0, 5) == [0.0] * 5


def test_a_ramp_has_its_rate_at_every_time():
    arrived = np.array(times(parse_rate("0@0, 40@100, 40@200, 10@300s"), 1.0, 9000))
    # areas under the profile: 1000 up to 50 s, see below; a Poisson count deviates by its root
    for begin, end, area in [(0, 50, 500), (50, 100, 1500), (100, 200, 4000), (200, 300, 2500)]:
        seen = np.count_nonzero((arrived >= begin) & (arrived < end))
        assert abs(seen - area) < 5 * math.sqrt(area)
    behind = arrived[arrived > 300]
    assert len(behind) > 100
    assert np.diff(behind).mean() == pytest.approx(0.1, rel=5 / math.sqrt(len(behind)))


points = st.lists(st.tuples(st.floats(0.01, 1e3), st.floats(0.0, 1e4)), min_size=1, max_size=6).map(
    lambda parts: RateProfile(
        (0.0, *np.cumsum([gap for gap, _ in parts]).tolist()),
        (1.0, *(rate for _, rate in parts[:-1]), parts[-1][1] + 0.1),
    )
)


@settings(deadline=None, max_examples=30)
@given(points, st.lists(st.floats(0.0, 1e6), min_size=2, max_size=20).map(sorted))
def test_time_inverts_the_area_under_any_profile(profile, counts):
    def area(time_s: float) -> float:
        inside = [t for t in profile.times_s if t < time_s]
        knots = [*inside, time_s]
        rates = np.interp(knots, profile.times_s, profile.rates)
        return float(np.trapezoid(rates, knots))

    reached = [profile.time_of(count) for count in counts]
    assert all(early <= late for early, late in pairwise(reached))
    for count, time_s in zip(counts, reached, strict=True):
        # a plateau of rate 0 has many times of one area
        assert area(time_s) == pytest.approx(count, rel=1e-6, abs=1e-6)


def test_a_seed_gives_the_same_arrivals_and_another_one_others():
    assert times(parse_rate("3"), 0.5, 50) == times(parse_rate("3"), 0.5, 50)
    assert times(parse_rate("3"), 0.5, 50) != times(parse_rate("3"), 0.5, 50, seed=4)


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "nan", "-inf", "1e9", "1@1", "1@0,2@0", "1@0,0@5", "1@0,x@2", "inf@0", "1@0,2@inf", "fast"]
)
def test_what_is_no_rate_is_refused_by_name(text):
    with pytest.raises(InvalidRequest, match=r"--request-rate.*allowed"):
        parse_rate(text)
