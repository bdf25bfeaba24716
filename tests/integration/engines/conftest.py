"""A tiny random model, engines that are checked for leaks after every test, and a sink that records."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from kvsluice.compression.recipe import Recipe, get_recipe, resolve
from kvsluice.evals.pipeline import LocalPipeline
from kvsluice.models.config import ModelConfig, config_from_hf
from kvsluice.models.model import Model
from kvsluice.models.sampling import SamplingParams
from kvsluice.models.weights import random_weights
from kvsluice.services.decode.engine import (
    DecodeEngine,
    DecodeRequest,
    EmittedChoice,
    Event,
    FailedEvent,
    FinishedEvent,
    TokensEvent,
)
from kvsluice.services.prefill.engine import PrefillEngine, PrefillJob

VOCAB = 97


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


def tiny_config(num_layers: int = 4, **more) -> ModelConfig:
    raw = {
        "model_type": "llama",
        "num_hidden_layers": num_layers,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "eos_token_id": 1,
    }
    return config_from_hf(raw | more)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Model]:
    def make(num_layers: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32, **more) -> Model:
        config = tiny_config(num_layers, **more)
        weights = random_weights(config, dtype, torch.device("cpu"), seed)
        return Model(config, weights, fingerprint=f"tiny-{num_layers}-{seed}")

    return make


@pytest.fixture(scope="session")
def model(make_model) -> Model:
    return make_model()


@pytest.fixture(scope="session")
def prompt() -> Callable[..., tuple[int, ...]]:
    """prompt(length, seed) -> token ids without the end-of-text id."""

    def make(length: int, seed: int = 0) -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randint(2, VOCAB, (length,), generator=generator).tolist())

    return make


@dataclass
class RecordingSink:
    """Keeps what prefill hands over, and the order of all calls of all sinks that share `log`."""

    name: str
    log: list[tuple] = field(default_factory=list)
    layers: list = field(default_factory=list)
    sampled: list = field(default_factory=list)
    error: Exception | None = None
    num_ends: int = 0
    is_ready: Callable[[], bool] = lambda: True
    on_call: Callable[[str, int | None], None] = lambda verb, layer: None

    def _record(self, verb: str, layer: int | None = None) -> None:
        self.log.append((self.name, verb, layer))  # first: the engine catches what a sink raises
        assert self.num_ends == 0, "nothing follows the last call"
        self.on_call(verb, layer)

    def ready(self) -> bool:
        return self.is_ready()

    def on_layer_start(self, layer: int) -> None:
        self._record("start", layer)

    def on_layer(self, encoded) -> None:
        self._record("layer", encoded.layer)
        self.layers.append(encoded)

    def on_first_tokens(self, sampled: list) -> None:
        self._record("tokens")
        self.sampled = sampled

    def on_done(self) -> None:
        self._record("done")
        self.num_ends += 1

    def on_error(self, error: Exception) -> None:
        self._record("error")
        self.error = error
        self.num_ends += 1

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.sampled]


@pytest.fixture
def sink() -> type[RecordingSink]:
    return RecordingSink


def greedy(max_tokens: int = 8, **more) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **more)


def drawn(max_tokens: int = 8, **more) -> SamplingParams:
    """Random tokens: a difference anywhere shows, where greedy answers of a random model fall into loops."""
    return SamplingParams(max_tokens=max_tokens, temperature=1.0, ignore_eos=True, **more)


@pytest.fixture
def sampling() -> SimpleNamespace:
    return SimpleNamespace(greedy=greedy, drawn=drawn)


@pytest.fixture
def prefill(model, prompt) -> SimpleNamespace:
    """engine(...) and job(...) with the tiny model."""

    def engine(chunk: int = 16, pack: int = 32, model: Model = model, **more) -> PrefillEngine:
        return PrefillEngine(model, chunk_tokens=chunk, max_pack_tokens=pack, **more)

    def job(name: str, ids: Sequence[int], params: SamplingParams | None = None, recipe: str = "exact") -> PrefillJob:
        return PrefillJob(name, 1, tuple(ids), get_recipe(recipe), params or greedy())

    def run(engine: PrefillEngine) -> int:
        steps = 0
        while engine.step():
            steps += 1
        return steps

    return SimpleNamespace(engine=engine, job=job, run=run)


@dataclass
class Encoded:
    """A prompt that went through prefill."""

    ids: tuple[int, ...]
    recipe: Recipe
    params: SamplingParams
    layers: list
    first: list[EmittedChoice]


@pytest.fixture
def encode(model) -> Callable[..., Encoded]:
    """encode(ids, params, recipe, model) -> the prompt's layers and first tokens."""

    def run(
        ids: Sequence[int], params: SamplingParams, recipe: Recipe | str = "exact", model: Model = model
    ) -> Encoded:
        engine = PrefillEngine(model, chunk_tokens=64, max_pack_tokens=256)
        if isinstance(recipe, str):
            recipe = get_recipe(recipe)
        resolved = resolve(recipe, engine.shape, len(ids), {}).recipe
        sink = RecordingSink("encode")
        engine.submit(PrefillJob("encode", 1, tuple(ids), resolved, params), sink)
        while engine.step():
            pass
        assert sink.error is None, sink.error
        first = [EmittedChoice((token.token_id,), token.finish_reason) for token in sink.sampled]
        return Encoded(tuple(ids), resolved, params, sink.layers, first)

    return run


