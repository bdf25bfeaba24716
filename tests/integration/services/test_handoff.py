"""Layers on their way out of a prefill worker: packed beside the engine, in order, and gone with the request."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from kvsluice.errors import KvsluiceError
from kvsluice.services.framing import FramePacker
from kvsluice.services.prefill.publisher import MAX_LAYERS

WAIT_S = 10.0


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 256, (length,), generator=generator).tolist()


@pytest.fixture
def hold(monkeypatch):
    """`hold(request_id)`: until the event that it returns is set, none of that request's layers is packed."""
    add, held = FramePacker.add, {}

    def waiting(self, encoded, after=None):
        if self._ident.request_id in held:
            assert held[self._ident.request_id].wait(WAIT_S)
        return add(self, encoded, after)

    def hold(request_id):
        held[request_id] = threading.Event()
        return held[request_id]

    monkeypatch.setattr(FramePacker, "add", waiting)
    yield hold
    for event in held.values():
        event.set()


def started(fleet, request_id):
    return [e.fields["layer"] for e in fleet.recorder.events("prefill.layer_started", request_id=request_id)]


async def test_layers_that_are_not_packed_hold_back_their_prompt_alone(real_fleet, hold, until):
    options = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
    wanted = await real_fleet.client.generate(prompt(200), **options)
    go = hold("held")
    stream = real_fleet.client.stream(prompt(200), request_id="held", **options)
    await until(lambda: len(started(real_fleet, "held")) == MAX_LAYERS)
    other = await real_fleet.client.generate(prompt(300, 1), **options)
    assert len(other.token_ids) == 4
    assert started(real_fleet, "held") == list(range(MAX_LAYERS))
    go.set()
    got = [token for chunk in [c async for c in stream] for token in chunk.token_ids]
    assert tuple(got) == tuple(wanted.token_ids)
    assert started(real_fleet, "held") == list(range(4))


async def test_a_cancelled_prompt_leaves_no_layer_behind(real_fleet, hold, until):
    go = hold("gone")
    stream = real_fleet.client.stream(prompt(200), request_id="gone", max_tokens=4)
    await until(lambda: len(started(real_fleet, "gone")) == MAX_LAYERS)
    (running,) = real_fleet.prefill._running.values()
    queue = running.sink._layers
    await until(queue.qsize)  # a layer has started before it is given on
    layers = [weakref.ref(item[0]) for item in queue._queue]
    del running, queue
    assert await real_fleet.client.cancel("gone")
    with pytest.raises(KvsluiceError):
        async for _ in stream:
            pass
    del stream
    go.set()
    await real_fleet.until_idle()
    await until(lambda: gc.collect() is not None and all(layer() is None for layer in layers))


async def test_a_layer_that_cannot_be_packed_ends_its_request_alone(real_fleet, monkeypatch, caplog):
    add = FramePacker.add

    def broken(self, encoded, after=None):
        if self._ident.request_id == "bad" and encoded.layer == 1:
            raise RuntimeError("a secret")
        return add(self, encoded, after)

    monkeypatch.setattr(FramePacker, "add", broken)
    with pytest.raises(KvsluiceError) as caught:
        await real_fleet.client.generate(prompt(200), request_id="bad", max_tokens=4, ignore_eos=True)
    assert "secret" not in str(caught.value) + caplog.text
    assert "packing layer 1 of request bad failed" in caplog.text
    done = await real_fleet.client.generate(prompt(200), max_tokens=4, ignore_eos=True)
    assert len(done.token_ids) == 4
