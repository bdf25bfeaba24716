"""The bench's streams against a running service: what its rows say, never how fast they are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvsluice.benchmarks.bench_decode import STEP
from kvsluice.benchmarks.bench_results import load, save
from kvsluice.benchmarks.bench_service import BENCH, request_options
from kvsluice.benchmarks.options import parse_options
from kvsluice.benchmarks.progress import Progress
from kvsluice.benchmarks.runner import run
from kvsluice.compression.recipe import get_recipe
from kvsluice.errors import InvalidRequest, KvsluiceError


def measure(service, **given):
    base = {
        "address": service.address,
        "model": "smollm2-135m-longctx",
        "context": "300",
        "batch": "2",
        "steps": "4",
        "warmup": "1",
        "new_tokens": "64",
        "device": "cpu",
    }
    return run(parse_options("service", base | given), Progress(lambda line: None))


def test_streams_are_counted_while_all_of_them_run(service, tmp_path):
    path = tmp_path / "service.json"
    results = measure(service, recipe="exact,kivi", json=str(path))
    assert load(path) == results
    assert [(row.side, row.context, row.batch) for row in results.rows] == [("exact", 300, 2), ("kivi", 300, 2)]
    for row in results.rows:
        assert row.not_run is None
        assert row.time.repeats >= 4
        assert row.figures["tokens_per_s"] > 0
        assert row.figures["token_p99_s"] >= row.time.median_s
        assert row.figures["last_first_token_s"] >= row.figures["mean_first_token_s"] > 0
        assert row.ratios == {}

    # the decode engine alone, as if it had been twice as fast, less so at another hit rate; and another model's
    ran = results.rows[0]
    alone = replace(ran, what=STEP, figures={"tokens_per_s": 2 * ran.figures["tokens_per_s"]})
    slower = replace(alone, figures=ran.figures, conditions={"hit rate": 0.0})
    other = replace(alone, model="other", figures={"tokens_per_s": 9 * ran.figures["tokens_per_s"]})
    save(path, replace(results, rows=(slower, alone, other)))
    both = tmp_path / "both.json"
    again = measure(service, recipe="exact,kivi", against=str(path), json=str(both))
    assert load(both) == again
    assert again.rows[1].ratios == {}
    expected = again.rows[0].figures["tokens_per_s"] / alone.figures["tokens_per_s"]
    assert again.rows[0].ratios == {BENCH: pytest.approx(expected)}


def test_answers_that_end_too_soon_are_a_row_that_says_so(service):
    (row,) = measure(service, new_tokens="3").rows
    assert "--new-tokens" in row.not_run


def test_what_cannot_be_compared_or_reached_is_refused(service, tmp_path):
    path = tmp_path / "service.json"
    measure(service, json=str(path))
    with pytest.raises(InvalidRequest, match=r"--against.*holds no decode steps; allowed: a file that"):
        measure(service, against=str(path))
    with pytest.raises(KvsluiceError, match=r"cannot reach 127\.0\.0\.1:1"):
        measure(service, address="127.0.0.1:1")


def test_a_recipe_is_asked_for_by_its_name_and_what_differs():
    assert request_options(get_recipe("balanced")) == {"recipe": "sluice", "slots": {}}
    varied = get_recipe("sluice", '{"value_codec": {"kind": "dense"}}')
    asked = request_options(varied)
    assert asked["recipe"] == "sluice" and asked["slots"].keys() == {"value_codec"}
    assert asked["slots"]["value_codec"]["kind"] == "dense"
