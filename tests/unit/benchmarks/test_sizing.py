"""The calculator against caches that exist, and against what was measured on a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvsluice.benchmarks import sizing
from kvsluice.benchmarks.bench_results import load
from kvsluice.benchmarks.sizing import GIB, Gpu, Load, make_plan, parameter_count
from kvsluice.errors import ConfigError, InvalidRecipe
from kvsluice.models.config import SHAPES
from kvsluice.models.weights import slots
from kvsluice.services import cli
from kvsluice.services.config import ServeConfig

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
MODEL = "llama-3.1-8b"
H100 = Gpu()


def plan(recipe: str = "sluice", context: int = 32_768, gpu: Gpu = H100, **load_of: object) -> sizing.Plan:
    return make_plan(MODEL, SHAPES[MODEL], recipe, Load(context, **load_of), gpu)  # type: ignore[arg-type]


def rows(name: str, what: str):
    return [row for row in load(RESULTS / f"{name}.json").rows if row.what == what and row.time and row.model == MODEL]


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_those_of_a_checkpoint(name: str) -> None:
    config = SHAPES[name]
    assert parameter_count(config) == sum(torch.Size(slot.shape).numel() for slot in slots(config).values())


@pytest.mark.parametrize(
    "row", rows("bench_prefill_h100", "time to first token"), ids=lambda r: f"{r.side}-{r.context}"
)
def test_prefill_is_what_was_measured(row) -> None:
    """Bytes to the byte; seconds within a tenth from 32,768 tokens on, within a third below, as the assumption says."""
    made = plan(row.side, row.context, new_tokens=512)
    assert made.sequence.handoff_bytes == row.figures["encoded_bytes"]
    slowest = 1.1 if row.context >= 32_768 else 1.5
    assert 1 / 1.1 < row.time.median_s / made.prefill_s < slowest
    assert row.figures["peak_bytes"] < sizing.PREFILL_WORK_BYTES


STEPS = [*rows("bench_decode_32k_h100", "decode step"), *rows("bench_decode_122k_h100", "decode step")]


@pytest.mark.parametrize("row", STEPS, ids=lambda r: f"{r.side}-{r.context}-{r.batch}-{r.conditions.get('hit rate')}")
def test_decode_is_what_was_measured(row) -> None:
    """A sequence's bytes hold what one took there, whose answer was shorter; a step of plain rows is within a tenth,
    one of packed rows takes what it took with the worst of hit rates, within a half."""
    made = plan(row.side, row.context, Gpu(host_bytes=4096 * GIB), new_tokens=512)
    assert row.figures["resident_bytes"] <= made.sequence.device_bytes * 1.01
    assert row.figures.get("host_bytes", 0) == made.sequence.host_bytes
    step_s = sizing._step_s(
        SHAPES[MODEL], made.resolved.recipe, made.sequence, made.weights_bytes, row.batch, Gpu(host_bytes=GIB)
    )
    least, most = (0.9, 1.1) if row.side == "exact" else (0.45, 1.5)
    assert least < row.time.median_s / step_s < most
    left = row.figures["peak_bytes"] - made.weights_bytes - row.batch * row.figures["resident_bytes"]
    assert left < sizing.DECODE_WORK_BYTES


def test_what_fits_is_what_the_worker_would_let_in() -> None:
    made = plan("exact")
    assert made.sequences_per_gpu * made.sequence.device_bytes <= made.cache_bytes
    assert (made.sequences_per_gpu + 1) * made.sequence.device_bytes > made.cache_bytes
    fewer = plan("exact", gpu=Gpu(memory_bytes=40 * GIB))
    assert fewer.sequences_per_gpu < made.sequences_per_gpu


def test_host_memory_bounds_what_runs_and_holds_what_waits() -> None:
    without, little, much = (plan(gpu=Gpu(host_bytes=size * GIB)) for size in (0, 10, 512))
    assert little.sequences_per_gpu == 10 * GIB // little.sequence.host_bytes < much.sequences_per_gpu
    assert without.sequences_per_gpu < much.sequences_per_gpu
    assert (without.parked_per_gpu, little.parked_per_gpu) == (0, 0) and much.parked_per_gpu > 0
    with pytest.raises(ConfigError, match=r"host_memory: .* allowed: 0, or at least"):
        plan(gpu=Gpu(host_bytes=1))


def test_the_best_split_is_first_and_bound_by_what_is_scarce() -> None:
    made = plan(num_gpus=8, new_tokens=512, network_bits_per_s=100e9)
    apart = made.splits[:-1]
    assert {one.prefill + one.decode for one in apart} == {8} and len(apart) == 7
    assert made.splits[-1].both == 8
    assert [one.requests_per_s for one in apart] == sorted((one.requests_per_s for one in apart), reverse=True)
    # one GPU more of the role that binds, and the other role binds or as much is reached
    best, by_prefill = apart[0], {one.prefill: one for one in apart}
    step = 1 if best.bound_by == "prefill" else -1
    assert by_prefill[best.prefill + step].bound_by != best.bound_by
    slow = plan("exact", num_gpus=8, network_bits_per_s=1e9)
    assert slow.splits[0].bound_by == "network" and slow.splits[0].requests_per_s == pytest.approx(4 / slow.handoff_s)


def test_concurrency_is_rounded_up_to_whole_gpus() -> None:
    made = plan("exact", concurrency=14, num_gpus=4)
    assert made.sequences_per_gpu == 13 and made.gpus_for_concurrency == 2
    assert made.store_bytes == 14 * made.sequence.store_bytes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"context": 131_072}, r"context: 131072 and 512 new tokens; allowed: at most 131072 together"),
        ({"gpu": Gpu(memory_bytes=16 * GIB)}, r"gpu_memory: 16 GiB hold no sequence of 32768 .* allowed: at least \d"),
    ],
)
def test_what_cannot_be_is_refused_by_name(arguments, said) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(**arguments)


def test_an_unknown_recipe_is_refused_with_the_names() -> None:
    with pytest.raises(InvalidRecipe, match="sluice"):
        plan("nope")


def test_a_short_prompt_runs_exact_and_the_plan_says_why() -> None:
    resolved = plan("sluice", context=64).resolved
    assert resolved.recipe.name == "exact" and resolved.fallback_reason is not None


def test_the_command_prints_a_plan_whose_settings_are_keys() -> None:
    runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
    arguments = ["plan", "--model", MODEL, "--context", "32768", "--gpus", "4", "--host-memory", "256"]
    done = runner.invoke(cli.app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert set(made["settings"]) <= set(ServeConfig.model_fields)
    ServeConfig.model_validate(made["settings"])
    shown = runner.invoke(cli.app, arguments).stdout
    assert f"--max-num-seqs {made['sequences_per_gpu']}" in shown
    assert all(f"assumed: {line}" in shown for line in made["assumptions"])
    assert made["load"]["num_gpus"] == 4 and made["gpu"]["host_bytes"] == 256 * GIB


def test_a_wrong_dtype_is_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["kvsluice", "plan", "--model", MODEL, "--context", "64", "--dtype", "int4"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "dtype: got 'int4'; allowed: bfloat16, float32" in capsys.readouterr().err
