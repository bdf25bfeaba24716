"""Memory that runs out inside a decode step costs time: the step runs again in parts, and tokens are what they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvsluice.compression.kept_choice import KeptChoice
from kvsluice.compression.layer_cache import LayerCache
from kvsluice.compression.recipe import get_recipe
from kvsluice.errors import OutOfMemory
from kvsluice.models.sampling import SamplingParams
from kvsluice.services.decode import engine as engine_module
from kvsluice.services.decode import launch as launch_module
from kvsluice.services.decode import step as step_module
from kvsluice.services.decode.engine import DecodeRequest, EmittedChoice, FinishedEvent, RowsEvent

SMALL = """{
    "retrieval": {"kind": "chunks", "chunk": 4, "outliers": 0, "budget_tokens": 32, "landmark_bits": 8},
    "window": {"kind": "ends", "sinks": 4, "local": 16, "seal_block": 16, "dtype": "bfloat16"}
}"""
RECIPES = ("exact", get_recipe("sluice-full", SMALL), "mikv", "streaming")
PARAMS = ({}, {"n": 2, "repetition_penalty": 1.4, "frequency_penalty": 0.3}, {"logprobs": 2, "top_k": 20}, {})


class Shortage(TorchDispatchMode):
    """Memory runs out at the `at`-th allocation; None = never."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.at, self.num_allocations = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func._schema.is_mutable and not func.is_view:
            self.num_allocations += 1
            if self.num_allocations == self.at:
                raise torch.OutOfMemoryError("secret")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def model(make_model):
    """Every layer is as good as any."""
    return make_model(2)


@pytest.fixture
def lookahead() -> bool:
    return True


@pytest.fixture
def requests(encode, prompt):
    """Of several recipes and ways of sampling."""
    return {
        str(i): encode(prompt(160 + 9 * i, i), SamplingParams(max_tokens=60, ignore_eos=True, seed=i, **params), recipe)
        for i, (recipe, params) in enumerate(zip(RECIPES, PARAMS, strict=True))
    }


def run(bench, requests, around: Callable[[int], object] = lambda step: nullcontext(), **settings):
    """Decode them together; `around` gives what a step's launch happens in. Returns the bench and all tokens."""
    b, launch, steps = bench(**settings), launch_module.launch, []

    def watched(*args):
        steps.append(None)
        with around(len(steps) - 1):
            return launch(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "launch", watched)
        for name, encoded in requests.items():
            b.start(name, encoded, keep_every=8)
            for choice in range(encoded.params.n):
                b.engine.lengthen(name, choice, float("inf"))
        b.run()
    return b, {(name, c): b.tokens(name, c) for name, one in requests.items() for c in range(one.params.n)}


def kept_rows(b) -> dict[tuple[str, int, int], list[torch.Tensor]]:
    rows = [event for event in b.events if isinstance(event, RowsEvent)]
    return {
        (event.request_id, event.choice, event.begin): [
            t for layer in event.layers for group in layer.tensors.values() for t in group.values()
        ]
        for event in rows
    }


