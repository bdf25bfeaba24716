"""The bootstrap against values that can be worked out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvsluice.evals.results import AVERAGE, Cell
from kvsluice.evals.statistics import NUM_RESAMPLES, beside, interval, paired, resampled_means, summarize


def cell(recipe: str, task: str, scores: list[float], depth: float | None = None) -> Cell:
    return Cell(recipe, 1024, task, depth, tuple(scores), 900.0, 10.0, 20.0, 40.0, 0)


def row(rows, recipe: str, task: str):
    (found,) = [one for one in rows if (one.recipe, one.task) == (recipe, task)]
    return found


def test_a_resample_draws_as_many_samples_as_there_are():
    counts = 7 * resampled_means(np.eye(7), "any")
    assert counts.shape == (7, NUM_RESAMPLES)
    np.testing.assert_array_equal(counts.sum(axis=0), 7)
    np.testing.assert_array_equal(counts, np.round(counts))
    np.testing.assert_array_equal(counts, 7 * resampled_means(np.eye(7), "any"))
    assert not np.array_equal(counts, 7 * resampled_means(np.eye(7), "other"))


def test_three_samples_have_the_interval_of_their_27_resamples():
    """One right answer of three: a resample holds 0 to 3 of it with probabilities 8, 12, 6 and 1 of 27, so 2.5 % lie
    below 0 right and the last 2.5 % at all right."""
    scores = np.array([0.0, 0.0, 1.0])
    found = interval(scores, resampled_means(scores, "x"))
    assert (found.mean, found.low, found.high) == (pytest.approx(1 / 3), 0.0, 1.0)


def test_many_samples_have_the_normal_interval():
    scores = np.random.default_rng(1).normal(size=400)
    found = interval(scores, resampled_means(scores, "x"))
    half = 1.96 * scores.std() / 20
    assert found.low == pytest.approx(scores.mean() - half, abs=0.01)
    assert found.high == pytest.approx(scores.mean() + half, abs=0.01)


def test_what_is_hard_about_a_sample_cancels_in_a_difference():
    exact = [0.0, 0.25, 0.5, 1.0]
    rows = summarize([cell("exact", "vt", exact), cell("b", "vt", [score - 0.125 for score in exact])])
    found = row(rows, "b", "vt")
    assert found.low < found.mean - 0.1
    assert (found.difference, found.difference_low, found.difference_high) == (-0.125, -0.125, -0.125)
    assert row(rows, "exact", "vt").difference == 0


def test_recipes_are_compared_over_the_samples_of_all_contexts():
    own = [cell("a", "vt", [1.0, 0.5]), replace(cell("a", "vt", [0.25, 1.0]), context=2048)]
    other = [replace(one, recipe="b", scores=tuple(score - 0.25 for score in one.scores)) for one in own]
    found = paired([*own, *other], "a", "b")
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)
    assert paired([*own, *other], "b", "a").mean == -0.25


def test_two_runs_are_compared_over_the_samples_that_both_have():
    own = [cell("a", "vt", [1.0, 0.5, 0.0]), cell("a", "quote", [0.75, 0.75]), cell("a", "state", [0.0])]
    other = [cell("a", "quote", [0.5, 0.5, 0.0]), cell("a", "vt", [0.75, 0.25])]
    found = beside(own, other)
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)


def test_the_average_is_that_of_the_tasks_whatever_their_samples():
    rows = summarize([cell("a", "vt", [1.0] * 9), cell("a", "quote", [0.0])])
    found = row(rows, "a", AVERAGE)
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)
    assert found.difference is None


def test_tasks_are_resampled_apart():
    """Two tasks of variance s^2 / n each: the mean of them has half the variance, not all of it."""
    scores = [0.0, 1.0] * 50
    rows = summarize([cell("a", "vt", scores), cell("a", "state", scores)])
    one, both = row(rows, "a", "vt"), row(rows, "a", AVERAGE)
    assert (both.high - both.low) / (one.high - one.low) == pytest.approx(0.5**0.5, abs=0.1)


def test_depths_share_their_samples_and_are_resampled_with_them():
    """The same answers at every depth say no more than those of one depth do."""
    scores = [0.0, 1.0] * 10
    rows = summarize([cell(name, "needle", scores, depth) for name in ("exact", "b") for depth in (0.0, 0.5, 1.0)])
    average, one = rows[0], rows[1]
    assert (average.task, one.depth) == (AVERAGE, 0.0)
    assert (average.low, average.high) == pytest.approx((one.low, one.high))


def test_depths_are_rows_of_their_own_and_enter_the_average():
    rows = summarize([cell("a", "needle", [1.0, 1.0], 0.0), cell("a", "needle", [0.0, 0.0], 1.0)])
    assert [(one.task, one.depth, one.mean) for one in rows] == [
        (AVERAGE, None, 0.5),
        ("needle", 0.0, 1.0),
        ("needle", 1.0, 0.0),
    ]
