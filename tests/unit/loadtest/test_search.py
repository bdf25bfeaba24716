"""The search for the highest rate, against queues whose capacity is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvsluice.loadtest.arrivals import RateProfile
from kvsluice.loadtest.driver import Driver, Limits
from kvsluice.loadtest.goals import judge, parse_slo
from kvsluice.loadtest.lengths import Fixed
from kvsluice.loadtest.search import Found, Trial, find_max_rate
from kvsluice.loadtest.stationarity import is_stationary, kendall_tau
from kvsluice.loadtest.vocabulary import Vocabulary
from kvsluice.loadtest.workload import Lengths, Mix, Workload
from kvsluice.tests.unit.loadtest.queues import Queue
from kvsluice.tests.unit.loadtest.virtual_time import run


def poisson(rate: float, count: int, seed: int = 0, num_warmups: int = 0) -> Workload:
    source = Lengths(RateProfile.constant(rate), 1.0, Fixed(1), Fixed(1))
    return Workload(source, Mix(), Vocabulary.of_size(99), seed=seed, count=count, num_warmups=num_warmups)


def test_the_rate_that_an_mm1_queue_sustains_is_found():
    """The sojourn of M/M/1 is exponential with rate μ − λ, so its p90 is within x up to λ = μ − ln(10) / x."""
    capacity, bound_s = 200.0, 0.05
    goals = parse_slo(f"e2el_p90={bound_s}s")

    async def attempt(rate: float) -> Trial:
        seed = int(rate * 1000)
        door = Queue(1 / capacity, seed=seed)
        recording = await Driver(door, Limits(deadline_s=600.0)).run(poisson(rate, 1500, seed, num_warmups=200))
        met = all(one.is_met for one in judge(goals, recording.counted(), recording.itl))
        return Trial(rate, met, is_stationary(recording.counted()) is not False)

    async def main() -> Found:
        return await find_max_rate(attempt, 40.0, 1e4, 0.05, 20)

    found = run(main())
    assert found.max_rate == pytest.approx(capacity - math.log(10) / bound_s, rel=0.15)
    assert found.why == "close enough"
    assert found.above / found.max_rate <= 1.05
    # it went up by doubling, and knew a bound of either side before it closed in
    assert [trial.rate for trial in found.trials[:2]] == [40, 80]


@pytest.mark.parametrize(("factor", "stationary"), [(0.5, True), (0.8, True), (1.3, False), (3.0, False)])
def test_a_queue_above_its_capacity_never_comes_to_rest(factor, stationary):
    async def main(seed: int):
        recording = await Driver(Queue(0.01, seed=seed), Limits(deadline_s=1e4)).run(
            poisson(100 * factor, 600, seed, num_warmups=200)
        )
        return is_stationary(recording.counted())

    assert [run(main(seed)) for seed in (1, 2)] == [stationary] * 2


def test_too_few_requests_say_nothing_of_rest(outcome):
    assert is_stationary([outcome(i, arrival_s=i) for i in range(10)]) is None
    assert is_stationary([outcome(i) for i in range(100)]) is None
    assert is_stationary([outcome(i, arrival_s=i) for i in range(100)]) is True


def test_rank_correlation_has_its_ends():
    assert kendall_tau([1, 2, 3, 4]) == 1
    assert kendall_tau([4, 3, 2, 1]) == -1
    assert kendall_tau([1, 1, 1]) == 0
    assert abs(kendall_tau(np.random.default_rng(0).normal(size=400).tolist())) < 0.1


def search(passes, first=1.0, most=1000.0, tolerance=0.05, max_trials=30) -> Found:
    """With a verdict by rate: True, False, or a trial."""

    async def attempt(rate: float) -> Trial:
        verdict = passes(rate)
        return verdict if isinstance(verdict, Trial) else Trial(rate, verdict, True)

    return run(find_max_rate(attempt, first, most, tolerance, max_trials))


def test_the_search_closes_in_from_either_side_and_stops_within_its_bounds():
    for first in (1.0, 37.0, 900.0):
        found = search(lambda rate: rate <= 37.3, first)
        assert found.max_rate <= 37.3 < found.above <= 1.05 * found.max_rate
        assert len(found.trials) <= 16
    assert search(lambda rate: True).max_rate == 1000.0
    assert search(lambda rate: True).why == "the highest rate that was to be tried"
    nothing = search(lambda rate: False)
    assert (nothing.max_rate, nothing.why) == (None, "missed at the lowest rate")
    assert "none found" in nothing.shown
    few = search(lambda rate: rate <= 37.3, max_trials=3)
    assert (len(few.trials), few.max_rate, few.above, few.why) == (3, 4.0, None, "3 trials")


def test_a_trial_counts_only_at_rest_and_with_a_client_that_keeps_up():
    growing = search(lambda rate: Trial(rate, True, rate <= 10))
    assert growing.max_rate == pytest.approx(10, rel=0.05)
    assert any("still growing" in trial.shown for trial in growing.trials)
    busy = search(lambda rate: Trial(rate, True, True, None if rate <= 10 else "too busy"))
    assert busy.max_rate == pytest.approx(10, rel=0.05)
    assert busy.why == "the client cannot send more"
    ended = search(lambda rate: Trial(rate, True, True, interrupted=rate > 3))
    assert (ended.max_rate, ended.why) == (2.0, "interrupted")
