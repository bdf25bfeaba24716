"""What `kvsluice eval` can be told, and how it refuses the rest."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kvsluice.errors import InvalidRequest, KvsluiceError
from kvsluice.evals import runner
from kvsluice.evals.evaluator import make_plan
from kvsluice.evals.options import OPTIONS, argument_parser, parse_options
from kvsluice.services import cli
from kvsluice.tests.command_line import help_options

KIVI_SLOTS = '{"window":{"kind":"ends","sinks":0,"local":64,"seal_block":64}}'


def test_defaults_are_what_the_help_says():
    options = parse_options({})
    assert (options.suite, options.contexts, options.samples, options.seed) == ("ruler", (4096,), 10, 0)
    assert list(options.recipes) == ["exact"]
    assert options.json is None
    assert options.depths == tuple(i / 10 for i in range(11))


def test_recipes_presets_and_variants_have_labels():
    options = parse_options({"recipe": "exact, balanced", "variant": [f"a=kivi:{KIVI_SLOTS}", "b=kivi"]})
    assert list(options.recipes) == ["exact", "sluice", "a", "b"]
    assert options.recipes["a"].fingerprint != options.recipes["b"].fingerprint


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"suite": "glue"}, "--suite: 'glue'; allowed: ruler, multiturn, prefix, niah, ppl"),
        ({"suite": "prefix", "against": "transformers"}, "--against: is of no use to --suite prefix"),
        ({"suite": "multiturn", "task": "vt"}, "--task: 'vt'; allowed: numbers_in_noise, numbers_in_text, "),
        ({"suite": "multiturn", "depth": "0.5"}, "--depth: is of no use to --suite multiturn; allowed: --suite niah"),
        ({"context": "4096,x"}, "--context: 'x'; allowed: a whole number from 256"),
        ({"context": "512,512"}, "--context: '512,512'; allowed: values that differ"),
        ({"context": "512,0512"}, "--context: '512,512'; allowed: values that differ"),
        ({"context": "\u0665\u0661\u0662"}, "--context: '\u0665\u0661\u0662'; allowed: a whole number"),
        ({"suite": "niah", "depth": "0.5,0.50"}, "--depth: '0.5,0.5'; allowed: values that differ"),
        ({"suite": "niah", "depth": "0,-0"}, "--depth: '0.0,-0.0'; allowed: values that differ"),
        ({"context": "12"}, "--context: '12'; allowed: a whole number from 256"),
        ({"samples": "0"}, "--samples: '0'; allowed: a whole number from 1"),
        ({"samples": "1.5"}, "--samples: '1.5'"),
        ({"seed": "-1"}, "--seed: '-1'; allowed: a whole number from 0"),
        ({"recipe": "exact,none"}, "--recipe: recipe.name: unknown recipe 'none'; allowed: exact"),
        ({"recipe": "exact,,kivi"}, "--recipe: 'exact,,kivi'"),
        ({"recipe": "sluice,balanced"}, "--recipe: 'sluice' is taken"),
        ({"variant": ["kivi"]}, "--variant: 'kivi'; allowed: LABEL=RECIPE:{slots as JSON}"),
        ({"variant": ["a=kivi:{"]}, "--variant: recipe.slots: is not JSON"),
        ({"variant": ["a=kivi:{}", "a=mikv:{}"]}, "--variant: 'a' is taken"),
        ({"variant": ["transformers=kivi:{}"]}, "--variant: 'transformers' is taken"),
        ({"recipe": "kivi", "variant": ["exact=kivi:{}"]}, "--variant: 'exact' is taken"),
        ({"task": "vt,nope"}, "--task: 'nope'; allowed: niah_single_1, "),
        ({"suite": "niah", "task": "vt"}, "--task: 'vt'; allowed: needle"),
        ({"suite": "niah", "depth": "0,1.5"}, "--depth: '1.5'; allowed: numbers from 0 to 1"),
        ({"suite": "niah", "depth": "nan"}, "--depth: 'nan'"),
        ({"depth": "0.5"}, "--depth: is of no use to --suite ruler; allowed: --suite niah"),
        (
            {"suite": "niah", "scored_tokens": "9"},
            "--scored-tokens: is of no use to --suite niah; allowed: --suite ppl",
        ),
        ({"recipe": ["exact", "kivi,exact"]}, "--recipe: 'exact,kivi,exact'; allowed: values that differ"),
        ({"device": "tpu"}, "--device: 'tpu'; allowed: cpu, cuda"),
        ({"dtype": "int8"}, "--dtype: 'int8'; allowed: float32, bfloat16, float16"),
        ({"json": "results.txt"}, "--json: 'results.txt'; allowed: a file whose name ends in .json"),
        ({"processes": "0"}, "--processes: '0'; allowed: a whole number from 1"),
        ({"against": "vllm"}, "--against: 'vllm'; allowed: transformers"),
    ],
)
def test_what_cannot_be_is_refused_by_name(given, said):
    with pytest.raises(InvalidRequest) as refused:
        parse_options(given)
    assert refused.value.message.startswith(said)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"context": "5000"}, "--context: 5000; allowed: at most 4055, the model's positions less the 41"),
        ({"suite": "ruler", "context": "300", "task": "niah_multikey_3"}, "--context: 300 has no room for niah_mul"),
        ({"suite": "niah", "context": "300"}, "--context: 300 has no room for needle; allowed: more, 512 are"),
        (
            {"suite": "multiturn", "context": "300", "task": "state"},
            "--context: 300 has no room for state; allowed: more",
        ),
        ({"task": "novel"}, "--task: 'novel'; allowed: bible, python, debian"),
        ({"recipe": "kivi", "against": "transformers"}, "--against: needs a recipe to compare with; allowed: exact"),
        (
            {"variant": ['a=fastkv:{"propagation":{"kind":"tsp","layer":9,"rate":0.2,"window":8}}']},
            "--recipe a: recipe.propagation",
        ),
        ({"texts": "/nowhere"}, "--texts: /nowhere/usr/bin/bible is missing; run scripts/fetch_texts.sh /nowhere"),
        ({"model": "/nowhere"}, "model: unknown model 'nowhere'; allowed: a folder"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_its_weights_are_read(options, given, said):
    with pytest.raises(KvsluiceError) as refused:
        make_plan(options(**given))
    assert refused.value.message.startswith(said)


def test_recipes_may_be_named_at_once_or_one_by_one():
    assert list(parse_options({"recipe": ["exact,kivi", "sluice"]}).recipes) == ["exact", "kivi", "sluice"]


def test_a_text_must_be_longer_than_a_sample(options, tmp_path):
    (tmp_path / "heldout").mkdir()
    for name, size in (("bible", 900), ("python", 700), ("debian", 900)):
        (tmp_path / "heldout" / f"{name}.txt").write_text("x" * size)
    with pytest.raises(InvalidRequest, match="--context: 680; allowed: at most 659, the shortest text"):
        make_plan(options(context="300,680", texts=str(tmp_path)))
    assert make_plan(options(context="680", texts=str(tmp_path), task="bible")).tasks == ("bible",)


def test_a_text_without_a_word_is_refused(options, tmp_path):
    (tmp_path / "heldout").mkdir()
    for name, text in (("bible", "x" * 900), ("python", ""), ("debian", "x" * 900)):
        (tmp_path / "heldout" / f"{name}.txt").write_text(text)
    with pytest.raises(KvsluiceError, match=r"--texts: python in .* holds nothing"):
        make_plan(options(suite="niah", context="600", texts=str(tmp_path)))


def test_a_device_that_is_not_there_is_refused_by_name(options, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InvalidRequest, match="--device: 'cuda:2'; allowed: cpu, cuda, cuda:0, cuda:1"):
        make_plan(options(device="cuda:2"))
    assert make_plan(options(device="cuda:1")).recipes


def test_both_command_lines_take_the_same_options():
    shown = help_options("eval")
    plain = argument_parser().format_help()
    for option in OPTIONS:
        assert option.default in shown[f"--{option.name}"]
        assert f"--{option.name} " in plain + " "


@pytest.mark.parametrize("command", [cli.main, runner.main])
def test_a_refusal_is_one_line(command, monkeypatch, capsys):
    words = ["kvsluice", "eval"] if command is cli.main else ["runner"]
    monkeypatch.setattr(sys, "argv", [*words, "--suite", "glue"])
    try:
        status = command()
    except SystemExit as ended:
        status = ended.code
    assert status == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--suite: 'glue'; allowed: ruler, multiturn, prefix, niah, ppl" in said


def test_the_runner_needs_none_of_the_services_libraries():
    program = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"pydantic", "ray", "redis", "fastapi", "typer", "rich", "grpc"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from kvsluice.evals import runner
runner.main(["--help"])
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert "--against" in done.stdout
