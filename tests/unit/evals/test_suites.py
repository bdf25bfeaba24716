"""Samples are fixed by suite, seed, context and index; needles stand where they should."""

from __future__ import annotations

from random import Random

import pytest

from kvsluice.evals.suites import LEAST_CONTEXT, NeedleGrid, Perplexity, Ruler, Unit
from kvsluice.evals.tasks import SUITE, TaskMaker

DEPTHS = (0.0, 0.25, 0.5, 1.0)


@pytest.fixture
def niah(encode, topics) -> NeedleGrid:
    return NeedleGrid(encode, topics, 0, DEPTHS)


@pytest.mark.parametrize("task", SUITE)
def test_seed_zero_draws_the_samples_of_the_adapters_report(encode, topics, task):
    case = Ruler(encode, topics, 0).case(Unit(700, 3, task))
    sample = SUITE[task](TaskMaker(encode, list(topics.values())), Random(f"{task}7003"), 700 - 64)
    assert (case.prompt_ids, case.answer_ids) == (tuple(sample.prompt_ids), tuple(sample.answer_ids))
    assert case.rule == ("share" if task == "quote" else "all")


def test_another_seed_draws_other_samples(encode, topics):
    unit = Unit(500, 0, "niah_single_2")
    cases = [Ruler(encode, topics, seed).case(unit) for seed in (0, 1, 1, 2)]
    assert cases[1] == cases[2]
    assert len({case.prompt_ids for case in cases}) == 3


def test_a_needle_stands_at_its_depth_and_nothing_else_changes(encode, niah):
    cases = [niah.case(unit) for unit in niah.units([800], 1, niah.tasks())]
    marker = encode(" One of the special magic numbers")
    places = [find(marker, case.prompt_ids) for case in cases]
    first, last = places[0], places[-1]
    assert [(place - first) / (last - first) for place in places] == pytest.approx(DEPTHS, abs=0.005)
    assert len({case.answer_ids for case in cases}) == 1
    assert len({tuple(sorted(case.prompt_ids)) for case in cases}) == 1
    assert all(800 - 66 <= len(case.prompt_ids + case.answer_ids) <= 800 for case in cases)


def find(part: list[int], whole: tuple[int, ...]) -> int:
    (place,) = [i for i in range(len(whole)) if list(whole[i : i + len(part)]) == part]
    return place


def test_units_name_every_place_of_the_grid_once(niah):
    units = niah.units([512, 1024], 3, niah.tasks())
    assert len(set(units)) == len(units) == 2 * 3 * len(DEPTHS)
    assert [unit.context for unit in units] == sorted(unit.context for unit in units)


def test_perplexity_goes_on_with_the_text_where_the_context_ends():
    text = list(range(5000))
    case = Perplexity({"numbers": text}, 0, 30).case(Unit(400, 1, "numbers"))
    assert len(case.prompt_ids) == 400
    # one token is given, so that every judged one is predicted over the compressed cache
    assert len(case.answer_ids) == 31
    everything = case.prompt_ids + case.answer_ids
    assert everything == tuple(range(everything[0], everything[0] + 431))
    assert case.rule == "nll"


def test_a_text_that_is_just_long_enough_is_taken_whole():
    suite = Perplexity({"numbers": range(431)}, 0, 30)
    assert suite.case(Unit(400, 0, "numbers")).prompt_ids[0] == 0


def test_the_least_context_holds_a_task(encode, topics):
    case = Ruler(encode, topics, 0).case(Unit(LEAST_CONTEXT, 0, "niah_single_2"))
    assert len(case.prompt_ids + case.answer_ids) <= LEAST_CONTEXT
