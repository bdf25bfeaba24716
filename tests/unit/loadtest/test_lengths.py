"""Distributions of lengths against their own moments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsluice.errors import InvalidRequest
from kvsluice.loadtest.lengths import draw_tokens, parse_distribution


def drawn(text: str, num: int = 20_000) -> np.ndarray:
    distribution, generator = parse_distribution(text, "--input-len", 1), np.random.default_rng(5)
    return np.array([distribution.draw(generator) for _ in range(num)])


def test_each_form_has_the_moments_that_its_name_says(tmp_path):
    assert set(drawn("64", 10)) == {64.0}
    uniform = drawn("uniform:100..300")
    assert (uniform.min() >= 100, uniform.max() <= 300) == (True, True)
    assert uniform.mean() == pytest.approx(200, rel=0.02)
    lognormal = drawn("lognormal:500,0.5")
    assert lognormal.mean() == pytest.approx(500, rel=0.03)
    assert np.log(lognormal).std() == pytest.approx(0.5, rel=0.03)
    (tmp_path / "lengths").write_text("10\n20\n\n20\n")
    empirical = drawn(f"empirical:{tmp_path / 'lengths'}")
    assert set(empirical) == {10.0, 20.0}
    assert empirical.mean() == pytest.approx(50 / 3, rel=0.03)


@settings(deadline=None, max_examples=50)
@given(st.floats(1, 2**24), st.floats(0, 5), st.integers(0, 2**32))
def test_drawn_lengths_are_whole_and_bounded_whatever_the_tail(mean, sigma, seed):
    distribution = parse_distribution(f"lognormal:{mean!r},{sigma!r}", "--output-len", 1)
    tokens = draw_tokens(distribution, np.random.default_rng(seed))
    assert isinstance(tokens, int)
    assert 1 <= tokens <= 2**24


@pytest.mark.parametrize(
    "text",
    ["", "0", "-3", "nan", "inf", "x", "uniform:5", "uniform:9..3", "lognormal:5", "lognormal:5,9", "zipf:3",
     "empirical:/no/such/file", "lognormal:0,1", "uniform:1..1e99"],
)  # fmt: skip
def test_what_is_no_distribution_is_refused_by_name(text):
    with pytest.raises(InvalidRequest, match=r"--input-len.*allowed"):
        parse_distribution(text, "--input-len", 1)


def test_an_empirical_file_names_the_line_at_fault(tmp_path):
    (tmp_path / "lengths").write_text("10\nmany\n")
    with pytest.raises(InvalidRequest, match="--input-len, line 2"):
        parse_distribution(f"empirical:{tmp_path / 'lengths'}", "--input-len", 1)
