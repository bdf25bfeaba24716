"""Frames on their way to a decode worker: no more are under way than it grants by its acknowledgements."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
import torch

from kvsluice.compression.interfaces import EncodedLayer, Part
from kvsluice.compression.recipe import get_recipe
from kvsluice.errors import KvsluiceError
from kvsluice.kvstore.identity import FrameIdent
from kvsluice.models.sampling import Sampled, SamplingParams
from kvsluice.protos import worker_pb2 as wpb
from kvsluice.services.prefill.engine import PrefillJob
from kvsluice.services.prefill.publisher import Publisher
from kvsluice.services.staging import PlainCopies
from kvsluice.services.telemetry import NullRecorder

WINDOW, ROWS, LAYERS = 3, 4096, 3
IDENT = FrameIdent(request_id="r", epoch=1, tenant="t", model_fingerprint="m", recipe_fingerprint="c")


class Call:
    """The stream to a decode worker that acknowledges when it is told to."""

    def __init__(self) -> None:
        self.written: list[wpb.FramePut] = []
        self.acks: asyncio.Queue[wpb.FrameAck | None] = asyncio.Queue()
        self.num_acked = 0
        self.ended_with, self.has_ended = grpc.StatusCode.OK, False

    async def write(self, message: wpb.FramePut) -> None:
        if self.has_ended:
            raise asyncio.InvalidStateError
        self.written.append(message)

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> wpb.FrameAck:
        ack = await self.acks.get()
        if ack is None:
            raise StopAsyncIteration
        return ack

    def grant(self) -> None:
        committed = self.num_acked < len(self.written) and bool(self.written[self.num_acked].manifest)
        self.acks.put_nowait(wpb.FrameAck(index=self.num_acked, committed=committed))
        self.num_acked += 1
        if committed:
            self.acks.put_nowait(None)

    async def done_writing(self) -> None: ...
    def cancel(self) -> None: ...

    async def code(self) -> grpc.StatusCode:
        return self.ended_with

    async def trailing_metadata(self) -> Any:
        return grpc.aio.Metadata()

    async def details(self) -> str:
        return "gone"


class Stub:
    def __init__(self, call: Call) -> None:
        self.PutFrames = lambda metadata=None: call


def layer(index: int) -> EncodedLayer:
    """Four frames."""
    return EncodedLayer(index, {Part.TAIL: {name: torch.zeros(ROWS, 2, 64) for name in "kv"}})


async def settled(call: Call, until) -> None:
    """Wait for a state, and a while more for what must not follow it."""
    async with asyncio.timeout(20):
        while not until():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    for _ in range(20):
        await asyncio.sleep(0.002)


def published(wakes: list[int]) -> tuple[Publisher, list[wpb.PrefillEvent], Any]:
    job = PrefillJob("r", 1, tuple(range(3, 9)), get_recipe("exact"), SamplingParams(max_tokens=5))
    publisher = Publisher(
        job, IDENT, WINDOW, PlainCopies(), lambda: wakes.append(1), asyncio.get_running_loop(), NullRecorder()
    )
    events: list[wpb.PrefillEvent] = []

    async def write(event: wpb.PrefillEvent) -> None:
        events.append(event)

    return publisher, events, write


async def test_no_more_frames_are_under_way_than_are_granted():
    call, wakes = Call(), list[int]()
    publisher, events, write = published(wakes)
    running = asyncio.create_task(publisher.run(Stub(call), write))  # type: ignore[arg-type]
    for index in range(LAYERS):
        publisher.on_layer(layer(index))
    publisher.on_first_tokens([Sampled(5)])
    publisher.on_done()
    await settled(call, lambda: len(call.written) == WINDOW)
    assert len(call.written) == WINDOW and not publisher.ready()
    while not running.done():
        call.grant()
        await settled(call, lambda: running.done() or len(call.written) - call.num_acked in (WINDOW, 0))
        assert len(call.written) - call.num_acked <= WINDOW
        if call.written[-1].manifest:
            while call.num_acked < len(call.written):
                call.grant()
            await running
    frames = [message for message in call.written if message.frame]
    assert len(frames) > 2 * WINDOW and call.written[-1].manifest
    assert [event.WhichOneof("event") for event in events] == ["first_tokens", "shipped"]
    assert publisher.ready() and wakes


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.OK])
async def test_a_receiver_that_ends_is_not_waited_for(code):
    call = Call()
    publisher, _, write = published([])
    running = asyncio.create_task(publisher.run(Stub(call), write))  # type: ignore[arg-type]
    publisher.on_layer(layer(0))
    await settled(call, lambda: len(call.written) == WINDOW)
    call.ended_with, call.has_ended = code, True
    call.acks.put_nowait(None)
    async with asyncio.timeout(20):
        with pytest.raises(KvsluiceError):
            await running
