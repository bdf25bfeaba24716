"""The command that times second turns beside first ones, on a tiny model."""

from __future__ import annotations

import json

import pytest

from kvsluice.benchmarks import bench_turn
from kvsluice.errors import InternalError, InvalidRequest

SMALL = ["--context", "1300", "--turn-tokens", "20", "--chunk-tokens", "128", "--rounds", "2", "--device", "cpu"]
SMALL += ["--capacity-gib", "0.05"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tiny_model) -> None:
    monkeypatch.setattr(bench_turn, "load_model", lambda name, device: tiny_model)
    monkeypatch.setattr(bench_turn, "load_profile", lambda name, shape: {"tsp_layer": 1, "tsp_rate": 0.3})


def test_a_line_a_recipe_and_a_file_with_every_round(tmp_path, capsys) -> None:
    path = tmp_path / "out.json"
    bench_turn.main([*SMALL, "--recipes", "exact", "sluice", "--out", str(path)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    written = json.loads(path.read_text())
    assert [line["recipe"] for line in lines] == ["exact", "sluice", "sluice with recall"]
    assert [line["effective"] for line in lines] == ["exact", "sluice", "sluice"]
    for line, one in zip(lines, written["results"], strict=True):
        rounds = one.pop("rounds")
        assert line == one and len(rounds) == 2
        assert all(min(r["first_s"], r["second_s"], r["again_s"]) > 0 for r in rounds)


def test_a_turn_whose_cache_is_not_there_is_no_measurement(monkeypatch) -> None:
    monkeypatch.setattr(bench_turn.DecodeEngine, "adopt", lambda *given: False)
    with pytest.raises(InternalError, match="was not kept"):
        bench_turn.main([*SMALL, "--recipes", "exact"])


def test_bad_lengths_are_named() -> None:
    with pytest.raises(InvalidRequest, match=r"--turn-tokens: is 0; allowed: at least 1"):
        bench_turn.main(["--turn-tokens", "0"])
