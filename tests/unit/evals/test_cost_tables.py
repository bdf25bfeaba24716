"""Scores by cost and by turn: what tables say and plots show."""

from __future__ import annotations

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from kvsluice.compression.recipe import get_recipe
from kvsluice.evals import cost_tables
from kvsluice.evals.cost_plots import TurnScore, accuracy_by_turn
from kvsluice.evals.overview import overview_rows, turn_rows
from kvsluice.evals.recorded import Run
from kvsluice.evals.results import AVERAGE, Cell, EvalResults, EvaluatedModel, EvaluatedRecipe
from kvsluice.evals.statistics import over_turns, summarize
from kvsluice.evals.turn_tasks import NUM_TURNS

LABELS = ("exact", "fastkv", "kivi")
FLOPS = {"exact": 8e9, "fastkv": 4e9, "kivi": 8e9}
WHERE = {"commit": "abc123", "hardware": {"cpu": "a CPU", "cores": 2}}


def scores_of(label: str, turn: int) -> tuple[float, ...]:
    """Four samples: `exact` is right on three in every turn, `fastkv` on one more than `exact` and then on none."""
    right = {"exact": 3, "fastkv": 4 if turn == 1 else 0, "kivi": 3 if turn < NUM_TURNS else 2}[label]
    return tuple([1.0] * right + [0.0] * (4 - right))


@pytest.fixture(scope="module")
def run() -> Run:
    cells = [
        Cell(label, 2048, task, None, scores_of(label, turn), 1900.0, 5e5, 4e5, 1e6, 0, None, FLOPS[label], turn)
        for label in LABELS
        for task in ("state", "many_numbers")
        for turn in range(1, NUM_TURNS + 1)
    ]
    recipes = {}
    for label in LABELS:
        slots = json.loads(get_recipe(label).to_json())
        recipes[label] = EvaluatedRecipe(slots.pop("name"), "e" * 64, slots)
    settings = {"contexts": [2048], "samples": 4, "seed": 0, "tasks": ["state", "many_numbers"], "texts": {}}
    model = EvaluatedModel("a-model", "f" * 64, None, "float32")
    results = EvalResults(WHERE, "multiturn", model, settings, recipes, tuple(cells), summarize(cells))
    return Run("multiturn", results)


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def texts(svg: str) -> list[str]:
    # written here from numbers alone, so nothing in it can be hostile
    found = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")  # noqa: S314
    return [element.text or "" for element in found]


def test_each_turn_has_its_mean_and_the_last_is_held_against_the_first(run):
    text = cost_tables.turn_scores(run)
    header, _, *rows = rows_of(text)
    assert header[1] == "turn 1 [95 %]" and header[-1] == "last − first [95 %]"
    by_label = {row[0]: row[1:] for row in rows[:3]}
    assert [cell[:5] for cell in by_label["`fastkv`"][:5]] == ["1.000", *["0.000"] * 4]
    assert by_label["`fastkv`"][5] == "−1.000 [−1.000, −1.000]"
    assert by_label["`exact`"][5] == "0.000 [0.000, 0.000]"
    assert by_label["`kivi`"][5].startswith("−0.250 [")
    differences = {row[0]: row[1:] for row in rows[5:]}
    assert differences["`fastkv`"][0].startswith("+0.250 [") and differences["`fastkv`"][4].startswith("−0.750 [")
    assert "--suite multiturn" in text and "--task state,many_numbers" in text


def test_summaries_are_of_all_turns_of_each_turn_and_of_each_task(run):
    assert run.summary("fastkv", 2048).mean == pytest.approx(1 / NUM_TURNS)
    assert run.summary("fastkv", 2048, turn=1).mean == 1.0
    assert run.summary("fastkv", 2048, "state").mean == pytest.approx(1 / NUM_TURNS)
    assert run.summary("fastkv", 2048, "state", turn=2).mean == 0.0
    first = run.summary("fastkv", 2048, AVERAGE, 1)
    assert (first.difference, run.summary("exact", 2048, turn=1).difference) == (0.25, 0.0)


def test_turns_of_a_sample_are_resampled_together():
    """A sample that is right in every turn, one that is wrong in every turn: no turn lies above another."""
    cells = [Cell("a", 512, "state", None, (1.0, 0.0), 1, 1, 1, 1, 0, turn=turn) for turn in (1, 2, 3)]
    found = over_turns(cells)
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)


def test_the_closing_table_counts_a_conversation_once(run):
    rows = {row[0]: row for row in overview_rows(run.results, 2048)}
    assert list(rows) == list(LABELS)
    assert rows["fastkv"][3:6] == ("0.500", "0.500", "0.400")
    fallen = [replace(cell, fallbacks=2 if cell.recipe == "kivi" else 0) for cell in run.results.cells]
    (row,) = [row for row in overview_rows(replace(run.results, cells=tuple(fallen)), 2048) if row[0] == "kivi"]
    assert row[-1] == "4 of 8"
    by_turn = {row[0]: row[1:] for row in turn_rows(run.results, 2048)}
    assert by_turn["fastkv"][0].startswith("1.000 [") and by_turn["fastkv"][-1] == "-1.000 [-1.000, -1.000]"


def test_where_there_is_one_turn_there_are_no_rows_of_turns(run):
    cells = [replace(cell, turn=None) for cell in run.results.cells if cell.turn == 1]
    single = replace(run.results, cells=tuple(cells), summary=summarize(cells))
    assert list(turn_rows(single, 2048)) == []
    assert len(single.summary) == len(LABELS) * 3


def test_plots_name_every_recipe_for_each_cost_and_turn(run):
    costs, turns = texts(cost_tables.costs_plot(run)), texts(cost_tables.turns_plot(run))
    assert [costs.count(label) for label in LABELS] == [2, 2, 2]
    assert {"floating-point operations of prefill ÷ those of exact", "0.5", "2,048 tokens"} <= set(costs)
    assert {*LABELS, "turn", "1", "5"} <= set(turns)
    assert cost_tables.costs_plot(run) == cost_tables.costs_plot(run)


@pytest.mark.parametrize("flops", [None, 8e9])
def test_costs_are_worth_a_plot_where_they_are_known_and_differ(run, flops):
    cells = [replace(cell, prefill_flops=flops) for cell in run.results.cells]
    assert cost_tables.costs_differ(run)
    assert not cost_tables.costs_differ(Run("x", replace(run.results, cells=tuple(cells))))


def test_more_recipes_than_colours_are_told_apart_by_their_lines():
    scores = {512: {f"r{i}": [TurnScore(0.5, 0.4, 0.6)] * 2 for i in range(8)}}
    assert "stroke-dasharray" in accuracy_by_turn(scores, "t")
