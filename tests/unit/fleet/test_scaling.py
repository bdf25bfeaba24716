"""Scaling by queue time and pressure, on a simulated clock: bursts, flapping, what is not known."""

from __future__ import annotations

import itertools

import pytest

from kvsluice.services.fleet.scaling import Sample, Scaler
from kvsluice.services.settings.cluster import ScalingTargets

TARGETS = ScalingTargets(
    target_queue_s=2, target_token_usage=0.8, tolerance=0.1, up_after_s=5, down_after_s=60, cooldown_s=10
)


class Simulation:
    """A group under samples a second apart."""

    def __init__(self, minimum=1, maximum=8, count=1):
        self.scaler = Scaler(minimum, maximum, TARGETS)
        self.count = count
        self.at_s = 0.0
        self.changes = []

    def run(self, seconds, queue_s=0.0, usage=0.0):
        for second in range(seconds):
            queue = queue_s(second, self.count) if callable(queue_s) else queue_s
            used = usage(second, self.count) if callable(usage) else usage
            count = self.scaler.decide(Sample(self.at_s, queue, used), self.count)
            if count != self.count:
                self.changes.append((self.at_s, count))
            self.count = count
            self.at_s += 1.0
        return self.count


def test_a_queue_that_lasts_makes_the_group_grow_and_one_that_does_not_leaves_it():
    one = Simulation()
    assert one.run(5, queue_s=30.0) == 1
    assert one.run(1) == 1
    assert one.run(4, queue_s=30.0) == 1
    assert one.run(2, queue_s=30.0) == 2


def test_growth_at_most_doubles_waits_for_its_effect_and_ends_at_the_maximum():
    one = Simulation(maximum=6)
    one.run(60, queue_s=1000.0, usage=1.0)
    assert [count for _, count in one.changes] == [2, 4, 6]
    times = [at_s for at_s, _ in one.changes]
    assert all(later - earlier >= TARGETS.cooldown_s for earlier, later in itertools.pairwise(times))


def test_pressure_gives_the_size_at_which_it_would_be_on_target():
    one = Simulation(count=4)
    # a fixed amount of work, 4.8 workers' worth
    one.run(300, usage=lambda second, count: min(1.0, 4.8 / count))
    assert one.count == 6


def test_a_group_shrinks_one_by_one_once_fewer_have_been_enough_for_long():
    one = Simulation(count=8)
    one.run(60, usage=0.1)
    assert one.count == 8
    one.run(2, usage=0.1)
    assert one.count == 7
    one.run(1000, usage=0.1)
    assert one.count == 1
    assert [count for _, count in one.changes] == [7, 6, 5, 4, 3, 2, 1]


def test_a_burst_in_the_quiet_time_begins_it_again():
    one = Simulation(count=4)
    one.run(50, usage=0.1)
    one.run(1, usage=0.9)
    assert one.run(58, usage=0.1) == 4
    assert one.run(4, usage=0.1) == 3


@pytest.mark.parametrize("period", [2, 7, 20, 45])
def test_load_that_swings_does_not_make_the_group_swing(period):
    """Work for 1.5 and for 3 workers in turn: the group settles at what the higher one needs."""
    one = Simulation(count=1)
    one.run(600, usage=lambda second, count: min(1.0, (3.0 if (second // period) % 2 else 1.5) / count))
    settled = len(one.changes)
    one.run(600, usage=lambda second, count: min(1.0, (3.0 if (second // period) % 2 else 1.5) / count))
    assert len(one.changes) == settled
    assert 2 <= one.count <= 4


def test_a_load_at_the_edge_is_left_alone():
    one = Simulation(count=4)
    for usage in (0.72, 0.8, 0.87, 0.75, 0.86):
        one.run(120, usage=usage)
    assert one.changes == []


def test_nothing_shrinks_while_something_is_not_known_and_a_known_queue_is_enough_to_grow():
    one = Simulation(count=4)
    assert one.run(600, queue_s=None, usage=None) == 4
    assert one.run(600, queue_s=None, usage=0.0) == 4
    assert one.run(600, queue_s=0.0, usage=None) == 4
    assert one.run(20, queue_s=9.0, usage=None) == 8


def test_metrics_that_go_missing_begin_the_quiet_time_again():
    one = Simulation(count=2)
    one.run(55, usage=0.0)
    one.run(10, queue_s=None, usage=None)
    assert one.run(50, usage=0.0) == 2
    assert one.run(15, usage=0.0) == 1


def test_sizes_outside_the_bounds_are_brought_inside_at_once():
    assert Scaler(2, 4, TARGETS).decide(Sample(0.0, None, None), 1) == 2
    assert Scaler(2, 4, TARGETS).decide(Sample(0.0, None, None), 9) == 4


def test_a_trace_of_load_in_a_loop_with_its_own_effect_settles_and_loses_nothing():
    """Work arrives, workers take 10 units a second each, what they do not take waits: a burst, then little."""
    one, backlog, worst = Simulation(maximum=4), 0.0, 0.0
    for second in range(900):
        arriving = 35.0 if 100 <= second < 400 else 5.0
        backlog = max(0.0, backlog + arriving - 10.0 * one.count)
        worst = max(worst, backlog)
        one.run(1, queue_s=backlog / (10.0 * one.count), usage=min(1.0, arriving / (10.0 * one.count)))
    assert max(count for _, count in one.changes) == 4
    assert (one.count, backlog) == (1, 0.0)
    assert worst < 600
    ups = [count for at_s, count in one.changes if at_s < 400]
    assert ups == sorted(ups)
