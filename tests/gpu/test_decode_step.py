"""Captured decode steps on a CUDA device: the tokens that sequences give one by one, and no wait for the device."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvsluice.compression.recipe import get_recipe
from kvsluice.evals import pipeline as pipeline_module
from kvsluice.evals.pipeline import LocalPipeline
from kvsluice.models.loader import load_model
from kvsluice.models.sampling import SamplingParams
from kvsluice.services.decode import captured as captured_module
from kvsluice.services.decode import engine as engine_module
from kvsluice.services.decode import step as step_module
from kvsluice.services.decode.engine import EmittedChoice
from kvsluice.services.decode.host_pages import HostPages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VOCAB = 101
PROFILE = {"tsp_layer": 1, "fastkv_layer": 1}
SMALL = '{"retrieval": {"kind": "chunks", "chunk": 4, "outliers": 0, "budget_tokens": 64, "landmark_bits": 8}}'
LOW_RANK = '{"key_codec": {"kind": "lowrank", "share": 0.5, "bits": 8}, ' + SMALL[1:]
RECIPES = {
    "exact": get_recipe("exact"),
    "sluice": get_recipe("sluice", SMALL),
    "sluice-lowrank": get_recipe("sluice-full", LOW_RANK),
    **{name: get_recipe(name) for name in ("fastkv", "shadowkv", "kivi", "kivi-2bit", "mikv", "fp8", "streaming")},
    **{name: get_recipe(name) for name in ("lowrank", "xkv", "xkv-kv", "pyramidkv", "snapkv", "quantized-pruning")},
}
GREEDY = SamplingParams(max_tokens=80, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random Llama whose wide initial values keep top-2 gaps far above rounding."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return load_model(str(path), dtype=torch.float32, device="cuda")


def random_prompt(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, VOCAB, (length,), generator=generator).tolist())


def answers(model, requests, host=None, lookahead=None) -> list[list[list[int]]]:
    pipeline = LocalPipeline(model, PROFILE, host=host, lookahead=lookahead)
    done = [one.token_ids for one in pipeline.generate_many(requests)]
    pipeline.check_integrity()
    answers.hot_counts = pipeline.decode.runner.computation.hot_counts.tolist()
    return done


def same_share(ours: list[list[int]], others: list[list[int]]) -> float:
    """Share of tokens in front of the first one that differs."""
    total = agreed = 0
    for own, other in zip(ours, others, strict=True):
        total += len(own)
        agreed += next((i for i, (a, b) in enumerate(zip(own, other, strict=True)) if a != b), len(own))
    return agreed / total


@pytest.mark.parametrize("name", RECIPES)
def test_a_batch_says_what_its_sequences_say_one_by_one(name, model, monkeypatch):
    requests = [(random_prompt(900 + 131 * i, i), RECIPES[name], GREEDY) for i in range(5)]
    with monkeypatch.context() as plain:
        plain.setattr(step_module, "runs", lambda name, device: False)
        expected = answers(model, requests)
    shares = [same_share(own, other) for own, other in zip(answers(model, requests), expected, strict=True)]
    if "sluice" not in name and name != "shadowkv":
        assert shares == [1.0] * len(shares)
    else:
        # where chunks are nearly as good as others, rounding decides which are read, and an answer goes elsewhere from
        # there on; a sequence that read what is not its own would do so at once
        assert min(shares) >= 0.1
        assert sum(shares) / len(shares) >= 0.5


RECALLS = '{"propagation": {"kind": "tsp", "window": 40, "chunk_aligned": true, "recall": %s, "recall_step": 8}, %s'
# so many chunks are chosen that the values of layers behind T stay on the device, hidden rows do not
MORE_CHOSEN = SMALL[1:].replace('"budget_tokens": 64', '"budget_tokens": 160')


@pytest.mark.parametrize("in_host", [False, True], ids=["on the device", "in host memory"])
def test_a_captured_step_recalls_what_sequences_do_one_by_one(model, monkeypatch, without_waiting, in_host):
    """With others that recall nothing, past what there is room for, in replayed graphs, and without a wait."""
    recipes = [get_recipe("sluice", RECALLS % (share, MORE_CHOSEN)) for share in (0.02, 0.1, 0.0)]
    requests = [
        (random_prompt(900 + 61 * i, i), recipe, GREEDY) for i, recipe in enumerate([*recipes, RECIPES["exact"]])
    ]
    with monkeypatch.context() as plain:
        plain.setattr(step_module, "runs", lambda name, device: False)
        expected = answers(model, requests)
    replays, brought, graph, read = [], [0], torch.cuda.CUDAGraph, step_module.Brought.read

    class Watched(graph):
        def replay(self):
            replays.append(1)
            with without_waiting():
                super().replay()

    def watched(self):
        rows = read(self)
        brought.append(max(rows))
        return rows

    monkeypatch.setattr(captured_module.torch.cuda, "CUDAGraph", Watched)
    monkeypatch.setattr(step_module.Brought, "read", watched)
    host = HostPages(64 << 20, model.device, 1 << 16) if in_host else None
    shares = [same_share(own, other) for own, other in zip(answers(model, requests, host), expected, strict=True)]
    assert len(replays) > 20 and max(brought) > 0.1 * 961, "some made room"
    # as above, rounding may decide which chunks are read, and which come back
    assert shares[-1] == 1.0 and min(shares) >= 0.1 and sum(shares) / len(shares) >= 0.5


def test_steps_are_captured_and_replayed_without_waiting(model, monkeypatch, without_waiting):
    replays, graph = [], torch.cuda.CUDAGraph

    class Watched(graph):
        def replay(self):
            replays.append(1)
            with without_waiting():
                super().replay()

    monkeypatch.setattr(captured_module.torch.cuda, "CUDAGraph", Watched)
    requests = [(random_prompt(700, i), recipe, GREEDY) for i, recipe in enumerate(RECIPES.values())]
    answers(model, requests)
    assert len(replays) > 20


@pytest.mark.parametrize("name", ["sluice", "shadowkv", "sluice-lowrank"])
def test_values_in_host_memory_give_the_same_tokens(name, model):
    """Bits are the same, so tokens are; the hot set sees chunks come, go and come again, in captured steps too."""
    recipe = get_recipe("shadowkv", SMALL.replace("8}}", "16}}")) if name == "shadowkv" else RECIPES[name]
    requests = [(random_prompt(1900 + 131 * i, i), recipe, GREEDY) for i in range(3)]
    host = HostPages(64 << 20, model.device, 1 << 16)
    expected = answers(model, requests)
    assert answers.hot_counts == [0, 0]
    assert answers(model, requests, host) == expected
    wanted, fetched = answers.hot_counts
    assert 0 < fetched < wanted
    assert host.num_free == host.num_pages


def test_a_batch_is_what_its_members_are_alone(model):
    """Linear maps over other numbers of rows may round otherwise, which these logits are far above."""
    names = ("exact", "kivi", "streaming", "fp8", "exact")
    requests = [(random_prompt(400 + 37 * i, 50 + i), RECIPES[name], GREEDY) for i, name in enumerate(names)]
    together = answers(model, requests)
    assert together == [answers(model, [request])[0] for request in requests]


def test_choices_and_requests_come_and_go(model, monkeypatch):
    drawn = SamplingParams(max_tokens=50, temperature=0.9, top_p=0.9, seed=3, n=3, ignore_eos=True)
    short = SamplingParams(max_tokens=7, temperature=0.0, ignore_eos=True)
    requests = [
        (random_prompt(500 + 61 * i, 80 + i), RECIPES[name], (drawn, short, GREEDY)[i % 3])
        for i, name in enumerate(("exact", "kivi", "fp8", "streaming", "mikv", "exact", "lowrank"))
    ]
    with monkeypatch.context() as plain:
        plain.setattr(step_module, "runs", lambda name, device: False)
        expected = answers(model, requests)
    assert answers(model, requests) == expected


def test_lookahead_changes_no_token(model):
    """Requests that end at other times, by stop tokens and by length, with whatever sampling."""
    kinds = (
        {"temperature": 0.0},
        {"temperature": 1.2, "top_k": 30, "top_p": 0.95, "n": 2},
        {"temperature": 1.0, "min_p": 0.02, "logprobs": 2},
        {"temperature": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.2, "n": 2},
        {"temperature": 1.5, "stop_token_ids": tuple(range(2, 8)), "min_tokens": 4, "n": 3},
    )
    requests = [
        (
            random_prompt(300 + 41 * i, 20 + i),
            RECIPES[("exact", "fp8", "streaming")[i % 3]],
            SamplingParams(**{"max_tokens": 20 + 6 * i, "seed": i, "ignore_eos": True} | params),
        )
        for i, params in enumerate(kinds)
    ]
    assert answers(model, requests, lookahead=True) == answers(model, requests, lookahead=False)


def test_steps_are_launched_without_waiting(model, monkeypatch, without_waiting):
    """Drawn and greedy ones, once their shapes are captured."""
    params = (GREEDY, SamplingParams(max_tokens=60, temperature=1.0, top_k=20, top_p=0.9, seed=2, ignore_eos=True))
    launched, launch = [], engine_module.launch

    def watched(runner, turns, more):
        launched.append(len(turns))
        steady = launched[-6:] == [len(turns)] * 6
        with without_waiting() if steady else nullcontext():
            step = launch(runner, turns, more)
        if steady:
            assert not step.has_faults, [turn.error for turn in step.turns]
        return step

    monkeypatch.setattr(engine_module, "launch", watched)
    answers(model, [(random_prompt(300, i), RECIPES["exact"], one) for i, one in enumerate(params)])
    assert len(launched) > 60


@pytest.mark.parametrize("in_host_memory", [False, True])
@pytest.mark.parametrize("name", ["exact", "kivi", "streaming", "xkv", "sluice", "sluice-lowrank"])
def test_replays_in_blocks_are_the_steps_one_by_one(name, in_host_memory, model, monkeypatch):
    """Another request decodes beside them; what is replayed passes seals, and goes on in captured steps."""
    told = 77
    requests = [(random_prompt(900 + 331 * i, i), RECIPES[name], GREEDY) for i in range(3)]

    def host():
        return HostPages(64 << 20, model.device, 1 << 16) if in_host_memory else None

    expected = answers(model, requests, host())
    known = {request[0]: choices[0] for request, choices in zip(requests[1:], expected[1:], strict=True)}

    def replayed(call):
        call._send(call.packer.flush())
        ids = known.get(call.job.prompt_ids, [call.sampled[0][0].token_id])[:told]
        call.decode.commit(call.job.request_id, call.job.prompt_ids, [EmittedChoice(tuple(ids))])

    monkeypatch.setattr(pipeline_module._Call, "on_done", replayed)
    got = answers(model, requests, host())
    # where chunks are nearly as good as others, rounding decides which are read
    least = 0.5 if "sluice" in name else 1.0
    assert same_share(got[0], expected[0]) >= least
    for own, other in zip(got[1:], expected[1:], strict=True):
        assert len(own[0]) == 1 + GREEDY.max_tokens - told
        assert same_share([own[0][1:]], [other[0][told:]]) >= least
