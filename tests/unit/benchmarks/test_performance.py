"""From files of the bench to the page about speed: which rows answer for which goal, and what is shown of them."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from kvsluice.benchmarks import performance
from kvsluice.benchmarks.bench_decode import STEP
from kvsluice.benchmarks.bench_prefill import BESIDE, FIRST_TOKEN
from kvsluice.benchmarks.bench_results import BenchModel, BenchResults, Floor, Limits, Row, Timing, save
from kvsluice.benchmarks.bench_service import BENCH, STREAMS
from kvsluice.benchmarks.bench_tiers import BY_TURNS, LOAD, WHOLE
from kvsluice.benchmarks.bench_tiers import WHAT as TURNS
from kvsluice.benchmarks.goals import GOALS, HUNDRED_K, LONG, MODEL
from kvsluice.benchmarks.performance import File

ROOT = Path(__file__).resolve().parents[3]
LIMITS = Limits(3e12, 7e14, 2e10, 5e10, 1 << 30, 8192)


def timed(median_s: float) -> Timing:
    return Timing(median_s, median_s, median_s, 5)


def step(side: str, batch: int, tokens_per_s: float, **conditions: object) -> Row:
    figures = {"tokens_per_s": tokens_per_s, "resident_bytes": 1.4e9, "resident_over_exact": 0.08}
    floor = Floor.of(LIMITS, 3e10)
    return Row(STEP, side, MODEL, "5" * 32, HUNDRED_K, batch, conditions, timed(0.03), None, floor, figures,
               parts={"matrix products": 0.02, "step_attention.attend": 0.01, "rope": 1e-5})  # fmt: skip


def first(side: str, median_s: float, **conditions: object) -> Row:
    figures = {"peak_bytes": 2e9, "tflop_per_s": 600.0}
    floor = Floor.of(LIMITS, 1e9, 5e15)
    return Row(FIRST_TOKEN, side, MODEL, "5" * 32, LONG, 1, conditions, timed(median_s), None, floor, figures)


def file_of(*rows: Row, gpu: str = "NVIDIA H100 80GB HBM3", part: str = "decode") -> File:
    environment = {"hardware": {"gpu": gpu} if gpu else {}, "commit": "abc", "libraries": {"torch": "2.11"}}
    model = BenchModel(MODEL, "0" * 32, "bfloat16", True)
    return File("bench_x", BenchResults(environment, part, (model,), {}, LIMITS, {}, rows))


def goal_lines(*files: File) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in performance.goals_table(files).splitlines()[2:]]
    return {cells[0]: cells for cells in lines}


def test_goals_take_the_rows_that_they_mean():
    largest = {"largest batch": True, "hit rate": 0.6}
    lines = goal_lines(
        file_of(
            step("sluice", 40, 1100.0, **largest),
            step("sluice", 40, 9999.0, **{**largest, "hit rate": 0.9}),
            step("sluice", 1, 50.0, **{"hit rate": 0.6}),
            step("exact", 3, 100.0, **{"largest batch": True}),
        ),
        file_of(first("exact", 22.0, copy_out=True), first("sluice-full", 11.0, copy_out=True), part="prefill"),
        file_of(first("exact", 10.5), first("sluice-full", 10.7), first("sluice", 5.9), part="prefill"),
    )
    assert lines["tokens/s at 124,928, largest batch, `sluice`"][-2:] == ["1,100", "floor"]
    assert lines["tokens/s at 124,928, largest batch, `exact`"][-2:] == ["100", "**neither**"]
    assert lines["bytes on the GPU for a sequence of 124,928 tokens, `sluice` over `exact`"][-2:] == ["0.08", "goal"]
    assert lines["first token of 130,000 tokens, `exact`, s"][-2:] == ["10.5", "floor"]
    share = next(cells for name, cells in lines.items() if name.startswith("packing and copying out"))
    assert share[-2:] == ["0.0476", "floor"]
    assert lines["the same, `fastkv`, s"][-1] == "not measured"
    assert lines["decode step at 124,928 tokens, `exact`, ms"][-1] == "not measured", "the batch was another"


def test_goals_are_of_one_gpu_and_one_model():
    wrong = step("exact", 3, 200.0, **{"largest batch": True})
    lines = goal_lines(file_of(wrong, gpu="NVIDIA H200"), file_of(replace(wrong, model="other")))
    assert {cells[-1] for cells in lines.values()} == {"not measured"}


def test_floors_lie_before_goals():
    for goal in GOALS:
        assert goal.is_met(goal.goal, goal.floor), goal.what


def test_tables_show_what_ran_and_what_did_not():
    failed = replace(step("exact", 9, 1.0), time=None, not_run="out of memory")
    text = performance.decode_table([file_of(step("sluice", 40, 1100.0, **{"hit rate": 0.6}), failed)])
    assert "| 40 × 124,928 | sluice `55555555` | 0.6 | 30 ms | 10 ms | 3.00 | 1,100 | 1.3 GiB | 0.080 |  |" in text
    assert "not run" in text and "out of memory" in text

    beside = Row(BESIDE, "sluice", MODEL, None, 131_072, 1, {"tokens": 1024}, timed(0.2), figures={"alone_s": 0.1})
    text = performance.prefill_table([file_of(first("exact", 10.5), beside, part="prefill")])
    assert "| 130,000 | exact `55555555` | 10.5 s | 7.14 s | 1.47 |  | 600 | 1.86 GiB |" in text
    assert "of 1,024 tokens beside one of 131,072 under `sluice` has its first token after 200 ms, alone after" in text

    figures = {"tokens_per_s": 950.0, "token_p99_s": 0.05, "mean_first_token_s": 10.0, "last_first_token_s": 30.0}
    streams = Row(STREAMS, "sluice", MODEL, None, 32_768, 32, {}, timed(0.03), None, None, figures, {BENCH: 0.95})
    text = performance.service_table([file_of(streams, part="service")])
    assert "| 32 × 32,768 | sluice | 950 | 0.95 | 30 ms | 50 ms | 10 s | 30 s |" in text
    assert goal_lines(file_of(streams))["tokens/s through gRPC over the decode engine's own"][-2:] == ["0.95", "goal"]

    kernel = Row("kernel: rope", "triton", MODEL, None, 8192, None, {}, timed(2e-5), None, Floor.of(LIMITS, 3e7), {},
                 {"reference": 4.0})  # fmt: skip
    text = performance.kernels_table([file_of(kernel, replace(kernel, side="reference"), part="kernels")])
    assert text.splitlines()[2:] == ["| `rope` | llama-3.1-8b | 8,192 | 20 µs | 10 µs | 0.50 | bandwidth | 4.00 |"]


def test_turns_are_shown_beside_what_needs_none():
    figures = {"tokens_per_s": 900.0, "sequences": 96.0, "moved_per_s_bytes": 4.2e9}
    ratios = {"1 ×, tokens/s": 0.89, f"{WHOLE}, tokens/s": 0.88}
    turns = Row(
        TURNS, "sluice", MODEL, None, 32_768, 24, {LOAD: 4, "where": BY_TURNS}, timed(0.02), None, None, figures, ratios
    )
    whole = replace(turns, conditions={LOAD: 4, "where": WHOLE})
    failed = replace(turns, conditions={LOAD: 8, "where": BY_TURNS}, time=None, not_run="out of memory")
    lines = performance.tiers_table([file_of(turns, whole, failed, part="tiers")]).splitlines()[2:]
    assert lines[0].startswith("| 4 × | sluice, 32,768 tokens, ") and lines[0].endswith(
        " | 96 | 24 | 900 | 0.89 | 0.88 | 4.2 |"
    )
    assert lines[1].startswith("| 8 × |") and "not run" in lines[1] and "out of memory" in lines[1]
    assert len(lines) == 2


def test_the_plot_names_bars_and_kinds_of_work():
    plot = performance.parts_plot([file_of(step("sluice", 40, 1100.0, **{"hit rate": 0.6}))], STEP)
    for text in ("sluice, 40 × 124,928, 0.6 hits", "matrix products", "step_attention.attend", "everything else"):
        assert text in plot
    assert ">rope<" not in plot, "too little to be seen"
    assert performance.parts_plot([file_of(first("exact", 1.0))], FIRST_TOKEN) == ""


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("performance_report", ROOT / "scripts" / "performance_report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


report = load_script()


@pytest.fixture
def tree(tmp_path):
    (tmp_path / report.PAGE).parent.mkdir(parents=True)
    (tmp_path / report.RESULTS).mkdir(parents=True)
    for page in (report.PAGE, report.STORE_PAGE):
        shutil.copy(ROOT / page, tmp_path / page)
    return tmp_path


def test_the_page_follows_the_results(tree, monkeypatch, capsys):
    def make(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["performance_report", *arguments])
        return report.main(tree)

    results = tree / report.RESULTS / "bench_decode.json"
    save(results, file_of(step("sluice", 40, 1100.0, **{"largest batch": True, "hit rate": 0.6})).results)
    assert make("--check") == 1
    assert make() == make("--check") == 0
    page = (tree / report.PAGE).read_text()
    assert "](images/bench_step.svg)" in page and "40 × 124,928, largest batch" in page
    assert (tree / "docs" / "images" / "bench_step.svg").is_file()
    results.unlink()
    capsys.readouterr()
    assert make("--check") == 1
    assert "bench_step.svg does not hold what benchmarks/results says" in capsys.readouterr().out
    assert make() == 0
    assert not (tree / "docs" / "images" / "bench_step.svg").exists()
    results.write_text("{")
    assert make() == 1
    assert "cannot read" in capsys.readouterr().err
