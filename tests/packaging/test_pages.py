"""Commands in the pages are run by a test, or say what they need; links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvsluice.tests.command_line import refusal
from kvsluice.tests.pages import NEEDS, ROOT, RUN, Command, commands, pages

COVERED = {  # beginning of a command -> a test that does the same
    "kvsluice serve": "integration/services/test_service.py::test_the_command_line_generates",
    "kvsluice generate --chat --durability": "faults/test_failover.py::test_streams_under_load_all_go_on",
    "kvsluice generate --chat --session": (
        "integration/services/test_sessions.py::test_turns_are_the_same_wherever_they_run"
    ),
    "kvsluice sessions": "integration/services/test_sessions.py::test_sessions_are_listed_and_deleted",
    "kvsluice bench decode": "unit/benchmarks/test_bench_runs.py::test_decode_measures_batches_and_hit_rates",
    "kvsluice loadtest compare": "unit/loadtest/test_reports.py::test_two_files_are_compared_in_a_table",
    "kvsluice loadtest": "unit/loadtest/test_reports.py::test_every_command_of_the_page_is_taken",
    "kvsluice calibrate": "unit/evals/test_calibration.py::test_the_command_writes_profile_report_and_plot",
    "kvsluice eval": "unit/evals/test_runner.py::test_a_run_writes_what_it_found",
    "python scripts/recipe_report.py": (
        "unit/evals/test_recipe_report.py::test_files_of_ones_own_become_a_page_of_their_own"
    ),
    "redis-server": "faults/test_failover.py::test_streams_under_load_all_go_on",
}
ALL = commands()


def cover(command: Command) -> str | None:
    text = " ".join(command.words)
    return next((test for beginning, test in COVERED.items() if text.startswith(beginning)), None)


def test_every_command_is_run_or_says_what_it_needs():
    open_ones = [
        str(command)
        for command in ALL
        if command.needs is None and not RUN.match(" ".join(command.words)) and cover(command) is None
    ]
    assert open_ones == [], "run them, name the test that does in COVERED, or mark them as tests/pages.py says"


def test_what_is_needed_is_one_of_the_known_things():
    assert [str(command) for command in ALL if command.needs not in (None, *NEEDS)] == []


def test_the_command_line_takes_every_one_of_ours():
    """Also those that need a GPU or a cluster: options may be renamed where nobody runs them."""
    ours = [command for command in ALL if command.words[0] == "kvsluice"]
    assert len(ours) > 20
    wrong = {str(command): refusal(command.words[1:]) for command in ours}
    assert {command: why for command, why in wrong.items() if why is not None} == {}


def test_make_has_every_target_that_a_page_names():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {command.words[1] for command in ALL if command.words[0] == "make"}
    assert named and named <= targets


@pytest.mark.parametrize("test", sorted(set(COVERED.values())), ids=lambda test: test.rpartition("/")[2])
def test_a_test_that_covers_is_there(test):
    path, _, name = test.partition("::")
    assert re.search(rf"^\s*(async )?def {name}\(", (ROOT / "tests" / path).read_text(), re.M)


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_the_readme_lists_every_page():
    readme = (ROOT / "README.md").read_text()
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f"(docs/{path.name})" not in readme] == []
