"""The same numbers give the same picture, and every recipe can be told from the others."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import combinations
from xml.etree import ElementTree

import pytest

from kvsluice.evals.plots import STYLES, Box, Point, _best_box, accuracy_against_bytes, needle_maps

FAMILIES = ("kept", "dropped")
NAMES = ("exact", "fastkv", "snapkv", "pyramidkv", "streaming", "kivi")
POINTS = [
    Point(name, FAMILIES[name != "exact"], context, 1.0 if name == "exact" else 0.1, mean, mean - 0.02, mean + 0.02)
    for context in (8192, 16384)
    for name, mean in zip(NAMES, (0.9, 0.31, 0.3, 0.3, 0.1, 0.32), strict=True)
]
SCORES = {(name, context, depth / 4): depth / 4 for name in NAMES for context in (4096, 8192) for depth in range(5)}


def texts(svg: str) -> list[str]:
    # written here from numbers alone, so nothing in it can be hostile
    found = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")  # noqa: S314
    return [element.text or "" for element in found]


def test_every_point_is_named_in_every_panel():
    written = texts(accuracy_against_bytes(POINTS, FAMILIES, "a title"))
    assert [written.count(name) for name in NAMES] == [2] * len(NAMES)
    assert {"8,192 tokens", "16,384 tokens", "a title", *FAMILIES} <= set(written)


def test_a_family_keeps_its_colour_when_others_are_absent():
    only = accuracy_against_bytes([p for p in POINTS if p.family == "dropped"], FAMILIES, "t")
    assert STYLES[1][0].lower() in only.lower()
    assert STYLES[0][0].lower() not in only.lower()


def test_every_recipe_has_a_map_with_its_lengths_and_depths():
    written = texts(needle_maps(SCORES, NAMES, "a title"))
    assert {*NAMES, "4K", "8K", "0%", "100%"} <= set(written)


def test_places_without_a_score_are_drawn_as_such():
    """A NaN is no number of the format, and no colour of the map."""
    del (some := dict(SCORES))[("kivi", 8192, 0.5)]
    assert "nan" not in needle_maps(some, NAMES, "t").lower()
    assert needle_maps(some, NAMES, "t") != needle_maps(SCORES, NAMES, "t")


def test_the_same_numbers_give_the_same_file_whatever_the_process_and_the_users_settings(tmp_path):
    (tmp_path / "matplotlibrc").write_text("font.size: 20\naxes.grid: True\nsvg.fonttype: path\n")
    drawn = f"accuracy_against_bytes({POINTS!r}, {FAMILIES!r}, 't') + needle_maps({SCORES!r}, {NAMES!r}, 't')"
    program = f"from kvsluice.evals.plots import *\nprint({drawn}, end='')"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    here = accuracy_against_bytes(POINTS, FAMILIES, "t") + needle_maps(SCORES, NAMES, "t")
    assert done.stdout == here
    assert not re.search(r"\b20\d\d-\d\d-\d\d\b", here), "a date would change from day to day"


@pytest.mark.parametrize("spread", [0.0, 3.0, 9.0])
def test_labels_of_crowded_points_do_not_cover_each_other(spread):
    frame, taken, labels = Box(0, 0, 500, 280), [], []
    for place, name in enumerate(NAMES):
        x, y = 250.0 + spread * place, 140.0 - spread * place
        box, _ = _best_box(name, x, y, frame, taken)
        taken.append(box)
        labels.append(box)
        assert box.overlap(frame) == pytest.approx(box.width * box.height), "inside the panel"
    assert all(a.overlap(b) == 0 for a, b in combinations(labels, 2))
