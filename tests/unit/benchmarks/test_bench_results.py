"""Files of results come back as they were written, and nothing else does."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from kvsluice.benchmarks.bench_results import (
    BenchModel,
    BenchResults,
    Floor,
    Limits,
    Row,
    Timing,
    load,
    save,
)
from kvsluice.benchmarks.tables import figure, print_results, seconds
from kvsluice.benchmarks.timing import summarize
from kvsluice.errors import InvalidRequest
from kvsluice.evals.results import EvaluatedRecipe

LIMITS = Limits(3e12, 7e14, 2e10, None, 1 << 30, 8192)
RESULTS = BenchResults(
    environment={"commit": "abc", "hardware": {"gpu": "none"}},
    part="decode",
    models=(BenchModel("tiny", "0" * 32, "bfloat16", True),),
    settings={"batches": [1, None]},
    limits=LIMITS,
    recipes={"exact": EvaluatedRecipe("exact", "1" * 32, {"window": {"kind": "ends"}})},
    rows=(
        Row("decode step", "exact", "tiny", "1" * 32, 4096, 8, {"hit rate": 0.6}, Timing(0.1, 0.09, 0.2, 5), None,
            Floor.of(LIMITS, 3e10), {"tokens_per_s": 80.0}, {"transformers": 1.5}),
        Row("decode step", "transformers", "tiny", not_run="out of memory"),
    ),
)  # fmt: skip


def test_results_come_back(tmp_path):
    save(tmp_path / "deep" / "results.json", RESULTS)
    assert load(tmp_path / "deep" / "results.json") == RESULTS
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw.pop("limits"),
        lambda raw: raw.update(more=1),
        lambda raw: raw["rows"][0].update(speed=1),
        lambda raw: raw["rows"][0]["time"].pop("low_s"),
        lambda raw: raw.update(rows=3),
    ],
)
def test_what_is_no_results_file_is_refused(tmp_path, spoil):
    raw = asdict(RESULTS)
    spoil(raw)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(InvalidRequest, match="holds something else; allowed: a file that `kvsluice bench` wrote"):
        load(path)
    path.write_text("{")
    with pytest.raises(InvalidRequest, match="cannot read"):
        load(path)


def test_times_below_their_floor_are_pointed_out(capsys):
    print_results(RESULTS)
    assert "less than their floor" not in capsys.readouterr().out
    rows = (replace(RESULTS.rows[0], time=Timing(0.005, 0.005, 0.005, 5)), RESULTS.rows[1])
    print_results(replace(RESULTS, rows=rows))
    assert "1 rows took clearly less than their floor" in capsys.readouterr().out


def test_kinds_of_work_are_a_table_of_their_own(capsys):
    row = replace(RESULTS.rows[0], parts={"matrix products": 0.003, "step_attention.attend": 0.001})
    print_results(replace(RESULTS, rows=(row,)))
    shown = capsys.readouterr().out
    assert "by kind of work" in shown
    assert "75.0%" in shown and "25.0%" in shown and "3 ms" in shown


def test_quartiles():
    assert summarize([3.0]) == Timing(3.0, 3.0, 3.0, 1)
    assert summarize([4.0, 1.0, 3.0, 2.0, 5.0]) == Timing(3.0, 2.0, 4.0, 5)


def test_the_floor_is_the_later_limit():
    assert Floor.of(LIMITS, 3e12, 7e14 / 2) == Floor(1.0, "bandwidth", 3e12, 3.5e14)
    assert Floor.of(LIMITS, 3e9, 1.4e15) == Floor(2.0, "matrix product", 3e9, 1.4e15)
    assert Floor.between(LIMITS, 1e10) == Floor(1.0, "host bandwidth", 2e10)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("peak_bytes", 3 << 30, "3 GiB"),
        ("peak_bytes", 12.0, "12 B"),
        ("alone_s", 0.0021, "2.1 ms"),
        ("tokens_per_s", 123456.0, "123,456"),
        ("gb_per_s", 0.123456, "0.123"),
    ],
)
def test_figures_have_units(name, value, shown):
    assert figure(name, value) == shown


def test_seconds_have_a_digit_before_the_point():
    assert [seconds(value) for value in (2.0, 0.25, 3e-5, 1e-8)] == ["2 s", "250 ms", "30 µs", "0.01 µs"]
