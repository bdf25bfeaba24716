"""Layers encoded beside the next one, on a thread, as on a GPU: the same bits, in order, and nothing left behind."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvsluice.compression import slots
from kvsluice.compression.recipe import get_recipe, recipe_names, resolve
from kvsluice.errors import InternalError, RequestCancelled
from kvsluice.services.prefill import state
from kvsluice.services.prefill.encoding import InlineEncoder, SideEncoder, make_encoder
from kvsluice.services.prefill.engine import PrefillJob

WAIT_S = 10.0


class Side:
    """A device with one stream, and a note of what crossed. `go` holds the encoder's thread back."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.threads: set[int] = set()
        self.left: list[int] = []
        self.joined: list[int] = []

    def leave(self, tensors: Iterable[Tensor]) -> str:
        self.left.append(len(list(tensors)))
        return "ready"

    @contextmanager
    def working(self, ready: str) -> Iterator[None]:
        assert ready == "ready" and not torch.is_grad_enabled()
        assert self.go.wait(WAIT_S)
        self.threads.add(threading.get_ident())
        yield

    def finish(self) -> str:
        return "done"

    def join(self, done: str, tensors: Iterable[Tensor]) -> None:
        assert done == "done"
        self.joined.append(len(list(tensors)))


@pytest.fixture
def side() -> Iterator[Side]:
    made = Side()
    yield made
    made.go.set()


def job(engine, name: str, ids, params, recipe: str) -> PrefillJob:
    made = get_recipe(recipe)
    if isinstance(made.retrieval, slots.ChunkLandmarks):  # fewer rows than the prompts here have
        made = replace(made, retrieval=replace(made.retrieval, budget_tokens=128))
    profile = {"tsp_layer": 1, "fastkv_layer": 1, "tsp_rate": 0.4}
    resolved = resolve(made, engine.shape, len(ids), profile)
    assert resolved.fallback_reason is None
    return PrefillJob(name, 1, tuple(ids), resolved.recipe, params)


@pytest.mark.parametrize("recipe", recipe_names())
def test_layers_are_the_same_bits_in_the_same_order(prefill, prompt, sink, sampling, side, recipe) -> None:
    outs = []
    for encoder in (InlineEncoder(), SideEncoder(side)):
        engine, together = prefill.engine(chunk=64, pack=256, encoder=encoder), [sink("a"), sink("b")]
        for out, length in zip(together, (700, 900), strict=True):
            engine.submit(job(engine, out.name, prompt(length, length), sampling.greedy(), recipe), out)
        prefill.run(engine)
        outs.append(together)
    for inline, beside in zip(*outs, strict=True):
        assert beside.error is inline.error is None
        assert beside.token_ids == inline.token_ids
        assert [layer.layer for layer in beside.layers] == [layer.layer for layer in inline.layers] == [0, 1, 2, 3]
        assert beside.log[-1] == inline.log[-1] == (beside.name, "done", None)
        for got, want in zip(beside.layers, inline.layers, strict=True):
            assert [*got.tensors] == [*want.tensors]
            for part, group in want.tensors.items():
                assert [*got.tensors[part]] == [*group]
                for name, tensor in group.items():
                    assert torch.equal(got.tensors[part][name].view(torch.uint8), tensor.view(torch.uint8))
    assert len(side.threads) == 1 and threading.get_ident() not in side.threads
    assert len(side.left) == len(side.joined) == 8


def test_the_next_layer_runs_meanwhile_and_no_further(prefill, prompt, sink, side) -> None:
    engine, out = prefill.engine(chunk=16, pack=16, encoder=SideEncoder(side)), sink("a")
    engine.submit(prefill.job("a", prompt(48)), out)
    side.go.clear()
    for _ in range(5):
        assert engine.step()
    # three packs a layer: the sixth step ends the second layer and would wait for the first one's encoding
    assert out.log == [("a", "start", 0), ("a", "start", 1)]
    side.go.set()
    prefill.run(engine)
    layers = [event for event in out.log if event[1] in ("start", "layer")]
    for layer in range(2):
        assert layers.index(("a", "layer", layer)) < layers.index(("a", "start", layer + 2))
    assert out.log[-3:] == [("a", "tokens", None), ("a", "layer", 3), ("a", "done", None)] or (
        out.log[-4:] == [("a", "tokens", None), ("a", "layer", 2), ("a", "layer", 3), ("a", "done", None)]
    )


def test_what_is_encoded_reaches_a_sink_that_holds_its_prompt_back(prefill, prompt, sink, side) -> None:
    engine, out = prefill.engine(chunk=64, pack=64, encoder=SideEncoder(side)), sink("a")
    engine.submit(prefill.job("a", prompt(48)), out)
    assert engine.step()
    out.is_ready = lambda: False
    while engine.step():
        pass
    assert out.log == [("a", "start", 0), ("a", "layer", 0)]
    out.is_ready = lambda: True
    prefill.run(engine)
    assert out.log[-1] == ("a", "done", None)


def test_a_prompt_cancelled_while_its_layer_is_encoded_leaves_nothing(prefill, prompt, sink, side) -> None:
    engine, out = prefill.engine(chunk=64, pack=64, encoder=SideEncoder(side)), sink("a")
    engine.submit(prefill.job("a", prompt(48)), out)
    side.go.clear()
    assert engine.step()
    held = weakref.ref(engine._running["a"].prompt)
    assert engine.cancel("a")
    assert isinstance(out.error, RequestCancelled)
    assert not engine.step()
    assert engine.num_requests == 0 and held() is None
    side.go.set()
    other = sink("b")
    engine.submit(prefill.job("b", prompt(48)), other)
    prefill.run(engine)
    assert other.error is None and out.layers == []


def test_a_fault_of_the_encoder_fails_its_prompt_alone_and_keeps_no_tensor(
    monkeypatch, prefill, prompt, sink, side
) -> None:
    make, seen = state.make_compressor, []

    def faulty(recipe, shape):
        compressor = make(recipe, shape)
        finish = compressor.finish_layer

        def finish_layer(obs):
            if obs.num_prompt_tokens == 48 and obs.layer == 1:
                local = obs.k.clone()
                seen.append(weakref.ref(local))
                raise RuntimeError("no convergence")
            return finish(obs)

        compressor.finish_layer = finish_layer
        return compressor

    monkeypatch.setattr(state, "make_compressor", faulty)
    engine, outs = prefill.engine(encoder=SideEncoder(side)), [sink("a"), sink("b")]
    for out, length in zip(outs, (48, 50), strict=True):
        engine.submit(prefill.job(out.name, prompt(length)), out)
    prefill.run(engine)
    assert isinstance(outs[0].error, InternalError)
    assert outs[1].error is None and len(outs[1].layers) == 4
    gc.collect()
    assert [ref() for ref in seen] == [None]


def test_rows_that_a_layer_lets_go_of_too_late_are_an_error(monkeypatch, prefill, prompt, sink, side) -> None:
    make = state.make_compressor

    def late(*args):
        compressor = make(*args)
        finish = compressor.finish_layer
        compressor.finish_layer = lambda obs: (finish(obs)[0], torch.tensor([0, 47]))
        return compressor

    monkeypatch.setattr(state, "make_compressor", late)
    engine, out = prefill.engine(encoder=SideEncoder(side)), sink("a")
    engine.submit(prefill.job("a", prompt(48)), out)
    prefill.run(engine)
    assert isinstance(out.error, InternalError)


def test_a_cpu_encodes_in_the_engines_thread() -> None:
    assert isinstance(make_encoder(torch.device("cpu")), InlineEncoder)
