"""A run gives the same results whatever interrupted it and however many processes shared it."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from kvsluice.errors import InvalidRequest, KvsluiceError
from kvsluice.evals import evaluator
from kvsluice.evals.against import agreement
from kvsluice.evals.overview import overview_rows, print_overview
from kvsluice.evals.results import AVERAGE, TokenDifference, load, save_json
from kvsluice.evals.runner import collect_cells, main, run
from kvsluice.evals.scoring import Scorer
from kvsluice.evals.workfile import WorkFile, work_path
from kvsluice.kernels import dispatch


@pytest.fixture
def counted(monkeypatch) -> list:
    """Units that were really run."""
    ran: list = []
    plain = evaluator.Evaluator.evaluate

    def evaluate(self, units):
        ran.extend(units)
        return plain(self, units)

    monkeypatch.setattr(evaluator.Evaluator, "evaluate", evaluate)
    return ran


def test_a_run_writes_what_it_found(options):
    chosen = options()
    results = run(chosen)
    assert load(chosen.json) == results
    assert results.environment["commit"] == "some-commit"
    assert results.settings["tasks"] == ["bible", "python", "debian"]
    assert [len(digest) for digest in results.settings["texts"].values()] == [64] * 3
    assert list(results.recipes) == ["exact", "kivi"]
    assert (results.model.dtype, results.model.adapter) == ("float32", None)
    assert len(results.cells) == 2 * 3
    exact, kivi = results.cells[0], results.cells[3]
    assert (exact.recipe, kivi.recipe, exact.task, kivi.task) == ("exact", "kivi", "bible", "bible")
    assert len(exact.scores) == 2
    assert exact.prompt_tokens == 300
    assert exact.payload_bytes > exact.bf16_bytes > kivi.payload_bytes > 0
    average = [row for row in results.summary if row.task == AVERAGE]
    assert [row.recipe for row in average] == ["exact", "kivi"]
    assert average[0].difference == 0
    assert average[1].difference != 0


@pytest.mark.parametrize(("kernels", "forced"), [("auto", None), ("reference", dispatch.REFERENCE)])
def test_operations_run_in_plain_torch_where_that_is_asked_for(options, monkeypatch, kernels, forced):
    seen = set()
    plain = Scorer.score

    def score(self, cases, *others):
        seen.add(dispatch._forced)
        return plain(self, cases, *others)

    monkeypatch.setattr(Scorer, "score", score)
    results = run(options(kernels=kernels))
    assert seen == {forced} and dispatch._forced is None
    assert results.settings["kernels"] == kernels


def test_needles_have_cells_for_every_depth(options):
    results = run(options(suite="niah", context="1000", depth="0,1", samples="1", json=None))
    assert [(cell.recipe, cell.depth) for cell in results.cells] == [
        ("exact", 0.0),
        ("exact", 1.0),
        ("kivi", 0.0),
        ("kivi", 1.0),
    ]
    assert results.settings["depths"] == [0.0, 1.0]


def test_a_conversation_has_cells_for_every_turn(options, capsys):
    chosen = options(
        suite="multiturn", recipe="exact,snapkv", context="2400", samples="2", task="numbers_in_noise,state"
    )
    results = run(chosen)
    assert load(chosen.json) == results
    assert results.settings["turns"] == 5
    expected = [(task, turn) for task in ("numbers_in_noise", "state") for turn in range(1, 6)]
    for label in ("exact", "snapkv"):
        own = [cell for cell in results.cells if cell.recipe == label]
        assert [(cell.task, cell.turn) for cell in own] == expected
        assert all(len(cell.scores) == 2 and cell.fallbacks == 0 for cell in own)
    exact, snapkv = (next(cell for cell in results.cells if cell.recipe == label) for label in ("exact", "snapkv"))
    assert exact.prefill_flops < snapkv.prefill_flops < 1.2 * exact.prefill_flops, "it scores its rows, too"
    assert snapkv.resident_bytes < 0.3 * exact.resident_bytes
    turns = [row.turn for row in results.summary if (row.recipe, row.task) == ("snapkv", AVERAGE)]
    assert turns == [None, 1, 2, 3, 4, 5]
    print_overview(results)
    assert "by turn" in capsys.readouterr().out
    assert run(chosen) == results, "from the work file"


def test_prompts_that_find_a_document_stand_beside_themselves_run_whole(options, capsys):
    chosen = options(
        suite="prefix", recipe="exact,fastkv,snapkv", context="2400", samples="2", task="uuids_in_text,state"
    )
    results = run(chosen)
    assert load(chosen.json) == results
    for label in ("exact", "fastkv", "snapkv"):
        cells = [cell for cell in results.cells if cell.recipe == label]
        assert [(one.task, one.turn) for one in cells] == [
            (task, turn) for task in ("uuids_in_text", "state") for turn in range(1, 6)
        ]
        first, later = [one for one in cells if one.turn == 1], [one for one in cells if one.turn != 1]
        assert [one.hit for one in first] == [None, None]
        assert {one.hit.unlike for one in later} == {0}, "a hit and a miss say the same"
        assert all(one.hit.cached_share > 0.5 for one in later)
    exact, fastkv = ([one.hit.flops_share for one in results.cells if one.recipe == label and one.hit]
                     for label in ("exact", "fastkv"))  # fmt: skip
    assert max(exact) < 0.5
    assert all(a < b for a, b in zip(exact, fastkv, strict=True)), "deep layers run for each question"
    print_overview(results)
    said = capsys.readouterr().out
    assert "0 of 16" in said and "found" in said
    assert run(chosen) == results, "from the work file"
    run_whole = run(options(suite="prefix", recipe="exact", context="2400", samples="2", task="state", json=None))
    own = [cell for cell in results.cells if (cell.recipe, cell.task) == ("exact", "state")]
    assert list(run_whole.cells) == own, "whatever else is asked"


def test_chunks_in_which_nothing_can_be_found_are_refused(options):
    with pytest.raises(InvalidRequest, match=r"--chunk-tokens: is more than the prompts have in common; allowed: less"):
        run(options(suite="prefix", recipe="exact", context="700", samples="1", task="state", chunk_tokens="640"))


def test_what_is_done_is_not_done_again(options, counted):
    chosen = options()
    first = run(chosen)
    assert len(counted) == 6
    assert run(chosen) == first
    assert len(counted) == 6
    run(replace(chosen, fresh=True))
    assert len(counted) == 12


def test_a_run_can_be_extended(options, counted):
    run(options(samples="1"))
    longer = run(options(samples="2"))
    assert len(counted) == 6
    assert longer == run(options(samples="2", fresh=True))


def test_a_line_that_was_cut_short_is_done_again(options, counted):
    chosen = options()
    first = run(chosen)
    work = work_path(chosen.json)
    work.write_bytes(work.read_bytes()[:-20])
    assert run(chosen) == first
    assert len(counted) == 7
    assert len(work.read_text().splitlines()) == 1 + 6


def test_a_killed_run_goes_on(options, tmp_path):
    chosen = options(samples="24")
    words = ["--suite", "ppl", "--model", chosen.model, "--texts", chosen.texts, "--recipe", "exact,kivi"]
    words += ["--context", "300", "--samples", "24", "--scored-tokens", "40", "--json", str(chosen.json)]
    words += ["--commit", "some-commit", "--processes", "2"]
    command = [sys.executable, "-P", "-m", "kvsluice.evals.runner", *words]
    work = work_path(chosen.json)
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and (not work.exists() or work.read_text().count("\n") < 4):
            time.sleep(0.01)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
    assert len(workers) >= 2
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    done = work.read_text().count("\n") - 1
    assert 3 <= done < 72
    results = run(chosen)
    again = run(replace(chosen, json=tmp_path / "whole.json"))
    assert replace(results, environment={}) == replace(again, environment={})


def test_processes_and_batches_change_nothing(options, tmp_path):
    alone = run(options())
    shared = run(options(json=str(tmp_path / "shared.json"), processes="2", batch="2"))
    assert shared == alone


def test_another_runs_work_is_refused_by_what_differs(options):
    run(options(samples="1"))
    with pytest.raises(InvalidRequest) as refused:
        run(options(samples="1", seed="4", recipe="exact"))
    said = refused.value.message
    assert "seed: 0 → 4" in said
    assert "recipes: " in said
    assert "model" not in said
    assert "--fresh" in said


def test_two_runs_do_not_share_a_work_file(tmp_path):
    path = tmp_path / "a.work.jsonl"
    held = WorkFile(path, {"seed": 0})
    with pytest.raises(InvalidRequest, match="another run writes"):
        WorkFile(path, {"seed": 0})
    held.close()
    WorkFile(path, {"seed": 0}).close()


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="--json: cannot write"):
        WorkFile(tmp_path / "file" / "a.work.jsonl", {"seed": 0})


@pytest.mark.parametrize(
    "text", [b"hello\nworld\n", b"no end of line", b'{"identity":{"seed":0}}\n\xff\xfe\n', b"\0\0\0"]
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "a.work.jsonl"
    path.write_bytes(text)
    with pytest.raises(InvalidRequest, match="is no work file"):
        WorkFile(path, {"seed": 0})
    assert path.read_bytes() == text


@pytest.mark.parametrize("torn", [b"", b'{"ide', b'{"identity":{"se', b'{"identity":{"seed":0}}\n{"con\xc3'])
def test_a_kill_leaves_a_file_that_can_be_gone_on_with(tmp_path, torn):
    path = tmp_path / "a.work.jsonl"
    path.write_bytes(torn)
    WorkFile(path, {"seed": 0}).close()
    assert path.read_text() == '{"identity":{"seed":0}}\n'


def test_a_full_disk_is_told_in_a_line(tmp_path, monkeypatch):
    work = WorkFile(tmp_path / "a.work.jsonl", {"seed": 0})

    def write(text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(work._file, "write", write)
    with pytest.raises(InvalidRequest, match=r"a\.work\.jsonl: No space left on device"):
        work.add({"context": 1, "sample": 0, "task": "vt", "depth": None})
    work.close()


def test_results_that_cannot_be_written_are_told_in_a_line(tmp_path):
    (tmp_path / "taken.json").mkdir()
    with pytest.raises(InvalidRequest, match=r"--json: cannot write .*taken\.json"):
        save_json(tmp_path / "taken.json", {})


def test_a_file_that_cannot_be_written_is_refused_before_the_model_is_read(options, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(evaluator, "load_model", lambda *_, **__: pytest.fail("the model was read"))
    with pytest.raises(InvalidRequest, match="--json: cannot write"):
        run(options(json=str(tmp_path / "file" / "a.json")))


def test_a_fault_ends_the_run_and_keeps_what_was_done(options, monkeypatch, capsys):
    chosen = options()
    plain, calls = Scorer.score, []

    def score(self, cases):
        calls.append(cases)
        if len(calls) == 3:
            raise KvsluiceError("the third sample")
        return plain(self, cases)

    monkeypatch.setattr(Scorer, "score", score)
    with pytest.raises(KvsluiceError, match="the third sample"):
        run(chosen)
    assert work_path(chosen.json).read_text().count("\n") == 1 + 2


def test_an_interrupted_run_says_how_to_go_on(options, monkeypatch, capsys):
    chosen = options()

    def interrupt(self, cases):
        raise KeyboardInterrupt

    monkeypatch.setattr(Scorer, "score", interrupt)
    words = ["--suite", "ppl", "--model", chosen.model, "--texts", chosen.texts, "--json", str(chosen.json)]
    assert main([*words, "--context", "300", "--scored-tokens", "40"]) == 130
    assert f"the same command goes on from {work_path(chosen.json)}" in capsys.readouterr().err


def test_cells_are_in_order_whatever_the_records_order():
    def record(sample: int, task: str) -> dict:
        outcome = {
            "turns": [float(sample)],
            "payload_bytes": 1,
            "resident_bytes": 2,
            "prefill_flops": 3.0,
            "fallback": "short" if sample else None,
        }
        places = {"context": 512, "sample": sample, "task": task, "depth": None}
        return places | {"prompt_tokens": 5, "bf16_bytes": 9, "outcomes": {"exact": outcome}}

    records = [record(sample, task) for sample in range(3) for task in ("vt", "quote")]
    cells = collect_cells(records, ["exact"], with_reference=False)
    assert [(cell.task, cell.scores, cell.fallbacks) for cell in cells] == [
        ("vt", (0.0, 1.0, 2.0), 2),
        ("quote", (0.0, 1.0, 2.0), 2),
    ]


def test_what_must_be_known_of_a_table_is_said(options, capsys):
    results = run(options(suite="niah", recipe="exact,sluice", context="600", depth="0.5", samples="1"))
    (cell,) = [cell for cell in results.cells if cell.recipe == "sluice"]
    assert (cell.fallbacks, bool(cell.fallback_reason)) == (1, True)
    print_overview(results)
    shown = capsys.readouterr()
    assert f"note: sluice ran exact on 1 of 1 samples at 600 tokens: {cell.fallback_reason}" in shown.out
    assert "note: 1 samples a task: intervals are too narrow to trust" in shown.out
    assert shown.err.startswith("eval: reading texts and the tokenizer\neval: loading ")


def test_fewer_samples_than_are_done_are_said_to_be_left_out(options, capsys):
    run(options(suite="niah", recipe="exact", context="600", depth="0,1", samples="2"))
    capsys.readouterr()
    results = run(options(suite="niah", recipe="exact", context="600", depth="0,1", samples="1"))
    assert [len(cell.scores) for cell in results.cells] == [1, 1]
    assert "2 samples that are done are not among those asked for" in capsys.readouterr().err


def test_transformers_stands_beside_the_recipes(options, capsys):
    results = run(options(against="transformers", recipe="exact", samples="1"))
    assert (results.against.samples, results.against.equal_scores, results.against.equal_tokens) == (3, 3, None)
    assert {cell.recipe for cell in results.cells} == {"exact", "transformers"}
    assert list(results.recipes) == ["exact"]
    exact, other = overview_rows(results, 300)
    assert exact[3:5] != other[3:5] == ("-", "-")
    print_overview(results)
    assert "equal scores on 3 of 3 samples" in capsys.readouterr().out


def test_where_exact_and_transformers_part_is_listed():
    def record(sample: int, difference: dict | None) -> dict:
        places = {"context": 512, "sample": sample, "task": "vt", "depth": None}
        score = 1.0 if difference is None else 0.0
        return places | {"outcomes": {"exact": {"score": 1.0}}, "reference": {"score": score, "difference": difference}}

    parted = {"token": 2, "answer": 5, "exact": 5, "transformers": 6, "gap": 0.125, "exact_gap": 0.125}
    found = agreement([record(0, None), record(1, parted)], "bfloat16", in_nats=False)
    assert (found.samples, found.equal_scores, found.equal_tokens) == (2, 1, 1)
    assert found.differences == (TokenDifference(512, "vt", None, 1, **parted),)


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"suite": "ruler"})])
def test_what_is_no_results_file_is_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match="kvsluice eval"):
        load(path)
