"""Every part of the bench over a tiny model: what its rows say, never how fast they are."""

from __future__ import annotations

import pytest
import torch

from kvsluice import kernels
from kvsluice.benchmarks import baseline, bench_handoff, bench_kernels, bench_prefill, timing
from kvsluice.benchmarks.bench_results import load
from kvsluice.benchmarks.tables import print_results
from kvsluice.compression.recipe import get_recipe
from kvsluice.errors import InvalidRequest
from kvsluice.kernels.dispatch import REFERENCE, TRITON, forced


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    """The device's limits matter to no test here."""
    monkeypatch.setattr(timing, "CPU_COPY_BYTES", 1 << 16)
    monkeypatch.setattr(timing, "CPU_GEMM_SIZE", 16)


def named(results, side, **more):
    """The row of a side with these values."""
    (row,) = [r for r in results.rows if r.side == side and all(getattr(r, name) == v for name, v in more.items())]
    return row


def test_prefill_stands_beside_transformers(bench, tmp_path, capsys):
    path = tmp_path / "prefill.json"
    results = bench(
        "prefill",
        recipe="exact,sluice",
        selected="64",
        batch="1,3",
        baseline="transformers",
        copy_out=True,
        json=str(path),
    )
    assert load(path) == results
    assert results.environment["commit"] == "some-commit"
    assert results.models[0].name == "tiny"
    assert len(results.models[0].fingerprint) == 32
    assert len(results.rows) == 2 * (2 * 2 + 1)
    for batch in (1, 3):
        exact, sluice, other = (
            named(results, side, batch=batch, conditions={}) for side in ("exact", "sluice", "transformers")
        )
        copied = named(results, "exact", batch=batch, conditions={"copy_out": True})
        assert copied.ratios["exact"] == pytest.approx(exact.time.median_s / copied.time.median_s)
        assert exact.recipe_fingerprint == get_recipe("exact").fingerprint
        assert sluice.recipe_fingerprint == results.recipes["sluice"].fingerprint
        assert (other.recipe_fingerprint, other.context) == (None, 512)
        assert exact.figures["encoded_bytes"] == batch * 2 * 4 * 512 * 2 * 16 * 4
        assert sluice.figures["encoded_bytes"] < exact.figures["encoded_bytes"] / 4
        # the last layer's rows that nothing depends on are left out here, TSP's too, and transformers runs all
        assert sluice.floor.flops < exact.floor.flops < other.floor.flops
        assert exact.time.repeats == other.time.repeats == 2
        ratio = other.time.median_s / sluice.time.median_s
        assert sluice.ratios["transformers"] == pytest.approx(ratio)
        assert sluice.ratios["exact"] == pytest.approx(exact.time.median_s / sluice.time.median_s)
        assert exact.figures["peak_bytes"] > 512 * 64 * 4
    print_results(results)
    shown = capsys.readouterr().out
    assert "tiny: time to first token" in shown
    assert "limits measured here" in shown


def test_a_prompt_beside_a_long_one_waits_no_longer_than_the_long_one_takes(bench):
    results = bench("prefill", recipe="sluice", selected="64", beside="300", chunk_tokens="128")
    row = named(results, "sluice", what=bench_prefill.BESIDE)
    assert row.conditions == {"tokens": 300}
    assert row.figures["beside_over_alone"] == pytest.approx(row.time.median_s / row.figures["alone_s"])


