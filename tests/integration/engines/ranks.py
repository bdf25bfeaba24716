"""One rank of a model that several processes hold together, for `test_ranks.py`: rank 0 prints what came of it.

python -P -m kvsluice.tests.integration.engines.ranks RANK SIZE ADDRESS
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kvsluice.compression.interfaces import EncodedLayer
from kvsluice.compression.recipe import get_recipe, resolve
from kvsluice.models.config import ModelConfig, config_from_hf
from kvsluice.models.model import Model
from kvsluice.models.parallel import Ranks, host_meeting, reach_meeting
from kvsluice.models.sampling import Sampled, SamplingParams
from kvsluice.models.weights import part_of_weights, random_weights
from kvsluice.services.decode.engine import (
    DecodeEngine,
    DecodeRequest,
    EmittedChoice,
    KeptRows,
    RowsEvent,
    TokensEvent,
)
from kvsluice.services.decode.parallel import Follower as DecodeFollower
from kvsluice.services.decode.parallel import LeadingEngine
from kvsluice.services.model_shape import model_shape
from kvsluice.services.prefill.engine import PrefillEngine, PrefillJob
from kvsluice.services.prefill.parallel import Follower as PrefillFollower

# nothing packed; low-rank keys, chosen chunks and rows; two tiers; layers that share; rows of each head
RECIPES = ("exact", "sluice", "mikv", "xkv-kv", "pyramidkv")
NUM_TOKENS = 300
CPU = torch.device("cpu")


def config() -> ModelConfig:
    return config_from_hf(
        {
            "model_type": "qwen2",  # which has biases
            "num_hidden_layers": 4,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "vocab_size": 97,
            "max_position_embeddings": 4096,
            "eos_token_id": 1,
        }
    )


@dataclass
class Sink:
    """What a prompt has become."""

    layers: list[EncodedLayer] = field(default_factory=list)
    first: list[Sampled] = field(default_factory=list)
    error: Exception | None = None
    done: bool = False

    def ready(self) -> bool:
        return True

    def on_layer_start(self, layer: int) -> None: ...

    def on_layer(self, encoded: EncodedLayer) -> None:
        self.layers.append(encoded)

    def on_first_tokens(self, sampled: list[Sampled]) -> None:
        self.first = sampled

    def on_done(self) -> None:
        self.done = True

    def on_error(self, error: Exception) -> None:
        self.error, self.done = error, True


def prompts() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(3)
    return [tuple(torch.randint(2, 97, (NUM_TOKENS + 7 * i,), generator=generator).tolist()) for i in range(2)]


def sampling(seed: int) -> SamplingParams:
    return SamplingParams(max_tokens=60, temperature=0.8 if seed else 0.0, seed=seed, n=1 + seed, ignore_eos=True)


def prefill(engine: PrefillEngine, name: str) -> list[Sink]:
    """Both prompts under a recipe, and one that is cancelled on its way."""
    sinks = []
    recipe = get_recipe(name)
    for i, ids in enumerate(prompts()):
        sinks.append(Sink())
        resolved = resolve(recipe, model_shape(engine.model.whole), len(ids), profile()).recipe
        engine.submit(PrefillJob(f"{name}-{i}", 1, ids, resolved, sampling(i)), sinks[-1])
        engine.submit(PrefillJob(f"{name}-{i}-cancelled", 1, ids, resolved, sampling(i)), gone := Sink())
    for step in range(10_000):
        if step == 3:
            engine.cancel(f"{name}-1-cancelled", gone)
        if not engine.step():
            break
    for sink in sinks:
        assert sink.done and sink.error is None, sink.error
    return sinks


def profile() -> dict[str, object]:
    return {
        "fastkv_layer": 1,
        "tsp_layer": 1,
        "tsp_rate": 0.4,
        "key_codec": {"kind": "lowrank", "rank": 24, "bits": 8},
    }


def decode(engine: DecodeEngine, name: str, sinks: Sequence[Sink]) -> tuple[list[list[int]], list[KeptRows]]:
    """Tokens of all choices of both prompts in one batch, and the rows of the first that were to be kept."""
    recipe, shape = get_recipe(name), model_shape(engine.model.whole)
    told: dict[tuple[str, int], list[int]] = {}
    kept: list[KeptRows] = []

    def step() -> None:
        for event in engine.step():
            if isinstance(event, TokensEvent):
                told[event.request_id, event.choice] += [token.token_id for token in event.sampled]
            elif isinstance(event, RowsEvent):
                kept.append(KeptRows(event.begin, event.layers))

    for i, (ids, sink) in enumerate(zip(prompts(), sinks, strict=True)):
        resolved = resolve(recipe, shape, len(ids), profile()).recipe
        request_id = f"{name}-{i}"
        every = 16 if i == 0 else None
        engine.open(DecodeRequest(request_id, 1, len(ids), resolved, sampling(i), None, every))
        step()
        for layer in sink.layers:
            engine.add_layer(request_id, layer, 1)
        emitted = [EmittedChoice((token.token_id,), token.finish_reason) for token in sink.first]
        told |= {(request_id, choice): [token.token_id] for choice, token in enumerate(sink.first)}
        engine.commit(request_id, ids, emitted, 1)
        engine.lengthen(request_id, 0, float("inf"), 1)
    while engine.has_work:
        step()
    engine.check_integrity()
    return list(told.values()), kept


def go_on(engine: DecodeEngine, name: str, sink: Sink, tokens: list[int], kept: list[KeptRows]) -> list[int]:
    """What the first prompt's answer becomes when it goes on behind half of it, from the rows that were kept."""
    ids = prompts()[0]
    resolved = resolve(get_recipe(name), model_shape(engine.model.whole), len(ids), profile()).recipe
    engine.open(DecodeRequest("again", 2, len(ids), resolved, sampling(0)))
    engine.step()
    for layer in sink.layers:
        engine.add_layer("again", layer, 2)
    half = len(tokens) // 2
    rows = [one for one in kept if one.end <= len(ids) + half - 1]
    out = tokens[:half]
    engine.commit("again", ids, [EmittedChoice(tuple(out), "", rows)], 2)
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, TokensEvent):
                out += [token.token_id for token in event.sampled]
    return out


