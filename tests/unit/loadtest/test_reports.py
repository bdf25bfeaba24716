"""What is told of a run: options, text, page, file, comparison."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from kvsluice.errors import InvalidRequest
from kvsluice.loadtest import runner
from kvsluice.loadtest.compare import compare, compare_files
from kvsluice.loadtest.html_report import page
from kvsluice.loadtest.options import LoadOptions, listed, parse_options
from kvsluice.loadtest.outcomes import FAILED, ClientHealth, Recording
from kvsluice.loadtest.results import LoadResults, load, save
from kvsluice.loadtest.runner import exit_status, summarize
from kvsluice.loadtest.text_report import report
from kvsluice.loadtest.vocabulary import Vocabulary
from kvsluice.services import cli
from kvsluice.tests.pages import commands


@pytest.fixture
def results(outcome):
    """Results of a run with these outcomes under these options."""

    def make(outcomes=None, health=None, model="m", **options) -> LoadResults:
        outcomes = [outcome(i, arrival_s=i) for i in range(40)] if outcomes is None else outcomes
        recording = Recording(health or ClientHealth(0.05), outcomes)
        for one in outcomes:
            recording.itl.add(one.tpot_s or 1.0)
            recording.tokens[int(one.end_s)] = 11
        given = parse_options(options)
        return LoadResults({"commit": "c"}, {"service": {"model": model}}, [summarize(recording, given, "5")])

    return make


def test_the_text_has_the_layout_of_vllms_benchmark(results, outcome):
    outcomes = [outcome(i, arrival_s=i) for i in range(40)] + [outcome(40, 40.0, status=FAILED, error="WorkerLost")]
    text = report(results(outcomes, slo="ttft_p99=2s", metric_percentiles="50,99.9").last)
    for line in (
        "============ Serving Benchmark Result ============",
        "Successful requests:                     40",
        "Failed requests:                         1",
        "Request goodput (req/s):                 ",
        "---------------Time to First Token----------------",
        "Mean TTFT (ms):                          100.00",
        "P99.9 TTFT (ms):                         100.00",
        "-----Time per Output Token (excl. 1st token)------",
        "Median TPOT (ms):                        10.00",
        "---------------Inter-token Latency----------------",
        "----------------End-to-end Latency----------------",
        "P50 E2EL (ms):                           200.00",
        "==================================================",
        "SLO ttft_p99: never, wanted at most 2000.00 ms: MISSED",
    ):
        assert f"\n{line}" in f"\n{text}", line
    assert "ITL" not in report(results().last, ["ttft"])


def test_the_exit_status_tells_what_came_of_it(results, outcome):
    assert exit_status(results()) == 0
    assert exit_status(results(slo="ttft_p99=2s")) == 0
    assert exit_status(results(slo="ttft_p99=2ms")) == 3
    late = ClientHealth(0.05, late=5, of=40, most_late_s=2.0)
    invalid = results(health=late, slo="ttft_p99=2ms")
    assert exit_status(invalid) == 4
    assert "INVALID: 5 of 40 requests were sent more than 50 ms late" in report(invalid.last)
    busy = ClientHealth(0.05, of=40, busy_share=0.97)
    assert "97%" in (results(health=busy).last.invalid or "")


def test_the_file_comes_back_as_it_was(results, tmp_path):
    made = results(slo="e2el_p99=2s,tpot_p50=1us".replace("1us", "0.001ms"))
    save(tmp_path / "r.json", made)
    assert load(tmp_path / "r.json") == made
    again = load(tmp_path / "r.json").last.outcomes()
    assert [one.arrival_s for one in again] == [float(i) for i in range(40)]
    bare = results(requests=True)  # a switch that is given turns its default around: --no-requests
    save(tmp_path / "bare.json", bare)
    with pytest.raises(InvalidRequest, match="no requests"):
        load(tmp_path / "bare.json").last.outcomes()


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"format": 99, "runs": []}', '{"format": 1, "runs": []}', "[" * 99999]
)
def test_what_is_no_file_of_results_is_refused(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InvalidRequest, match="results"):
        load(tmp_path / "r.json")


def test_the_page_opens_without_a_network_and_takes_names_as_text(results):
    html = page(results(model="<script>alert(1)</script>", slo="ttft_p99=2ms"))
    assert html.count("data:image/svg+xml;base64,") == 4
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?\s*(?:https?:)?//""", html)
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "default-src &#39;none&#39;" in html or "default-src 'none'" in html
    assert '<td class="missed">missed</td>' in html


def test_a_difference_is_told_from_chance(outcome):
    random = np.random.default_rng(8)

    def drawn(mean_s: float) -> list:
        return [outcome(i, i, ttft_s=float(t)) for i, t in enumerate(random.gamma(4, mean_s / 4, 400))]

    before = drawn(0.1)
    rows = {row.name: row for row in compare(before, drawn(0.13), seed=1)}
    assert rows["mean TTFT"].is_clear
    assert rows["mean TTFT"].low < rows["mean TTFT"].after - rows["mean TTFT"].before < rows["mean TTFT"].high
    assert not {row.name: row for row in compare(before, drawn(0.1), seed=1)}["mean TTFT"].is_clear
    assert compare(before, before, seed=1)[0].before == pytest.approx(1e3 * np.mean([o.ttft_s for o in before]))