@dataclass
class DecodeBench:
    """A decode engine and everything it told."""

    engine: DecodeEngine
    events: list[Event] = field(default_factory=list)
    replayed: int = 0  # tokens of the request that was fed last

    def open(self, name: str, encoded: Encoded, credits: int | None = None, keep_every: int | None = None) -> None:
        size = len(encoded.ids)
        self.engine.open(DecodeRequest(name, 1, size, encoded.recipe, encoded.params, credits, keep_every))

    def feed(self, name: str, encoded: Encoded, emitted: list[EmittedChoice] | None = None) -> None:
        for layer in encoded.layers:
            self.engine.add_layer(name, layer)
        self.replayed = self.engine.commit(name, encoded.ids, emitted or encoded.first)

    def start(
        self, name: str, encoded: Encoded, emitted: list[EmittedChoice] | None = None, credits=None, keep_every=None
    ) -> None:
        self.open(name, encoded, credits, keep_every)
        self.feed(name, encoded, emitted)

    def step(self) -> list[Event]:
        events = self.engine.step()
        self.engine.check_integrity()
        self.events += events
        return events

    def run(self) -> list[Event]:
        """Step until there is nothing to do. Returns all events so far."""
        while self.engine.has_work:
            self.step()
        return self.events

    def of(self, name: str, kind: type) -> list:
        return [event for event in self.events if event.request_id == name and isinstance(event, kind)]

    def tokens(self, name: str, choice: int = 0) -> list[int]:
        """Tokens that were told, in order; their indices must be without gap."""
        told = [event for event in self.of(name, TokensEvent) if event.choice == choice]
        indices = [e.first_index for e in told]
        assert indices == list(range(indices[0], indices[0] + len(indices))) if indices else True
        return [token.token_id for event in told for token in event.sampled]

    def ended(self, name: str) -> FinishedEvent | FailedEvent:
        ends = self.of(name, (FinishedEvent, FailedEvent))
        assert len(ends) == 1, f"{name} ended {len(ends)} times"
        return ends[0]


@pytest.fixture(params=[False, True], ids=["waiting", "lookahead"])
def lookahead(request) -> bool:
    """Whether decode engines launch a step before the one under way is settled; every test runs both ways."""
    return request.param


@pytest.fixture
def bench(model, lookahead) -> Iterator[Callable[..., DecodeBench]]:
    """bench(...) -> a decode engine; when the test ends its memory must be at the baseline."""
    made: list[DecodeBench] = []

    def make(model: Model = model, capacity_bytes: int = 64 << 20, **more) -> DecodeBench:
        made.append(DecodeBench(DecodeEngine(model, capacity_bytes, **{"lookahead": lookahead} | more)))
        return made[-1]

    yield make
    for bench in made:
        bench.engine.check_integrity()
        bench.step()
        live = {event.request_id for event in bench.events} - {
            event.request_id for event in bench.events if isinstance(event, (FinishedEvent, FailedEvent))
        }
        assert not live, f"requests without an end: {live}"
        assert bench.engine.free_bytes == bench.engine.capacity_bytes
        assert (bench.engine.num_running, bench.engine.num_waiting) == (0, 0)
    gc.collect()


@pytest.fixture
def pipeline(model) -> Iterator[Callable[..., LocalPipeline]]:
    """pipeline(...) -> both engines; when the test ends nothing may be left in them."""
    made: list[LocalPipeline] = []

    def make(model: Model = model, **more) -> LocalPipeline:
        made.append(LocalPipeline(model, **{"chunk_tokens": 64, "max_pack_tokens": 256} | more))
        return made[-1]

    yield make
    for pipeline in made:
        pipeline.check_integrity()
