"""A prefill worker's gRPC service: prompts in, first tokens out, frames on to the decode worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio

from ...compression.recipe import Recipe
from ...errors import InternalError
from ...models.model import Model
from ...models.sampling import SamplingParams
from ...protos import worker_pb2 as wpb
from ...protos import worker_pb2_grpc
from ...protos.worker_pb2_grpc import DecodeWorkerStub
from ..config import ServeConfig
from ..lifecycle import EngineThread
from ..rpc import make_channel
from ..security import FleetSecurity
from ..staging import make_host_copies
from ..telemetry import NullRecorder, Recorder, current_request_id
from ..tracing import incoming_trace, start_span
from ..worker import WorkerIdentity, sampling_fields, use_threads
from .engine import PrefillEngine, PrefillJob
from .prefix_memory import make_prefix_memory
from .publisher import Publisher
from .warm_up import plan_attention

PACK_TOKENS = 2048
CPU_CHUNK_TOKENS = 512


@dataclass
class _Peer:
    channel: grpc.aio.Channel
    users: int = 0


class _Peers:
    """Channels to decode workers, shared by requests; one that failed is closed with its last user."""

    def __init__(self, max_message_bytes: int, security: FleetSecurity) -> None:
        self._max_message_bytes, self._security = max_message_bytes, security
        self._peers: dict[str, _Peer] = {}

    @asynccontextmanager
    async def stub(self, address: str) -> AsyncIterator[DecodeWorkerStub]:
        peer = self._peers.get(address)
        if peer is None:
            peer = self._peers[address] = _Peer(make_channel(address, self._max_message_bytes, self._security))
        peer.users += 1
        try:
            yield DecodeWorkerStub(peer.channel)
        finally:
            peer.users -= 1
            ready = peer.channel.get_state() is grpc.ChannelConnectivity.READY
            if peer.users == 0 and not ready:
                if self._peers.get(address) is peer:
                    del self._peers[address]
                await peer.channel.close()

    async def close(self) -> None:
        for peer in self._peers.values():
            await peer.channel.close()
        self._peers.clear()


class PrefillService(worker_pb2_grpc.PrefillWorkerServicer):
    """Serves one prefill engine, which runs on a thread of its own.

    Args:
        window: frames of a request under way to its decode worker, at most, before its prompt is held back.
        security: what decode workers are shown.
        setup: settings of the engine's thread.
        on_crash: called when the engine's thread ends by an exception.
    """

    def __init__(
        self,
        engine: PrefillEngine,
        identity: WorkerIdentity,
        *,
        window: int,
        max_message_bytes: int,
        security: FleetSecurity | None = None,
        recorder: Recorder | None = None,
        setup: Callable[[], None] | None = None,
        on_crash: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.engine = engine
        self._identity, self.figures = identity, engine.figures
        self._window = window
        self._copies = make_host_copies(engine.model.device)
        self._recorder = recorder or NullRecorder()
        self._thread = EngineThread("prefill-engine", engine.step, setup, on_crash)
        self._peers = _Peers(max_message_bytes, security or FleetSecurity())

    def add_to(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_PrefillWorkerServicer_to_server(self, server)

    async def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        await asyncio.to_thread(self._thread.stop)
        await asyncio.to_thread(self.engine.stop)
        await self._peers.close()

    async def Info(self, request: wpb.InfoRequest, context: Any) -> wpb.WorkerInfo:
        """See `worker.proto`."""
        return self.account()

    def account(self) -> wpb.WorkerInfo:
        """What the worker says of itself; any thread may ask."""
        engine, shared = self.engine, self.engine.prefixes
        info = self._identity.info(pending_tokens=engine.num_pending_tokens, running=engine.num_requests)
        if shared is not None:
            info.prefix_chunk_tokens = shared.chunk_tokens
            info.prefix_capacity_bytes, info.prefix_used_bytes = shared.tree.capacity_bytes, shared.tree.used_bytes
        return info

    async def Prefill(self, request: wpb.PrefillRequest, context: Any) -> None:
        """See `worker.proto`."""
        current_request_id.set(request.request_id)
        job = _job(request)
        span = start_span(
            "kvsluice.prefill",
            incoming_trace.get(),
            "server",
            request_id=job.request_id,
            epoch=job.epoch,
            recipe=job.recipe.name,
            prompt_tokens=len(job.prompt_ids),
        )
        publisher = Publisher(
            job,
            self._identity.frame_ident(request, job.recipe),
            self._window,
            self._copies,
            self._thread.wake,
            asyncio.get_running_loop(),
            self._recorder,
            span,
        )
        try:
            # cancelled meanwhile, the engine may take the prompt all the same
            await self._thread.call(lambda: self.engine.submit(job, publisher, publisher.on_found))
            await context.send_initial_metadata(())
            async with self._peers.stub(request.decode_address) as stub:
                await publisher.run(stub, context.write)
        except BaseException as exc:
            span.end(exc)
            raise
        finally:
            span.end()
            publisher.close()
            self._thread.post(lambda: self._cancel(job.request_id, publisher))

    def _cancel(self, request_id: str, publisher: Publisher) -> None:
        # another attempt may be running under the same id
        self.engine.cancel(request_id, publisher)


def make_prefill_service(
    model: Model,
    config: ServeConfig,
    identity: WorkerIdentity,
    *,
    recorder: Recorder | None = None,
    on_crash: Callable[[BaseException], None] | None = None,
) -> PrefillService:
    """The service as a process of this configuration runs it."""
    # a GPU runs a pack in milliseconds, and fewer, larger calls of attention in less time
    chunk_tokens = config.chunk_tokens or (CPU_CHUNK_TOKENS if model.device.type == "cpu" else PACK_TOKENS)
    use_own_threads = use_threads(config.torch_threads, config.processes_of("prefill"))

    def setup() -> None:
        use_own_threads()
        if model.device.type == "cuda":
            plan_attention(model, chunk_tokens)

    prefix_bytes = config.prefix_bytes(model.device.type)
    prefix_memory = make_prefix_memory(prefix_bytes, model.device) if prefix_bytes else None
    return PrefillService(
        PrefillEngine(model, chunk_tokens, max(chunk_tokens, PACK_TOKENS), prefix_memory=prefix_memory),
        identity,
        window=config.handoff_window,
        max_message_bytes=config.max_frame_bytes,
        security=FleetSecurity.of(config),
        recorder=recorder,
        setup=setup,
        on_crash=on_crash,
    )


def _job(request: wpb.PrefillRequest) -> PrefillJob:
    if not request.request_id or not request.decode_address:
        raise InternalError("a prefill request lacks its id or its decode worker's address")
    return PrefillJob(
        request_id=request.request_id,
        epoch=request.epoch,
        prompt_ids=tuple(request.prompt_ids),
        recipe=Recipe.from_json(request.recipe_json),
        sampling=SamplingParams(**sampling_fields(request.sampling)),
        resumed=request.resumed,
        tenant=request.tenant,
    )