def test_no_allocation_of_a_step_is_one_that_may_not_fail(bench, requests, monkeypatch) -> None:
    """Over steps that seal blocks, count tokens and keep rows, at another one in every step."""
    packed, pack = [], LayerCache._packed_block
    monkeypatch.setattr(LayerCache, "_packed_block", lambda self: packed.append(self) or pack(self))
    plain, wanted = run(bench, requests)
    assert len(set(packed)) == 4 and len(packed) > 8, "two layers of two choices seal blocks, more than two each"
    rows, sizes = kept_rows(plain), []

    def counted(step: int) -> Shortage:
        sizes.append(Shortage(None))
        return sizes[-1]

    run(bench, requests, counted)
    counts = [size.num_allocations for size in sizes]
    for start in range(0, min(counts), min(counts) // 2):
        tried = []

        def short(step: int, start: int = start, tried: list = tried) -> Shortage:
            tried.append(Shortage(1 + (start + 7 * step) % counts[step]))
            return tried[-1]

        b, told = run(bench, requests, short)
        assert told == wanted
        assert all(isinstance(b.ended(name), FinishedEvent) for name in requests)
        assert sum(one.num_allocations > one.at for one in tried) > 50, "steps went on behind it"
        again = kept_rows(b)
        assert again.keys() == rows.keys()
        assert all(map(torch.equal, again[key], rows[key]) for key in rows)


@pytest.fixture
def room(monkeypatch) -> Iterator[Callable[[Callable[[list], bool]], list[int]]]:
    """room(fits) -> from now on a step has memory for some rows only; gives the sizes of what was tried."""

    def limit(fits: Callable[[list], bool]) -> list[int]:
        tried, forward = [], step_module.forward_rows

        def forward_rows(model, batch):
            hidden = forward(model, batch)  # first: the caches have the rows by then
            tried.append(sum(len(rows.ids) for rows in batch))
            if not fits(batch):
                raise torch.OutOfMemoryError("secret")
            return hidden

        monkeypatch.setattr(step_module, "forward_rows", forward_rows)
        return tried

    return limit


@pytest.mark.parametrize("most", [1, 2])
def test_a_batch_that_is_too_large_runs_in_parts(bench, requests, room, most: int) -> None:
    _, wanted = run(bench, requests)
    tried = room(lambda batch: len(batch) <= most)
    b, told = run(bench, requests, max_num_seqs=4)  # places in the step change, as there are five choices
    assert told == wanted
    assert all(isinstance(b.ended(name), FinishedEvent) for name in requests)
    assert max(tried) == 4 and min(tried) <= most


def test_a_sequence_that_has_no_room_alone_ends_so_that_others_may_go_on(bench, requests, room) -> None:
    _, wanted = run(bench, requests)
    room(lambda batch: all(len(rows.ids) < 2 and rows.num_prompt_tokens != 178 for rows in batch))
    b, told = run(bench, requests)
    error = b.ended("2").error
    assert isinstance(error, OutOfMemory) and error.retryable and "secret" not in error.message
    assert told == wanted | {("2", 0): []}
    assert all(isinstance(b.ended(name), FinishedEvent) for name in requests if name != "2")


EVERY = """{"retrieval": {"kind": "chunks", "chunk": 4, "outliers": 0, "budget_tokens": 32, "budget_rate": 0.05,
    "landmark_bits": 8, "select_every": 16}, "window": {"kind": "ends", "sinks": 4, "local": 16}}"""


@pytest.fixture
def attended(monkeypatch) -> dict[int, set]:
    """Position -> chunks that its row attended to in some layer, of recipes whose rows share them."""
    seen: dict[int, set] = {}
    settle = KeptChoice.settle

    def watched(self, positions, chosen, valid):
        out = settle(self, positions, chosen, valid)
        for position, chunks in zip(positions.tolist(), out[0].tolist(), strict=True):
            seen.setdefault(position, set()).add(str(chunks))
        return out

    monkeypatch.setattr(KeptChoice, "settle", watched)
    return seen


@pytest.mark.parametrize("recipe", ["exact", get_recipe("sluice-full", EVERY)], ids=["exact", "every-16"])
def test_a_long_append_that_is_too_large_runs_in_shorter_ones(bench, encode, prompt, room, attended, recipe) -> None:
    """Rows attend to the chunks that they would have, whatever later ones had chosen before they failed."""
    params = SamplingParams(max_tokens=6, ignore_eos=True, seed=1)
    encoded, more = encode(prompt(203), params, recipe), prompt(200, 7)
    begun = [EmittedChoice(more)]

    def told() -> tuple[list[int], dict[int, set]]:
        attended.clear()
        b = bench()
        b.engine.open(DecodeRequest("a", 1, 203, encoded.recipe, params, history_tokens=200))
        b.feed("a", encoded, begun)
        b.run()
        assert isinstance(b.ended("a"), FinishedEvent)
        return b.tokens("a"), dict(attended)

    wanted, chunks = told()
    assert bool(chunks) == (encoded.recipe.retrieval.select_every > 1)
    tried = room(lambda batch: sum(len(rows.ids) for rows in batch) <= 20)
    assert told() == (wanted, chunks)
    assert max(tried) > 64 and sum(size for size in tried if size <= 20) == 200 + 5


def test_a_layer_that_finds_no_memory_is_not_a_layer_that_does_not_fit(bench, requests, monkeypatch) -> None:
    def no_memory(self, encoded) -> None:
        raise torch.OutOfMemoryError("secret")

    b = bench()
    b.open("0", requests["0"])
    with monkeypatch.context() as patch:
        patch.setattr("kvsluice.compression.cache.RecipeCache.add_layer", no_memory)
        with pytest.raises(OutOfMemory):
            b.engine.add_layer("0", requests["0"].layers[0])
    b.run()
    assert isinstance(b.ended("0").error, OutOfMemory)
