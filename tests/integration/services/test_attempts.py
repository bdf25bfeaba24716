"""What is late from one attempt at a request does not reach another attempt under the same id."""

from __future__ import annotations

import asyncio
import threading

import grpc
import pytest

from kvsluice.compression.recipe import get_recipe
from kvsluice.errors import RequestCancelled
from kvsluice.kvstore.frame import DType, Kind, TensorSlice, encode_frame
from kvsluice.kvstore.identity import FrameIdent
from kvsluice.protos import worker_pb2 as wpb
from kvsluice.protos.worker_pb2_grpc import DecodeWorkerStub
from kvsluice.services.decode.receiver import Receiver
from kvsluice.services.lifecycle import EngineThread

WAIT_S = 10.0


async def test_a_prompt_cancelled_while_the_engine_takes_it_is_not_kept(monkeypatch, real_fleet):
    entered, go = threading.Event(), threading.Event()
    submit = real_fleet.prefill.submit

    def slow(*args):
        entered.set()
        go.wait(WAIT_S)
        submit(*args)

    left = asyncio.Event()
    call = EngineThread.call

    async def watched(self, command):
        try:
            return await call(self, command)
        except asyncio.CancelledError:
            left.set()
            raise

    options = {"request_id": "same", "max_tokens": 3, "ignore_eos": True}
    with monkeypatch.context() as patch:
        patch.setattr(real_fleet.prefill, "submit", slow)
        patch.setattr(EngineThread, "call", watched)
        first = asyncio.ensure_future(real_fleet.client.generate([5] * 300, **options))
        assert await asyncio.to_thread(entered.wait, WAIT_S)
        assert await real_fleet.client.cancel("same")
        with pytest.raises(RequestCancelled):
            await first
        await asyncio.wait_for(left.wait(), WAIT_S)
        go.set()
    await real_fleet.until_idle()
    assert len((await real_fleet.client.generate([6] * 20, **options)).token_ids) == 3


async def test_a_late_layer_does_not_touch_the_next_attempt(monkeypatch, real_fleet):
    placed, go = threading.Event(), threading.Event()
    place = Receiver._place

    def slow(self, data):
        out = place(self, data)
        placed.set()
        go.wait(WAIT_S)
        return out

    monkeypatch.setattr(Receiver, "_place", slow)
    recipe = get_recipe("exact")
    sampling = wpb.Sampling(max_tokens=4, top_p=1, repetition_penalty=1, n=1)

    def opening(epoch: int) -> wpb.ToDecode:
        recipe_json = recipe.to_json()
        body = {"num_prompt_tokens": 8, "recipe_json": recipe_json, "sampling": sampling, "credits": 4}
        return wpb.ToDecode(open=wpb.Open(request_id="r", epoch=epoch, **body))

    fingerprints = {"model_fingerprint": real_fleet.fingerprint, "recipe_fingerprint": recipe.fingerprint}
    ident = FrameIdent(request_id="r", epoch=5, tenant="", **fingerprints)
    item = TensorSlice(0, Kind.KEYS, "k", DType.FLOAT32, (16,), 0, 16, 0, 1, memoryview(bytes(64)))
    async with grpc.aio.insecure_channel(real_fleet.decode_address) as channel:
        call = DecodeWorkerStub(channel).Attach()
        await call.write(opening(5))
        assert (await call.read()).opened.epoch == 5
        frames = DecodeWorkerStub(channel).PutFrames()
        await frames.write(wpb.FramePut(frame=encode_frame(ident, (0, 8), [item])))
        assert await asyncio.to_thread(placed.wait, WAIT_S)
        await call.write(wpb.ToDecode(cancel=wpb.Cancel(request_id="r", epoch=5)))
        await call.write(opening(6))
        assert (await call.read()).opened.epoch == 6
        go.set()
        assert await frames.code() is grpc.StatusCode.CANCELLED
        await call.write(wpb.ToDecode(cancel=wpb.Cancel(request_id="r", epoch=6)))
        await call.write(opening(7))
        answer = await call.read()
        assert answer.WhichOneof("message") == "opened", answer
        assert answer.opened.epoch == 7
        call.cancel()