def test_the_interval_covers_the_truth_as_often_as_it_says(outcome):
    """Of 60 pairs of runs that differ by nothing, 95 % intervals miss zero in about three."""
    random = np.random.default_rng(3)
    missed = 0
    for seed in range(60):
        runs = [[outcome(i, i, ttft_s=float(t)) for i, t in enumerate(random.exponential(0.1, 60))] for _ in range(2)]
        missed += {row.name: row for row in compare(*runs, seed=seed)}["mean TTFT"].is_clear
    # a binomial count of 60 at 0.05 exceeds 11 about once in twenty thousand
    assert missed <= 11


def test_two_files_are_compared_in_a_table(results, outcome, tmp_path):
    slower = [outcome(i, arrival_s=i, ttft_s=0.2) for i in range(40)]
    save(tmp_path / "a.json", results())
    save(tmp_path / "b.json", results(slower))
    text = compare_files(tmp_path / "a.json", tmp_path / "b.json")
    assert re.search(r"mean TTFT \(ms\).*100\.0.*200\.0.*\+100\.0%.*\+100\.0 … \+100\.0 ms", text)
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(
        cli.app, ["loadtest", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    )
    assert (shown.exit_code, shown.stdout) == (0, text)
    made = CliRunner().invoke(cli.app, ["loadtest", "report", str(tmp_path / "a.json"), str(tmp_path / "a.html")])
    assert made.exit_code == 0
    assert "data:image" in (tmp_path / "a.html").read_text()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_prompts": "0"}, "--num-prompts"),
        ({"num_prompts": "many"}, "--num-prompts"),
        ({"burstiness": "0"}, "--burstiness"),
        ({"burstiness": "nan"}, "--burstiness"),
        ({"backend": "smoke"}, "--backend"),
        ({"slo": "ttft=1s"}, "--slo"),
        ({"recipes": "exact=0"}, "--recipes"),
        ({"percentile_metrics": "ttft,foo"}, "--percentile-metrics"),
        ({"metric_percentiles": "0"}, "--metric-percentiles"),
        ({"input_len": "0"}, "--input-len"),
        ({"closed_loop": True}, "--closed-loop: does not fit the other options; allowed: with --max-concurrency"),
        ({"dataset_name": "azure"}, "--dataset-path"),
        ({"dataset_path": "x"}, "--dataset-path"),
        ({"find_max_rate": True, "request_rate": "1"}, "--find-max-rate"),
        ({"find_max_rate": True, "slo": "ttft_p99=1s"}, "--find-max-rate"),
        ({"prompt_text": True}, "--prompt-text"),
        ({"history": True, "backend": "http"}, "--history"),
        ({"timeout_s": "inf"}, "--timeout-s"),
        ({"seed": "-1"}, "--seed"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(given, said):
    with pytest.raises(InvalidRequest) as refused:
        parse_options(given)
    assert refused.value.message.startswith(said)


def test_every_option_is_a_flag_and_the_settings_are_json():
    names = [one.name for one in listed()]
    assert len(set(names)) == len(names) == len(LoadOptions.model_fields)
    of_vllm = "request-rate burstiness max-concurrency num-prompts num-warmups seed goodput percentile-metrics"
    own = "metric-percentiles dataset-name dataset-path json no-ignore-eos"
    assert {*of_vllm.split(), *own.split()} <= set(names)
    options = parse_options({"burstiness": "inf", "goodput": ["ttft:5"], "ignore_eos": True})
    assert (options.burstiness, options.ignore_eos) == (math.inf, False)
    assert json.loads(json.dumps(options.settings(), allow_nan=False))["burstiness"] == "inf"


LOADS = [one.words for one in commands() if one.words[:2] == ["kvsluice", "loadtest"] and "compare" not in one.words]


@pytest.mark.parametrize("words", LOADS, ids=" ".join)
def test_every_command_of_the_page_is_taken(words, monkeypatch):
    """The options fit each other; what each does is tested where it is done."""
    taken = []
    monkeypatch.setattr(runner, "run_command", lambda options, *others: taken.append(options) or 0)
    shown = CliRunner().invoke(cli.app, words[1:])
    assert shown.exit_code == 0, shown.output
    assert len(taken) == 1


def test_words_of_a_tokenizer_are_a_token_each(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<|end|>": 0, "x": 1, "Ġlighthouse": 2, "Ġtea": 3, "Ġ12": 4, "Ġgreen": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|end|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = Vocabulary.of_tokenizer(tmp_path)
    assert vocabulary.ids.tolist() == [2, 3, 5]
    ids = vocabulary.draw(20, np.random.default_rng(0)).tolist()
    assert tokenizer.encode(vocabulary.text(ids)).ids == ids
    for path in (tmp_path / "none", tmp_path / "broken.json"):
        (tmp_path / "broken.json").write_text("{}")
        with pytest.raises(InvalidRequest, match="--tokenizer"):
            Vocabulary.of_tokenizer(path)