def test_what_does_not_fit_is_a_row_that_says_so(bench, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(baseline, "prefill", fail)
    results = bench("prefill", baseline="transformers")
    assert named(results, "transformers").not_run == "out of memory"
    assert named(results, "exact").ratios == {}


def test_a_run_that_is_stopped_leaves_what_it_has_measured(bench, monkeypatch, tmp_path):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(baseline, "prefill", stop)
    path = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        bench("prefill", recipe="exact,kivi", baseline="transformers", json=str(path))
    left = load(path)
    assert [row.side for row in left.rows] == ["exact", "kivi"]
    assert all(row.time is not None for row in left.rows)


def test_decode_measures_batches_and_hit_rates(bench):
    results = bench(
        "decode",
        recipe="exact,shadowkv",
        variant=['few=shadowkv:{"retrieval":{"kind":"chunks","chunk":4,"outliers":2,"budget_tokens":64}}'],
        selected="64",
        batch="1,max",
        hit_rate="0,0.75",
        baseline="transformers",
        cache_gib="0.004",
    )
    assert [row.side for row in results.rows] == [*["exact", *["shadowkv"] * 2, *["few"] * 2] * 2, "transformers"]
    exact = named(results, "exact", batch=1)
    assert exact.figures["resident_over_exact"] == 1
    assert exact.figures["cache_read_bytes"] >= 2 * 4 * 512 * 2 * 16 * 4
    assert set(exact.ratios) == {"transformers, tokens/s"}
    most = [row for row in results.rows if "largest batch" in row.conditions]
    capacity = int(0.004 * 2**30)
    for row in most:
        reserved = row.figures["reserved_bytes"]
        assert row.batch * reserved <= capacity < (row.batch + 1) * reserved
        assert row.figures["resident_bytes"] <= reserved
        assert row.time.repeats == 3
    few = [row for row in most if row.side == "few"]
    assert [row.conditions["hit rate"] for row in few] == [0, 0.75]
    assert few[0].figures["resident_over_exact"] < 0.8
    assert few[0].batch > most[0].batch
    assert "exact, tokens/s" in few[0].ratios


@pytest.mark.acceptance
def test_values_in_host_memory_are_fetched_as_often_as_the_hit_rate_says(bench):
    """Through the batched kernels, under the interpreter."""
    with forced(TRITON):
        (row,) = bench(
            "decode", recipe="sluice-full", selected="64", hit_rate="0.75", kv_offloading_gib="0.01", steps="2"
        ).rows
    assert row.conditions["hit rate"] == 0.75
    # the first steps have filled the hot set, and each one after wants a quarter of its 16 chunks anew
    assert row.figures["hit_rate"] == pytest.approx(0.75)
    per_step = 4 * 2 * 16 // 4  # layers, KV heads
    assert row.figures["fetched_bytes"] == per_step * 4 * (8 + 2 * 2)
    assert row.figures["host_bytes"] > 0
    (near,) = bench("decode", recipe="sluice-full", selected="64").rows
    assert row.figures["resident_bytes"] < near.figures["resident_bytes"]


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("kvsluice.benchmarks.runner.measure_limits", None)
    (tmp_path / "file").touch()
    for path in ("/proc/nothing/x.json", f"{tmp_path}/file/x.json"):
        with pytest.raises(InvalidRequest, match=f"--json: cannot write {path}"):
            bench("decode", json=path)


def test_sequences_may_share_their_prompt(bench):
    apart, shared = (bench("decode", batch="3", share_prompt=share).rows[0] for share in (None, True))
    assert "shared prompt" not in apart.conditions
    assert shared.conditions["shared prompt"] is True
    assert shared.batch == apart.batch == 3
    assert shared.figures["resident_bytes"] < apart.figures["resident_bytes"]


def test_caches_may_be_filled_by_prefill(bench):
    row = bench("decode", recipe="kivi", kv="prefill").rows[0]
    assert row.conditions == {"kv": "prefill"}
    assert row.time.repeats == 3


def test_a_batch_that_does_not_fit_is_a_row_that_says_so(bench):
    row = bench("decode", batch="4000", cache_gib="0.001").rows[0]
    assert row.time is None
    assert row.not_run.startswith("4000 sequences may take")


def test_handoff_times_every_stage(bench):
    results = bench("handoff", recipe="exact,kivi")
    whats = [f"handoff: {stage}" for stage in (*bench_handoff.STAGES, bench_handoff.GRPC)]
    assert [row.what for row in results.rows] == whats * 2
    assert all(row.time is not None for row in results.rows)
    exact, kivi = (named(results, side, what="handoff: frames") for side in ("exact", "kivi"))
    assert exact.figures["encoded_over_bf16"] == 2  # float32
    assert 2 < exact.figures["frames_over_bf16"] < 2.1
    assert kivi.figures["frames_over_bf16"] < 1
    assert exact.figures["gb_per_s"] == pytest.approx(exact.figures["frame_bytes"] / exact.time.median_s / 1e9)


def test_handoff_without_grpc_says_so(bench, monkeypatch):
    plain = bench_handoff.absent_library
    monkeypatch.setattr(bench_handoff, "absent_library", lambda name: "grpc" if "grpc" in name else plain(name))
    results = bench("handoff")
    assert named(results, "exact", what="handoff: gRPC").not_run == "grpc is not installed"
    assert named(results, "exact", what="handoff: cache").time is not None


def test_kernels_have_a_case_for_what_is_there(bench, monkeypatch):
    results = bench("kernels", random_weights=None)
    ran = [row for row in results.rows if row.time is not None]
    assert {row.side for row in ran} == {REFERENCE}
    assert len(ran) > 20
    assert all(row.floor.bytes_moved > 0 and row.figures["share_of_limit"] > 0 for row in ran)
    rotated = named(results, REFERENCE, what="kernel: rope")
    assert rotated.floor.bytes_moved == 2 * 512 * 4 * 16 * 4 + 2 * 512 * 16 * 4
    assert results.recipes == {}
    assert results.models[0].fingerprint is None


def test_an_operation_without_a_case_is_named(bench, tmp_path, monkeypatch):
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "__init__.py").write_text("")
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    assert "later" in bench_kernels.uncovered()
    assert "rope" not in bench_kernels.uncovered()


def test_more_sequences_than_the_pool_holds_take_turns(bench):
    results = bench(
        "tiers",
        recipe="sluice-full",
        selected="64",
        load="1,2",
        kv_pool_gib="0.002",
        kv_offloading_gib="0.05",
        time_slice="3",
        most_rows="2",
        steps="2",
    )
    alone, by_turns, whole = results.rows
    assert [row.conditions["sequences ÷ pool"] for row in results.rows] == [1, 2, 2]
    assert [row.figures["sequences"] for row in results.rows] == [2, 4, 4]
    assert {row.batch for row in results.rows} == {2}
    assert by_turns.time.repeats == 6, "a slice of each"
    assert by_turns.figures["preemptions"] > 0 < by_turns.figures["moved_per_s_bytes"]
    assert alone.figures["tokens_per_step"] == 2 > by_turns.figures["tokens_per_step"] > 0
    rates = [row.figures["tokens_per_s"] for row in results.rows]
    assert by_turns.ratios == pytest.approx(
        {"1 ×, tokens/s": rates[1] / rates[0], "whole on the device, tokens/s": rates[1] / rates[2]}
    )
    assert alone.ratios == whole.ratios == {}


def test_what_host_memory_does_not_hold_is_a_row_that_says_so(bench):
    given = {"selected": "64", "load": "64", "kv_pool_gib": "0.002", "kv_offloading_gib": "0.002"}
    rows = bench("tiers", recipe="sluice-full", time_slice="1", most_rows="1", **given).rows
    assert len(rows) == 2 and all("--kv-offloading-gib leaves" in row.not_run for row in rows)
