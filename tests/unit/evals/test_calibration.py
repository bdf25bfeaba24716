"""The whole command on a tiny random model, and errors of the first cut against the engines and transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from kvsluice.compression import make_cache
from kvsluice.compression.recipe import fill, get_recipe, resolve
from kvsluice.errors import ConfigError, InvalidRequest
from kvsluice.evals.calibration import runner
from kvsluice.evals.calibration.first_cut import answer_rows, cache_errors, propagation_errors
from kvsluice.evals.calibration.options import parse_calibration
from kvsluice.evals.calibration.runner import calibrate
from kvsluice.evals.calibration.walk import Walk, as_head_reads
from kvsluice.evals.evaluator import Evaluator, make_plan
from kvsluice.evals.options import parse_options
from kvsluice.evals.results import load
from kvsluice.evals.suites import Case
from kvsluice.models import profiles
from kvsluice.models.forward import forward_hidden
from kvsluice.models.loader import load_model
from kvsluice.models.profiles import Profile, load_profile, read_profile
from kvsluice.models.sampling import SamplingParams
from kvsluice.services import cli
from kvsluice.services.model_shape import model_shape
from kvsluice.services.prefill import engine as engine_module
from kvsluice.services.prefill.engine import PrefillEngine, PrefillJob
from kvsluice.services.worker import check_profile

CONTEXT = 1600


@pytest.fixture(scope="module")
def model(deep_folder):
    return load_model(str(deep_folder))


@pytest.fixture
def case(model) -> Case:
    ids = torch.randint(0, model.config.vocab_size, (CONTEXT,), generator=torch.Generator().manual_seed(1)).tolist()
    return Case(tuple(ids[:1500]), tuple(ids[1500:1508]), "all")  # decode seals 4 rows behind the prompt


@pytest.fixture
def arguments(deep_folder, text_folder, tmp_path) -> dict[str, str]:
    """Of a calibration that takes seconds."""
    return {
        "model": str(deep_folder),
        "texts": str(text_folder),
        "context": str(CONTEXT),
        "task": "niah_single_1,niah_single_2",
        "max_prefill_flops": "0.95",
        "max_kv_bytes": "0.4",
        "samples": "1",
        "prompts": "2",
        "finalists": "2",
        "layers": "0,1,2",
        "rates": "0.2",
        "windows": "64",
        "keys": "int4,rank-0.5",
        "chunks": "4",
        "outliers": "0,2",
        "out": str(tmp_path / "tiny.json"),
        "json": str(tmp_path / "report.json"),
        "plot": str(tmp_path / "report.svg"),
        "commit": "some-commit",
    }


def filled(model, recipe: str = "sluice", **profile):
    found = resolve(get_recipe(recipe), model_shape(model.config), 1500, profile)
    assert found.fallback_reason is None
    return found.recipe


class Sink:
    """Takes what prefill makes of a prompt into a cache."""

    def __init__(self, cache) -> None:
        self.cache, self.error = cache, None

    def ready(self) -> bool:
        return True

    def on_layer_start(self, layer: int) -> None: ...

    def on_layer(self, encoded) -> None:
        self.cache.add_layer(encoded)

    def on_first_tokens(self, sampled) -> None: ...

    def on_done(self) -> None: ...

    def on_error(self, error) -> None:
        self.error = error


@pytest.fixture
def prefilled(model, monkeypatch):
    """prefilled(case, recipe) -> the cache that the prefill engine leaves, and the row that its first token is of."""
    last = []
    plain = engine_module.sample_first

    def sample_first(model, row, samplers):
        last.append(row.clone())
        return plain(model, row, samplers)

    monkeypatch.setattr(engine_module, "sample_first", sample_first)

    def run(case: Case, recipe):
        count = len(case.prompt_ids)
        rope = lambda x, at: model.rotate(x, at, count)  # noqa: E731
        sink = Sink(make_cache(recipe, model_shape(model.config), count, rope))
        engine = PrefillEngine(model, 256)
        sampling = SamplingParams(max_tokens=99, temperature=0.0, ignore_eos=True)
        engine.submit(PrefillJob("a", 1, case.prompt_ids, recipe, sampling), sink)
        while engine.step():
            pass
        assert sink.error is None
        return sink.cache, last[-1]

    return run


def error(rows: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((rows - wanted).norm(dim=1) / wanted.norm(dim=1)).mean())


@torch.no_grad()
def test_a_walk_without_a_recipe_is_what_transformers_computes(model, deep_folder, case):
    theirs = LlamaForCausalLM.from_pretrained(deep_folder)
    ids = torch.tensor(case.prompt_ids)
    wanted = theirs(ids[None], output_hidden_states=True).hidden_states[-1][0]
    walk = Walk.begin(model, case.prompt_ids, len(ids), 400)
    torch.testing.assert_close(as_head_reads(model, walk.finish()), wanted, rtol=1e-3, atol=1e-4)


def test_who_lets_every_row_go_on_has_no_error(model, case):
    found = propagation_errors(model, case, {"all": filled(model, tsp_layer=1, tsp_rate=1.0)}, 512)
    assert found["all"] < 1e-6


@pytest.mark.parametrize("recipe", ["sluice", "fastkv"])
@torch.no_grad()
def test_an_error_is_that_of_the_prefill_engine(model, case, prefilled, recipe):
    kind = "tsp" if recipe == "sluice" else "fastkv"
    recipes = {
        f"{layer} {rate}": filled(model, recipe, **{f"{kind}_layer": layer, f"{kind}_rate": rate})
        for layer, rate in ((0, 0.2), (1, 0.2), (2, 0.2), (1, 0.5))
    }
    found = propagation_errors(model, case, recipes, 512, last_rows=1)
    wanted = as_head_reads(model, forward_hidden(model, torch.tensor(case.prompt_ids))[-1:])
    for label, filled_in in recipes.items():
        row = as_head_reads(model, prefilled(case, filled_in)[1])
        assert found[label] == pytest.approx(error(row, wanted), rel=1e-3), label
        assert found[label] > 0.001, "something is left out"


@torch.no_grad()
def test_an_error_of_a_cache_is_that_of_what_the_engine_ships(model, case, prefilled):
    recipes = {
        "int4": filled(model, tsp_layer=1, key_codec={"kind": "affine", "axis": "channel"}),
        "beside": filled(model, tsp_layer=1, outliers=2, key_codec={"kind": "affine", "bits": 8, "axis": "channel"}),
        "pairs": filled(model, tsp_layer=1, chunk=2, outliers=2, key_codec={"kind": "lowrank", "rank": 8, "bits": 8}),
        "recall": filled(model, tsp_layer=1, tsp_recall=0.1),
        "exact": get_recipe("exact"),
    }
    found = cache_errors(model, model_shape(model.config), case, recipes, 512)
    following = case.answer_ids
    ids = torch.tensor(case.prompt_ids + following)
    wanted = as_head_reads(model, forward_hidden(model, ids)[len(case.prompt_ids) :])
    assert list(found) == list(recipes)
    for label, recipe in recipes.items():
        rows = answer_rows(model, prefilled(case, recipe)[0], following, len(case.prompt_ids))
        assert found[label] == pytest.approx(error(as_head_reads(model, rows), wanted), rel=1e-3, abs=1e-6), label
    assert found.pop("exact") < 1e-5 < 0.001 < min(found.values())


def test_the_command_writes_profile_report_and_plot(arguments, tmp_path):
    words = [word for key, value in arguments.items() for word in (f"--{key.replace('_', '-')}", value)]
    ran = CliRunner().invoke(cli.app, ["calibrate", *words])
    assert ran.exit_code == 0, ran.output
    report = json.loads((tmp_path / "report.json").read_text())
    profile = read_profile(tmp_path / "tiny.json")
    assert report["profile"] == profile.stated()
    chosen = next(one for one in report["finalists"] if one["label"] == report["chosen"])
    assert chosen["choice"].items() <= profile.stated().items()
    assert "--context 1600" in profile.source and "some-commit" in profile.source

    options = parse_calibration(arguments)
    shape = make_plan(options.evaluation).shape
    service = fill(get_recipe("balanced"), shape, load_profile(arguments["model"], shape, tmp_path / "tiny.json"))
    assert service.fingerprint == chosen["fingerprint"], "what was measured is what a service runs"

    assert len(report["propagation"]) == 3 and len(report["cache"]) == 4
    measured = [one for one in report["propagation"] if one["refused"] is None]
    assert measured and all(one["error"] == pytest.approx(sum(one["errors"]) / 2) for one in measured)
    assert all(one["costs"]["prefill"] <= 0.95 for one in measured)
    labels = [one["label"] for one in report["finalists"]]
    assert labels[0] == "exact" and len(labels) == 4, "two finalists and the numbers as they are now"
    second = load(tmp_path / "report.finalists.json")
    assert list(second.recipes) == labels and second.settings["samples"] == 1
    assert "<svg" in (tmp_path / "report.svg").read_text()
    assert "chosen" in ran.output and "tiny.json" in ran.output
    assert {path.name for path in tmp_path.iterdir()} == {
        "tiny.json",
        "report.json",
        "report.svg",
        "report.propagation.work.jsonl",
        "report.cache.work.jsonl",
        "report.finalists.work.jsonl",
        "report.finalists.json",
    }


def test_what_was_measured_is_not_measured_again(arguments, monkeypatch, tmp_path, capsys):
    seen: list[str] = []
    for name in ("propagation_errors", "cache_errors"):
        plain = getattr(runner, name)

        def counting(*given, name=name, plain=plain):
            seen.append(name)
            if len(seen) == 2 and not (tmp_path / "stopped").exists():
                (tmp_path / "stopped").touch()
                raise KeyboardInterrupt
            return plain(*given)

        monkeypatch.setattr(runner, name, counting)
    options = parse_calibration(arguments)
    assert runner.run_command(options) == runner.EXIT_INTERRUPTED
    assert "goes on from what lies beside" in capsys.readouterr().err
    assert not options.out.exists()
    seen.clear()
    first = calibrate(options)
    assert seen == ["propagation_errors", "cache_errors", "cache_errors"], "of two prompts one was done"
    monkeypatch.setattr(Evaluator, "evaluate", lambda *_: pytest.fail("a sample ran again"))
    assert calibrate(options) == first
    with pytest.raises(InvalidRequest, match=r"holds the work of another run .*seed: 0 → 1"):
        calibrate(parse_calibration(arguments | {"seed": "1"}))


def test_prompts_of_the_first_cut_are_none_of_the_second(arguments, monkeypatch):
    prompts: list[Case] = []

    def remember(model, case, recipes, chunk_tokens):
        prompts.append(case)
        return dict.fromkeys(recipes, 0.5)

    monkeypatch.setattr(runner, "propagation_errors", remember)
    others = dict.fromkeys(("keys", "chunks", "outliers", "json", "plot"))
    options = parse_calibration(arguments | others | {"recipe": "fastkv", "task": "niah_single_2"})
    report = calibrate(options)
    plan = make_plan(options.evaluation)
    second = [plan.suite.case(unit) for unit in plan.units]
    assert len(prompts) == 2 and prompts[0] != prompts[1]
    assert not {one.prompt_ids for one in prompts} & {one.prompt_ids for one in second}
    assert report.cache == () and report.profile.keys() == {"fastkv_layer", "fastkv_rate", "fastkv_window", "source"}


def test_a_profile_keeps_what_was_not_chosen(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "cache_errors", lambda model, shape, case, recipes, chunk: dict.fromkeys(recipes, 0.5))
    before = tmp_path / "before.json"
    before.write_text(Profile(fastkv_layer=2, tsp_layer=1, chunk=2).to_json())
    given = arguments | dict.fromkeys(("layers", "rates", "windows", "max_prefill_flops", "json", "plot"))
    report = calibrate(parse_calibration(given | {"recipe": "sluice-full", "profile": str(before), "out": str(before)}))
    assert report.propagation == ()
    after = read_profile(before)
    assert (after.fastkv_layer, after.tsp_layer) == (2, 1)
    assert after.chunk == report.finalist(report.chosen).choice["chunk"]


def test_a_model_is_known_by_the_name_of_its_folder_however_it_is_spelt(arguments, tmp_path, monkeypatch):
    """What its profile says of other recipes stays."""
    stored = Profile(fastkv_layer=2)
    monkeypatch.setattr(profiles, "_stored", lambda: {Path(arguments["model"]).name: stored})
    link = tmp_path / "elsewhere"
    link.symlink_to(arguments["model"], target_is_directory=True)
    _, present, _ = runner._planned(parse_calibration(arguments | {"model": str(link)}))
    assert present == stored


def test_what_cannot_work_is_refused_before_the_model_is_read(arguments, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "read_model", lambda *_: pytest.fail("the model was read"))
    (tmp_path / "file").touch()
    for given, said in (
        ({"max_prefill_flops": "0.1"}, "no way to select rows is left: .* and takes 0"),
        ({"context": "700"}, "would run exact: 700 tokens"),
        ({"layers": "3"}, "an integer from 0 to 2"),
        ({"out": str(tmp_path / "file" / "a.json")}, "--out: cannot write"),
        ({"plot": str(tmp_path / "file" / "a.svg")}, "--plot: cannot write"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            calibrate(parse_calibration(arguments | given))


def test_an_evaluation_takes_a_profile(arguments, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(Profile(tsp_layer=2, chunk=2).to_json())
    own = {key: arguments[key] for key in ("model", "texts", "context", "samples", "task")}
    plan = make_plan(parse_options({**own, "recipe": "balanced", "profile": str(path)}))
    assert (plan.recipes["sluice"].propagation.layer, plan.recipes["sluice"].retrieval.chunk) == (2, 2)
    path.write_text(Profile(tsp_layer=3).to_json())
    with pytest.raises(InvalidRequest, match=r"--recipe sluice: recipe.propagation.layer: got 3"):
        make_plan(parse_options({**own, "recipe": "balanced", "profile": str(path)}))


def test_a_worker_refuses_a_profile_that_does_not_fit_its_model(model):
    shape = model_shape(model.config)
    check_profile({"tsp_layer": 2}, shape)
    with pytest.raises(ConfigError, match=r"profile: does not fit the model under fastkv: .*layer: got 3"):
        check_profile({"fastkv_layer": 3}, shape)
    check_profile({"fastkv_layer": 3}, replace(shape, num_layers=1, layer_windows=(None,)))  # selects nowhere anyhow


def test_units_say_which_tasks_prompts_are_of():
    assert [runner._spread(place, 4, 11) for place in range(4)] == [0, 2, 5, 8]
    assert [runner._spread(place, 5, 2) for place in range(5)] == [0, 1, 0, 1, 0]
