"""What `kvsluice bench` can be told, and how it refuses the rest."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvsluice.benchmarks import runner, subject
from kvsluice.benchmarks.options import PARTS, argument_parser, parse_options
from kvsluice.compression.recipe import fill
from kvsluice.errors import InvalidRequest, KvsluiceError
from kvsluice.models.config import SHAPES
from kvsluice.services import cli
from kvsluice.services.model_shape import model_shape
from kvsluice.tests.command_line import help_options


@pytest.mark.parametrize("part", PARTS)
def test_defaults_are_what_the_help_says(part):
    options = parse_options(part, {})
    assert options.contexts == (8192,)
    expected = {"decode": 8, "tiers": 8, "service": 8, "failover": 0}.get(part, 2)
    assert (options.seed, options.warmup) == (0, expected)
    assert (options.json, options.dtype, options.device) == (None, None, None)
    assert options.models == (("llama-3.1-8b", "smollm2-135m") if part == "kernels" else ("llama-3.1-8b",))
    assert not options.baseline


def test_what_decode_measures():
    given = {"batch": "1,32,max", "hit_rate": "0,0.6,0.9", "recipe": "exact,balanced", "selected": "2048"}
    options = parse_options("decode", given)
    assert options.batches == (1, 32, None)
    assert options.hit_rates == (0, 0.6, 0.9)
    sluice = fill(options.recipes["sluice"], model_shape(SHAPES["smollm2-135m"]), {})
    assert sluice.retrieval.selected_chunks(124_928) == sluice.retrieval.selected_chunks(1_048_576) == 2048 // 4
    assert options.recipes["exact"] == parse_options("decode", {}).recipes["exact"]


@pytest.mark.parametrize(
    ("part", "given", "said"),
    [
        ("serve", {}, "part: 'serve'; allowed: prefill, decode, handoff, tiers, service, failover, store, kernels"),
        ("prefill", {"context": "4096,x"}, "--context: 'x'; allowed: a whole number from 256"),
        ("prefill", {"recipe": "none"}, "--recipe: recipe.name: unknown recipe 'none'; allowed: exact"),
        ("prefill", {"variant": ["kivi"]}, "--variant: 'kivi'; allowed: LABEL=RECIPE:{slots as JSON}"),
        ("prefill", {"batch": "max"}, "--batch: 'max'; allowed: a whole number from 1 to 4096"),
        ("store", {"batch": "0"}, "--batch: '0'; allowed: a whole number from 1 to 4096"),
        ("prefill", {"batch": "2,02"}, "--batch: '2,2'; allowed: values that differ"),
        ("prefill", {"beside": "0"}, "--beside: '0'; allowed: a whole number from 1"),
        ("prefill", {"repeats": "0"}, "--repeats: '0'; allowed: a whole number from 1"),
        ("prefill", {"baseline": "vllm"}, "--baseline: 'vllm'; allowed: transformers"),
        ("prefill", {"pack_tokens": "-1"}, "--pack-tokens: '-1'; allowed: a whole number from 1"),
        ("decode", {"batch": "most"}, "--batch: 'most'; allowed: a whole number from 1 to 4096, or max"),
        ("decode", {"hit_rate": "60"}, "--hit-rate: '60'; allowed: a number from 0 to 1"),
        ("decode", {"hit_rate": "nan"}, "--hit-rate: 'nan'; allowed: a number from 0 to 1"),
        ("decode", {"hit_rate": "0,0.0"}, "--hit-rate: '0.0,0.0'; allowed: values that differ"),
        ("decode", {"kv": "real"}, "--kv: 'real'; allowed: synthetic, prefill"),
        ("decode", {"steps": "0"}, "--steps: '0'; allowed: a whole number from 1"),
        ("decode", {"selected": "0"}, "--selected: '0'; allowed: a whole number from 1"),
        ("decode", {"cache_gib": "0"}, "--cache-gib: '0'; allowed: a number from 0.001"),
        ("kernels", {"model": "llama-3.1-8b,"}, "--model: 'llama-3.1-8b,'; allowed: values with commas between them"),
        ("kernels", {"device": "tpu"}, "--device: 'tpu'; allowed: cpu, cuda, cuda:N"),
        ("kernels", {"dtype": "int8"}, "--dtype: 'int8'; allowed: float32, bfloat16, float16"),
        ("handoff", {"json": "out.txt"}, "--json: 'out.txt'; allowed: a file whose name ends in .json"),
    ],
)
def test_what_cannot_be_is_refused_by_name(part, given, said):
    with pytest.raises(InvalidRequest) as refused:
        parse_options(part, given)
    assert refused.value.message.startswith(said)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"context": "256", "recipe": "sluice"}, "--context: sluice would run exact, as 256 tokens"),
        ({"model": "/nowhere"}, "model: unknown model 'nowhere'"),
        (
            {"model": "llama-3.1-8b", "random_weights": None},
            "model: llama-3.1-8b is a shape without weights; allowed: a folder, or random weights (--random-weights)",
        ),
        ({"device": "cuda:99"}, "--device: cuda:99; allowed: cpu, or one of"),
        (
            {"device": "cpu", "profile": True},
            "--profile: with --device cpu; allowed: a GPU, which records what it runs",
        ),
        (
            {"variant": ['a=fastkv:{"propagation":{"kind":"tsp","layer":9,"rate":0.2,"window":8}}']},
            "--recipe a: recipe.propagation",
        ),
    ],
)
def test_what_model_and_device_cannot_do_is_refused_before_weights_are_made(bench, monkeypatch, given, said):
    monkeypatch.setattr(subject, "load_model", lambda *args, **kwargs: pytest.fail("weights were made"))
    with pytest.raises(KvsluiceError) as refused:
        bench("prefill", **given)
    assert refused.value.message.startswith(said)


@pytest.mark.parametrize("part", PARTS)
def test_both_command_lines_take_the_same_options(part, capsys):
    shown = help_options("bench", part)
    with pytest.raises(SystemExit):
        argument_parser().parse_args([part, "--help"])
    plain = capsys.readouterr().out
    for option in PARTS[part].options:
        assert option.default in shown[f"--{option.name}"]
        assert f"--{option.name} " in plain


@pytest.mark.parametrize("command", [cli.main, runner.main])
def test_a_refusal_is_one_line(command, monkeypatch, capsys):
    words = ["kvsluice", "bench"] if command is cli.main else ["runner"]
    monkeypatch.setattr(sys, "argv", [*words, "decode", "--kv", "real"])
    try:
        status = command()
    except SystemExit as ended:
        status = ended.code
    assert status == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--kv: 'real'; allowed: synthetic, prefill" in said


def test_the_runner_measures_on_a_bare_machine(tiny_folder):
    """Torch, Triton and transformers are there, and nothing else of what the services need."""
    program = f"""
import sys
from importlib.machinery import PathFinder
GONE = {{"pydantic", "ray", "redis", "fastapi", "typer", "rich", "grpc", "prometheus_client", "xxhash", "google"}}
class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in GONE else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
from kvsluice.benchmarks import runner
shared = ["--model", {str(tiny_folder)!r}, "--random-weights", "--context", "256", "--warmup", "0", "--device", "cpu"]
for part in (["prefill", "--baseline", "transformers"], ["decode", "--steps", "1"], ["handoff"]):
    assert runner.main([*part, *shared]) == 0
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tiny: time to first token" in done.stdout
    assert "tiny: decode step" in done.stdout
    assert "xxhash is not installed" in done.stdout
