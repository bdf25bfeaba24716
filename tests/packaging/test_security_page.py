"""docs/security.md has every row, and names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = (ROOT / "docs" / "security.md").read_text().partition("## What is tested")[2]
ROWS = {int(number): line for line in TABLE.splitlines() for number in re.findall(r"^\| (\d+) \|", line)}


@pytest.mark.parametrize("row", sorted(ROWS))
def test_the_tests_of_a_row_are_there(row):
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", ROWS[row])
    assert named
    for file, test in named:
        text = (ROOT / "tests" / file).read_text()
        assert not test or re.search(rf"^(async )?def {test}\(", text, re.MULTILINE), f"{file}::{test}"


def test_every_row_is_there():
    assert sorted(ROWS) == list(range(41, 56))