def error_of(own: Sequence[EncodedLayer], other: Sequence[EncodedLayer]) -> float:
    """The largest share of the numbers of a tensor that are not about the same; rounding may move a code by one."""
    worst = 0.0
    for one, two in zip(own, other, strict=True):
        assert one.tensors.keys() == two.tensors.keys()
        for part, group in one.tensors.items():
            for name, tensor in group.items():
                a, b = tensor.double(), two.tensors[part][name].double()
                worst = max(worst, float(((a - b).abs() > 1e-4 + 0.02 * b.abs()).double().mean()))
    return worst


def lead(whole: Model, model: Model, ranks: Ranks) -> None:
    results = {}
    single, parallel = PrefillEngine(whole, 64, 128), PrefillEngine(model, 64, 128)
    of_single, of_ranks = {}, {}
    for name in RECIPES:
        of_single[name], of_ranks[name] = prefill(single, name), prefill(parallel, name)
    parallel.stop()
    alone, leading = (make(one, 1 << 28, 8, 8) for make, one in ((DecodeEngine, whole), (LeadingEngine, model)))
    for name in RECIPES:
        expected, _ = decode(alone, name, of_single[name])
        tokens, kept = decode(leading, name, of_single[name])
        results[name] = {
            "first_tokens_equal": [s.first == r.first for s, r in zip(of_single[name], of_ranks[name], strict=True)],
            "differing_share": max(
                error_of(s.layers, r.layers) for s, r in zip(of_single[name], of_ranks[name], strict=True)
            ),
            "tokens": tokens,
            "expected": expected,
            "kept_shape": list(next(iter(kept[0].layers[0].tensors.values()))["k"].shape) if kept else [],
        }
        results[name]["continued"] = go_on(leading, name, of_single[name][0], tokens[0], kept) == tokens[0]
    leading.stop()
    print(json.dumps({"fingerprint": model.fingerprint == whole.fingerprint, "recipes": results}))


def main() -> None:
    rank, size, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else ""
    torch.set_num_threads(1)
    others: list[subprocess.Popen[bytes]] = []
    if rank == 0:
        meeting, address = host_meeting("127.0.0.1")
        command = [sys.executable, "-P", "-m", "kvsluice.tests.integration.engines.ranks"]
        others = [subprocess.Popen([*command, str(one), str(size), address]) for one in range(1, size)]
    else:
        meeting = reach_meeting(address, "127.0.0.1")
    ranks = Ranks(rank, size, meeting, CPU)
    weights = random_weights(config(), torch.float32, CPU, 0)
    part = part_of_weights(config(), weights, torch.float32, CPU, rank, size)
    model = Model(config(), part, "tiny", ranks)
    if rank == 0:
        lead(Model(config(), weights, "tiny"), model, ranks)
        assert [other.wait(60) for other in others] == [0] * len(others), "the others end, too"
    else:
        PrefillFollower(model).run()
        DecodeFollower(DecodeEngine(model, 1 << 28, 8, 8)).run()


if __name__ == "__main__":
    main()
