"""What a comparison with kvpress says about given scores, and what it refuses; kvpress itself is not needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kvsluice.benchmarks import kvpress_side, peer_kvpress
from kvsluice.benchmarks.kvpress_match import NAMES, kept_rows, our_recipe
from kvsluice.benchmarks.peer_kvpress import argument_parser, collect, main, summarize
from kvsluice.compression.recipe import ModelShape, fill
from kvsluice.errors import InvalidRequest
from kvsluice.evals.suites import Unit

SHAPE = ModelShape(
    num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, max_position_embeddings=32_768, layer_windows=(None,) * 30
)


def record(sample: int, task: str, ours: float, kvpress: float, *, same: bool = True) -> dict[str, Any]:
    found = {"ours": ours, "kvpress": kvpress, "equal_tokens": same, "equal_rows": True}
    return {"context": 1024, "sample": sample, "task": task, "depth": None, "comparisons": {"snapkv": found}}


def rows_of(records: list[dict[str, Any]], *tasks: str) -> dict[str, dict[str, Any]]:
    return {row["task"]: row for row in summarize(collect(records, ["snapkv"], tasks))}


def test_samples_are_paired_and_tasks_averaged_whatever_the_order_of_records() -> None:
    records = [record(1, "b", 1.0, 1.0), record(0, "a", 1.0, 0.0, same=False)]
    records += [record(0, "b", 0.0, 0.0), record(1, "a", 1.0, 1.0)]
    cells = collect(records, ["snapkv"], ["a", "b"])
    assert [(cell.task, cell.ours, cell.kvpress) for cell in cells] == [
        ("a", (1.0, 1.0), (0.0, 1.0)),
        ("b", (0.0, 1.0), (0.0, 1.0)),
    ]
    rows = rows_of(records, "a", "b")
    assert (rows["average"]["ours"], rows["average"]["kvpress"], rows["average"]["difference"]) == (0.75, 0.5, 0.25)
    assert (rows["a"]["equal_tokens"], rows["average"]["equal_tokens"], rows["average"]["samples"]) == (1, 3, 4)


def test_equal_scores_agree_and_a_difference_in_every_sample_does_not() -> None:
    equal = [record(i, "a", float(i % 2), float(i % 2)) for i in range(8)]
    row = rows_of(equal, "a")["average"]
    assert (row["agrees"], row["low"], row["high"], row["reason"]) == (True, 0.0, 0.0, None)
    apart = [record(i, "a", 0.0, 1.0, same=False) for i in range(8)]
    row = rows_of(apart, "a")["average"]
    assert (row["agrees"], row["difference"], row["high"]) == (False, -1.0, -1.0)
    assert row["reason"] == peer_kvpress.REASONS["snapkv"]


def test_scores_that_are_as_good_but_not_the_same_agree() -> None:
    crossed = [record(i, "a", float(i % 2), float(1 - i % 2), same=False) for i in range(20)]
    row = rows_of(crossed, "a")["average"]
    assert row["agrees"] and row["low"] < 0.0 < row["high"]


@pytest.mark.parametrize("name", NAMES[1:])
def test_recipes_keep_the_share_that_is_asked_for(name: str) -> None:
    for share in (0.1, 0.25):
        kept = kept_rows(fill(our_recipe(name, share), SHAPE, {}), SHAPE, 8000, {})
        # streaming rounds up to a block of 16
        assert 8000 * share <= sum(kept) / len(kept) <= 8000 * share + 16


def test_a_prompt_that_is_too_short_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="snapkv"):
        kept_rows(fill(our_recipe("snapkv", 0.1), SHAPE, {}), SHAPE, 500, {})


@pytest.mark.parametrize("share", ["0", "0.5", "-1", "nan", "much"])
def test_shares_that_the_two_cannot_both_keep_are_refused(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        argument_parser().parse_args(["--share", share])
    assert "--share" in capsys.readouterr().err


def test_without_kvpress_the_command_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "kvpress", raising=False)
    monkeypatch.setattr(kvpress_side.importlib.util, "find_spec", lambda name: None)
    assert main(["--samples", "1", "--device", "cpu"]) == 1
    assert kvpress_side.INSTALL in capsys.readouterr().err


def test_a_run_goes_on_where_it_was_cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[Unit] = []
    limit = [3]
    about = {"peer": {}, "model": {}, "recipes": {}, "texts": {}}
    monkeypatch.setattr(peer_kvpress, "load_press", lambda module, name: None)
    monkeypatch.setattr(peer_kvpress, "described", lambda setup: dict(about))

    def run_units(setup: Any, units: list[Unit], num_processes: int) -> Any:
        for unit in units:
            if len(ran) == limit[0]:
                raise RuntimeError("cut off")
            ran.append(unit)
            yield record(unit.sample, unit.task, 1.0, 1.0)

    monkeypatch.setattr(peer_kvpress, "run_units", run_units)
    file = tmp_path / "peer.json"
    command = ["--comparison", "snapkv", "--task", "quote", "state", "--context", "1024", "--samples", "2"]
    command += ["--device", "cpu", "--json", str(file)]
    assert main(command) == 1
    assert not file.exists()
    limit[0] = 99
    assert main(command) == 0
    assert len(ran) == len(set(ran)) == 4, "nothing ran twice"
    results = json.loads(file.read_text())
    assert [cell["task"] for cell in results["cells"]] == ["quote", "state"]
    assert results["settings"]["samples"] == 2 and results["summary"][0]["samples"] == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--samples 0", "--samples: '0'; allowed: a whole number from 1 to"),
        ("--context 12", "--context: '12'; allowed: a whole number from 256 to 32768"),
        ("--processes 0", "--processes: '0'; allowed: a whole number from 1 to"),
        ("--seed -1", "--seed: "),
        ("--share nan", "--share: 'nan'; allowed: above 0 and at most 0.45"),
        ("--task vt vt", "--task: vt vt; allowed: values that differ"),
        ("--comparison dense dense", "--comparison: dense dense; allowed: values that differ"),
        ("--device tpu", "--device: 'tpu'; allowed: cpu"),
        ("--device cpu --json peer.txt", "--json: 'peer.txt'; allowed: a file whose name ends in .json"),
        ("--device cpu --json /dev/null/a.json", "--json: cannot write /dev/null/a.work.jsonl"),
    ],
)
def test_what_cannot_be_is_refused_by_name_before_a_model_is_read(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peer_kvpress, "load_press", lambda *_: pytest.fail("work began"))
    try:
        assert main(words.split()) == 1
    except SystemExit as ended:
        assert ended.code == 2
    assert said in capsys.readouterr().err.replace("argument --", "--")
