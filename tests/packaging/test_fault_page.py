"""docs/faults.md names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = (ROOT / "docs" / "faults.md").read_text().partition("### What is injected")[2].partition("\n## ")[0]


def named() -> list[tuple[str, str]]:
    """(file, test) of every test that the table names; a name without a file is in the file named before it."""
    found, file = [], ""
    for path, test in re.findall(r"`([\w/.]*?)(?:::(\w+))?`", TABLE):
        if path.endswith(".py"):
            file = path
        if test:
            found.append((file, test))
    return found


@pytest.mark.parametrize(("file", "test"), named(), ids=lambda part: part.rpartition("/")[2])
def test_a_named_test_is_there(file, test):
    text = (ROOT / "tests" / file).read_text()
    assert re.search(rf"^\s*(async )?def {test}\(", text, re.MULTILINE)


def test_there_are_some():
    assert len(named()) > 30
