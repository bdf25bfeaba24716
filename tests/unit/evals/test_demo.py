"""The demo's questions and how it counts and shows answers."""

from __future__ import annotations

import io
import json
import re
import zlib
from dataclasses import replace

import pytest
from rich.console import Console

from kvsluice.evals import demo
from kvsluice.evals.demo_prompt import NUM_FACTS, DemoQuestion, demo_questions
from kvsluice.evals.tasks import needle_text


def encode(text: str) -> list[int]:
    return [zlib.crc32(piece.encode()) % 50_000 for piece in re.findall(r"<\|\w+\|>|\d|\w+|\s|[^\w\s]", text)]


@pytest.fixture(scope="module")
def questions() -> list[DemoQuestion]:
    return demo_questions(encode, 2000)


def test_questions_share_one_document_of_the_length_asked_for(questions):
    documents = {tuple(question.prompt_ids[200:1900]) for question in questions[:3]}
    assert len(documents) == 1
    assert all(2000 < len(question.prompt_ids) < 2000 + 250 for question in questions)


def test_every_asked_value_is_hidden_once_and_asked_once(questions):
    values = [value for question in questions for value in question.values]
    assert len(set(values)) == len(values) <= NUM_FACTS
    document = " ".join(map(str, questions[0].prompt_ids))
    for value in values:
        needle = encode(needle_text("number", "x", value))[-10:]
        assert document.count(" ".join(map(str, needle))) == 1


def test_the_demo_is_the_same_every_time(questions):
    assert demo_questions(encode, 2000) == questions
    assert demo_questions(encode, 2000, seed=1) != questions


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("11, 22, 33", 3),
        ("11, 99, 33", 2),
        ("22, 11, 33", 1),
        ("11", 1),
        ("", 0),
        ("11, 22, 33, 44", 3),
        ("11 22 33", 0),
    ],
)
def test_values_count_where_they_stand_in_place(answer, right):
    assert DemoQuestion("?", [], ["11", "22", "33"]).num_right(answer) == right


def make_run(recipe: str, text: str) -> demo.RecipeRun:
    answer = demo.Answer("What?", ["11"], text, int(text == "11"), 4000, 9, 2.0, 0.5)
    slow = replace(answer, time_to_first_token_s=4.0)
    return demo.RecipeRun(recipe, recipe, "", [answer, slow], 1_000_000, 8_000_000, 2_000_000)


def test_a_run_adds_up():
    run = make_run("exact", "11")
    assert (run.num_right, run.num_asked) == (2, 2)
    assert run.time_to_first_token_s == 3.0
    assert run.tokens_per_s == 16.0
    assert run.shipped_share == 0.125


def test_wrong_answers_stay_in_what_is_shown():
    console = Console(file=io.StringIO(), width=120)
    runs = [make_run("exact", "11"), make_run("fastkv", "12")]
    console.print(demo.table(runs))
    for line in demo.answer_lines(runs):
        console.print(line)
    shown = console.file.getvalue()
    assert "0 of 2" in shown
    assert "fastkv (fast)" in shown
    assert "last 8 rows" in " ".join(shown.split())
    assert re.search(r"fastkv +wrong +12", shown)


def test_without_a_wrong_answer_none_is_explained():
    assert demo.why_wrong([make_run("exact", "12"), make_run("fastkv", "11")]) == ""


def test_recipes_are_shown_with_their_presets():
    assert [demo.label(name) for name in demo.RECIPES] == ["exact", "fastkv (fast)", "sluice (balanced)"]


def test_results_hold_the_numbers_of_the_table():
    runs = [make_run("sluice", "11")]
    results = json.loads(json.dumps(demo.to_json(runs)))
    assert demo.from_json(results) == runs
    assert results["recipes"][0]["shipped_share"] == 0.125
    assert results["recipes"][0]["answers"][0]["text"] == "11"
