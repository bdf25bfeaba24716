"""Figures and goals against numpy, and against what can be counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsluice.errors import InvalidRequest
from kvsluice.loadtest import goals
from kvsluice.loadtest.figures import by_recipe, measure
from kvsluice.loadtest.outcomes import CANCELLED, DEADLINE, FAILED, SHED, ClientHealth, LogHistogram, Recording, open_at

durations = st.lists(st.floats(1e-5, 1e4), min_size=1, max_size=300)
percents = st.floats(0.1, 100)


@settings(deadline=None, max_examples=50)
@given(durations, percents)
def test_the_histogram_is_within_a_percent_of_the_value_at_that_rank(values, percent):
    histogram = LogHistogram()
    for value in values:
        histogram.add(value)
    exact = np.percentile(values, percent, method="inverted_cdf")
    assert histogram.percentile(percent) == pytest.approx(exact, rel=0.01)
    assert histogram.mean_s == pytest.approx(np.mean(values))
    assert sum(count for _, count in histogram.filled()) == len(values)


def test_the_histogram_takes_any_duration_in_the_same_memory():
    histogram = LogHistogram()
    for value in (0.0, 1e-12, 1e9):
        histogram.add(value)
    assert len(histogram.counts) == LogHistogram.NUM
    assert histogram.total == 3
    assert LogHistogram().percentile(50) is None


@settings(deadline=None, max_examples=50)
@given(durations, percents)
def test_percentiles_are_numpys_where_nothing_failed(values, percent):
    assert goals.percentile(sorted(values), percent) == pytest.approx(np.percentile(values, percent), rel=1e-9)


def recording(outcomes) -> Recording:
    return Recording(ClientHealth(0.05), list(outcomes))


def test_figures_have_the_names_and_meanings_of_vllms_benchmark(outcome):
    served = [outcome(i, arrival_s=i, ttft_s=0.1 * (i + 1), tpot_s=0.01 * (i + 1)) for i in range(10)]
    others = [outcome(10, 3.0, status=FAILED, error="WorkerLost"), outcome(11, 4.0, status=SHED)]
    warm_up = outcome(12, -5.0, ttft_s=99, warm_up=True)
    figures = measure(recording([*others, *served, warm_up]), {"ttft": 0.35}, (50.0, 99.0))
    ttfts = 100 * np.arange(1, 11)
    assert figures["mean_ttft_ms"] == pytest.approx(ttfts.mean())
    assert figures["std_ttft_ms"] == pytest.approx(ttfts.std())
    assert figures["p99_ttft_ms"] == pytest.approx(np.percentile(ttfts, 99))
    # ten gaps behind the first token of eleven
    assert figures["median_tpot_ms"] == pytest.approx(55)
    assert figures["mean_e2el_ms"] == pytest.approx(np.mean(ttfts + 100 * np.arange(1, 11)))
    assert figures["duration"] == pytest.approx(9 + 1 + 1)
    assert figures["request_throughput"] == pytest.approx(10 / 11)
    assert figures["request_goodput"] == pytest.approx(3 / 11)
    assert figures["output_throughput"] == pytest.approx(110 / 11)
    assert figures["total_token_throughput"] == pytest.approx(190 / 11)
    assert (figures["completed"], figures["counts"]["failed"], figures["counts"]["shed"]) == (10, 1, 1)
    assert figures["errors"] == {"WorkerLost": 1}
    assert figures["num_warmups"] == 1
    assert "request_goodput" not in measure(recording(served), {})


def test_recipes_are_told_apart_where_there_are_several(outcome):
    both = recording([outcome(0, recipe="exact", ttft_s=0.4), outcome(1, recipe="fast"), outcome(2, recipe="fast")])
    found = by_recipe(both)
    assert {name: figures["completed"] for name, figures in found.items()} == {"exact": 1, "fast": 2}
    assert found["exact"]["mean_ttft_ms"] == pytest.approx(400)
    assert by_recipe(recording([outcome()])) == {}


def test_an_empty_run_has_figures_too():
    figures = measure(recording([]), {"ttft": 1.0})
    assert (figures["completed"], figures["duration"], figures["request_goodput"]) == (0, 0.0, 0.0)


def test_open_requests_are_counted_between_when_they_were_due_and_their_end(outcome):
    run = [outcome(0, 0.0, ttft_s=5, tokens=1), outcome(1, 2.0, ttft_s=1, tokens=1)]
    assert open_at(run, [-1, 0, 2.5, 3.5, 6]) == [0, 1, 2, 1, 0]


def verdicts(slo, outcomes, itl=None):
    return [(one.value, one.is_met) for one in goals.judge(goals.parse_slo(slo), outcomes, itl or LogHistogram())]


def test_goals_are_met_up_to_their_bound(outcome):
    run = [outcome(i, ttft_s=0.1 * (i + 1), tokens=1) for i in range(10)]
    assert verdicts("ttft_p50=550ms,ttft_mean=0.54s,ttft_p100=1s", run) == [
        (pytest.approx(0.55), True), (pytest.approx(0.55), False), (pytest.approx(1.0), True),
    ]  # fmt: skip
    # answers of one token say nothing of the time between tokens, and nothing measured meets no goal
    assert verdicts("tpot_p99=1s,itl_p50=1s", run) == [(None, False), (None, False)]


def test_what_failed_took_for_ever_and_what_was_cancelled_does_not_count(outcome):
    run = [outcome(i) for i in range(90)] + [outcome(90 + i, status=SHED) for i in range(9)]
    run += [outcome(99, status=DEADLINE)] + [outcome(100 + i, status=CANCELLED) for i in range(50)]
    (p80, ok80), (p95, ok95), (errors, met) = verdicts("e2el_p80=1s,e2el_p95=1000s,errors=10%", run)
    assert (p80, ok80) == (pytest.approx(0.2), True)
    assert (p95, ok95) == (math.inf, False)
    assert (errors, met) == (pytest.approx(0.1), True)
    assert verdicts("ttft_mean=9s", run) == [(math.inf, False)]
    assert verdicts("errors=0", [outcome(status=CANCELLED)]) == [(None, False)]


def test_a_good_request_keeps_the_bound_of_the_highest_percentile(outcome):
    slo = goals.parse_slo("ttft_p50=100ms,ttft_p99=2s,ttft_mean=0.1s,tpot_p90=15ms,errors=1%")
    bounds = goals.request_bounds(slo)
    assert bounds == {"ttft": 2.0, "tpot": pytest.approx(0.015)}
    assert goals.is_good(outcome(ttft_s=1.9), bounds)
    assert not goals.is_good(outcome(ttft_s=2.1), bounds)
    assert not goals.is_good(outcome(tpot_s=0.02), bounds)
    assert goals.is_good(outcome(tokens=1), bounds)
    assert not goals.is_good(outcome(status=FAILED), bounds)
    assert goals.parse_goodput(["ttft:2000 tpot:50", "e2el:9e3"]) == {"ttft": 2.0, "tpot": 0.05, "e2el": 9.0}


@pytest.mark.parametrize(
    "text",
    ["ttft", "ttft_p99", "ttft_p99=2", "ttft_p0.0001=2s", "ttft_p101=1s", "foo_p99=1s", "ttft_p99=-1s", "errors=x",
     "ttft_p99=2s,ttft_p99=3s", ",", "ttft_p99=9999999s"],
)  # fmt: skip
def test_what_is_no_goal_is_refused(text):
    with pytest.raises(InvalidRequest, match=r"--slo.*allowed"):
        goals.parse_slo(text)


@pytest.mark.parametrize("text", ["ttft", "itl:5", "ttft:-1", "ttft:nan", "ttft:inf"])
def test_what_is_no_bound_of_a_request_is_refused(text):
    with pytest.raises(InvalidRequest, match=r"--goodput.*allowed"):
        goals.parse_goodput([text])
