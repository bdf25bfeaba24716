"""Blocks are filled, whatever stood in them, and nothing else of a page is touched."""

from __future__ import annotations

import pytest

from kvsluice.evals.pages import block, filled, table

PAGE = "before\n<!-- a -->\nold\n<!-- end a -->\nbetween\n<!-- b c -->\n<!-- end b c -->\nafter\n"


def test_blocks_are_filled_and_the_rest_stays():
    made = filled(PAGE, {"a": "new\nlines", "b c": "more"}, "x.md")
    assert made == PAGE.replace("old", "new\nlines").replace("c -->\n<", "c -->\nmore\n<")
    assert filled(made, {"a": "new\nlines", "b c": "more"}, "x.md") == made
    assert block(made, "a", "x.md") == "new\nlines"


@pytest.mark.parametrize("page", ["", "<!-- a -->\nno end", "<!-- end a -->", PAGE.replace("<!-- a", "<!-- aa")])
def test_a_missing_block_is_named(page):
    with pytest.raises(ValueError, match=r"x\.md must hold a block <!-- a --> \.\.\. <!-- end a -->"):
        filled(page, {"a": "new"}, "x.md")


def test_numbers_stand_to_the_right():
    assert table(("name", "n"), [("a", "1")]).splitlines() == ["| name | n |", "| --- | ---: |", "| a | 1 |"]
