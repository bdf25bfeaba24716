"""The handoff over gRPC: the service's publisher and receiver on the two ends of a loopback connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from threading import Event
from typing import TYPE_CHECKING, Any

from ..compression.interfaces import EncodedLayer
from ..models.sampling import Sampled
from ..protos import worker_pb2 as wpb
from ..protos.worker_pb2_grpc import DecodeWorkerServicer, DecodeWorkerStub, add_DecodeWorkerServicer_to_server
from ..services.decode.engine import DecodeEngine, EmittedChoice
from ..services.decode.receiver import Receiver
from ..services.prefill.engine import PrefillJob
from ..services.prefill.publisher import Publisher
from ..services.rpc import bind, join_address, make_channel, make_server
from ..services.security import FleetGuard
from ..services.telemetry import NullRecorder
from .timing import synchronize

if TYPE_CHECKING:
    from ..services.decode.kept_sessions import SessionTurn
    from .bench_handoff import Handoff

HOST = "127.0.0.1"
MAX_MESSAGE_BYTES = 16 << 20
WINDOW = 8  # frames on their way, as the service has it


class _EngineTarget:
    """Hands what a receiver has put together to a decode engine."""

    def __init__(self, engine: DecodeEngine, request_id: str) -> None:
        self._engine = engine
        self._request_id = request_id

    async def add_layer(self, encoded: EncodedLayer) -> None:
        await asyncio.to_thread(self._engine.add_layer, self._request_id, encoded)

    async def commit(self, prompt_ids: Sequence[int], emitted: Sequence[EmittedChoice]) -> None:
        self._engine.commit(self._request_id, prompt_ids, emitted)

    async def adopt(self, turn: SessionTurn) -> bool:
        return False  # all that is measured comes by frames


class _Servicer(DecodeWorkerServicer):
    """Takes the frames of one request at a time."""

    def __init__(self, handoff: Handoff) -> None:
        self._handoff = handoff
        self.engine: DecodeEngine | None = None

    async def PutFrames(self, request_iterator: AsyncIterator[wpb.FramePut], context: Any) -> None:
        """See `worker.proto`."""
        handoff, engine = self._handoff, self.engine
        assert engine is not None, "a run opens an engine first"
        target = _EngineTarget(engine, handoff.request.request_id)
        num_layers = handoff.bench.subject.shape.num_layers
        receiver = Receiver(handoff.ident, num_layers, handoff.capacity_bytes, target, context.write, NullRecorder())
        async for message in request_iterator:
            await receiver.take(message)


class Loopback:
    """Runs a handoff through gRPC.

    Args:
        handoff: what is handed over.
    """

    def __init__(self, handoff: Handoff) -> None:
        self._handoff = handoff

    def run(self, repeats: int) -> list[float]:
        """Seconds of each run, from the first layer to the acknowledgement of the manifest."""
        return asyncio.run(self._run(repeats))

    async def _run(self, repeats: int) -> list[float]:
        servicer = _Servicer(self._handoff)
        server = make_server(MAX_MESSAGE_BYTES, FleetGuard(()))
        add_DecodeWorkerServicer_to_server(servicer, server)
        port = bind(server, HOST, 0)
        await server.start()
        try:
            async with make_channel(join_address(HOST, port), MAX_MESSAGE_BYTES) as channel:
                stub = DecodeWorkerStub(channel)
                return [await self._once(servicer, stub) for _ in range(repeats)]
        finally:
            await server.stop(None)

    async def _once(self, servicer: _Servicer, stub: DecodeWorkerStub) -> float:
        handoff, loop, woken = self._handoff, asyncio.get_running_loop(), Event()
        servicer.engine = handoff.open()
        request = handoff.request
        prompt = handoff.bench.prompt(handoff.context)
        job = PrefillJob(request.request_id, request.epoch, prompt, handoff.recipe, request.sampling)
        publisher = Publisher(job, handoff.ident, WINDOW, handoff.copies, woken.set, loop, NullRecorder())

        def publish() -> None:
            """What the prefill engine's thread does."""
            publisher.on_first_tokens([Sampled(0)])
            for layer in handoff.layers:
                while not publisher.ready():
                    woken.wait(1.0)
                    woken.clear()
                publisher.on_layer(layer)
            publisher.on_done()

        async def forget(event: wpb.PrefillEvent) -> None:
            """A gateway's part, which is none of the handoff's."""

        synchronize(handoff.bench.device)
        began_s = time.perf_counter()
        await asyncio.gather(publisher.run(stub, forget), asyncio.to_thread(publish))
        synchronize(handoff.bench.device)
        took_s = time.perf_counter() - began_s
        servicer.engine = None
        return took_s
