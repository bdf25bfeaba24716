"""The command that times hits beside misses, on a tiny model."""

from __future__ import annotations

import json

import pytest

from kvsluice.benchmarks import bench_prefix
from kvsluice.errors import InvalidRequest

SMALL = [
    "--model",
    "tiny",
    "--document-tokens",
    "300",
    "--question-tokens",
    "80",
    "--chunk-tokens",
    "32",
    "--rounds",
    "2",
]


@pytest.fixture
def tiny(monkeypatch, tiny_model) -> None:
    monkeypatch.setattr(bench_prefix, "load_model", lambda name, device: tiny_model)


def test_a_line_a_recipe_and_a_file_with_every_round(tiny, tmp_path, capsys) -> None:
    path = tmp_path / "out.json"
    bench_prefix.main([*SMALL, "--recipes", "exact", "fastkv", "--device", "cpu", "--out", str(path)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    written = json.loads(path.read_text())
    assert {"commit", "hardware"} <= set(written["environment"])
    assert [line["recipe"] for line in lines] == [one["effective"] for one in written["results"]] == ["exact", "fastkv"]
    for line, one in zip(lines, written["results"], strict=True):
        rounds = one.pop("rounds")
        assert line == one and len(rounds) == one["same_tokens"] == 2, "hits and misses drew the same"
        assert one["found_tokens"] == 288, "whole chunks of the document"
        assert all(min(r["fills_s"], r["hits_s"], r["alone_s"]) > 0 for r in rounds)


@pytest.mark.parametrize("name", ["--document-tokens", "--question-tokens", "--rounds", "--chunk-tokens"])
def test_nothing_is_no_size(tiny, name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name}.*at least 1"):
        bench_prefix.main([name, "0"])
