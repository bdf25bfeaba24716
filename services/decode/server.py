"""A decode worker's gRPC service: one multiplexed stream a gateway, one stream of frames a request."""

from __future__ import annotations

import asyncio
from asyncio import AbstractEventLoop, Queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio

from ...compression.interfaces import EncodedLayer
from ...compression.recipe import Recipe
from ...errors import DuplicateRequest, FrameMismatch, InternalError, InvalidRequest, KvsluiceError
from ...kvstore.frame import decode_frame
from ...kvstore.identity import FrameIdent
from ...kvstore.manifest import decode_manifest
from ...models.model import Model
from ...models.sampling import SamplingParams
from ...protos import frame_pb2 as fpb
from ...protos import worker_pb2 as wpb
from ...protos import worker_pb2_grpc
from ..config import ServeConfig
from ..lifecycle import EngineThread
from ..rpc import current_request_id
from ..telemetry import NullRecorder, Recorder
from ..uploads import Uploads, make_uploads
from ..worker import WorkerIdentity, sampling_fields, use_threads
from .engine import (
    DecodeEngine,
    DecodeRequest,
    EmittedChoice,
    Event,
    FailedEvent,
    FinishedEvent,
    OpenedEvent,
    TokensEvent,
)
from .host_pages import HostPages
from .receiver import Receiver
from .sequence import typed


class _Session:
    """One gateway's stream. What waits in it is bounded by the credits that the gateway gave."""

    def __init__(self) -> None:
        self.outbox: Queue[wpb.FromDecode] = Queue()
        self._batch: list[wpb.TokenEntry] = []

    def add(self, entry: wpb.TokenEntry) -> None:
        self._batch.append(entry)

    def flush(self) -> None:
        if self._batch:
            self.outbox.put_nowait(wpb.FromDecode(tokens=wpb.TokenBatch(entries=self._batch)))
            self._batch = []

    def send(self, message: wpb.FromDecode) -> None:
        self.flush()
        self.outbox.put_nowait(message)


@dataclass
class _Request:
    session: _Session
    ident: FrameIdent
    max_bytes: int
    receiving: bool = False


class _EngineTarget:
    """A request's layers on their way into the engine."""

    def __init__(
        self, thread: EngineThread, engine: DecodeEngine, uploads: Uploads, request_id: str, epoch: int
    ) -> None:
        self._thread = thread
        self._engine = engine
        self._uploads = uploads
        self._request_id = request_id
        self._epoch = epoch

    async def add_layer(self, encoded: EncodedLayer) -> None:
        # the engine's thread goes on with its steps meanwhile
        layer, wait = await asyncio.to_thread(self._uploads.upload, encoded)
        await self._thread.call(lambda: self._engine.add_layer(self._request_id, layer, self._epoch, wait))

    async def commit(self, prompt_ids: Sequence[int], emitted: Sequence[EmittedChoice]) -> None:
        await self._thread.call(lambda: self._engine.commit(self._request_id, prompt_ids, emitted, self._epoch))


class DecodeService(worker_pb2_grpc.DecodeWorkerServicer):
    """Serves one decode engine, which runs on a thread of its own.

    Args:
        setup: settings of the engine's thread.
        on_crash: called when the engine's thread ends by an exception.
    """

    def __init__(
        self,
        engine: DecodeEngine,
        identity: WorkerIdentity,
        *,
        recorder: Recorder | None = None,
        setup: Callable[[], None] | None = None,
        on_crash: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.engine = engine
        self._uploads = make_uploads(engine.model.device)
        self._identity = identity
        self._recorder = recorder or NullRecorder()
        self._thread = EngineThread("decode-engine", self._step, setup, on_crash)
        self._requests: dict[str, _Request] = {}
        self._loop: AbstractEventLoop | None = None

    def add_to(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(self, server)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        await asyncio.to_thread(self._thread.stop)

    async def Info(self, request: wpb.InfoRequest, context: Any) -> wpb.WorkerInfo:
        """See `worker.proto`."""
        engine = self.engine
        return self._identity.info(
            capacity_bytes=engine.capacity_bytes,
            free_bytes=engine.free_bytes,
            running=engine.num_running,
            waiting=engine.num_waiting,
            host_capacity_bytes=engine.host_capacity_bytes,
            host_free_bytes=engine.host_free_bytes,
        )

    async def Attach(self, request_iterator: Any, context: Any) -> None:
        """See `worker.proto`. When the stream ends, so do the requests that were opened on it."""
        session = _Session()
        await context.send_initial_metadata(())
        writer = asyncio.create_task(self._write(session, context))
        try:
            async for message in request_iterator:
                self._take(session, message)
        finally:
            writer.cancel()
            # before anything is awaited: a call may be cancelled again while it cleans up
            for request_id, request in list(self._requests.items()):
                if request.session is session:
                    self._close(request_id)
            await asyncio.gather(writer, return_exceptions=True)

    async def PutFrames(self, request_iterator: Any, context: Any) -> None:
        """See `worker.proto`."""
        receiver: Receiver | None = None
        request: _Request | None = None
        try:
            async for message in request_iterator:
                if receiver is None:
                    request = self._expected(message)
                    receiver = self._receiver(request, context)
                if self._requests.get(request.ident.request_id) is not request:  # type: ignore[union-attr]
                    raise FrameMismatch("the request is over")
                await receiver.take(message)
        finally:
            if request is not None:
                request.receiving = False

    def _expected(self, message: wpb.FramePut) -> _Request:
        """The open request that a stream's first message belongs to."""
        ident = decode_frame(message.frame).ident if message.frame else decode_manifest(message.manifest).ident
        current_request_id.set(ident.request_id)
        request = self._requests.get(ident.request_id)
        if request is None or request.ident.epoch != ident.epoch:
            raise FrameMismatch("no such request and epoch is open here")
        if request.receiving:
            raise FrameMismatch("the request's frames come by another stream already")
        request.receiving = True
        return request

    def _receiver(self, request: _Request, context: Any) -> Receiver:
        target = _EngineTarget(self._thread, self.engine, self._uploads, request.ident.request_id, request.ident.epoch)
        num_layers = self._identity.shape.num_layers
        return Receiver(request.ident, num_layers, request.max_bytes, target, context.write, self._recorder)

    async def _write(self, session: _Session, context: Any) -> None:
        while True:
            await context.write(await session.outbox.get())

    def _take(self, session: _Session, message: wpb.ToDecode) -> None:
        kind = message.WhichOneof("message")
        if kind == "open":
            self._open(session, message.open)
            return
        body = message.credit if kind == "credit" else message.cancel
        request = self._requests.get(body.request_id)
        if request is None or request.session is not session or request.ident.epoch != body.epoch:
            return
        request_id, epoch = body.request_id, body.epoch
        if kind == "credit":
            tokens = message.credit.tokens
            self._thread.post(lambda: self.engine.grant(request_id, tokens, epoch))
        elif message.cancel.HasField("choice"):
            choice = message.cancel.choice
            self._thread.post(lambda: self._cancel(request_id, choice, epoch))
        elif kind == "cancel":
            self._close(request_id)

    def _open(self, session: _Session, message: wpb.Open) -> None:
        try:
            if message.request_id in self._requests:
                raise DuplicateRequest("request_id: a request with this id is running")
            request = _decode_request(message)
            max_bytes = self.engine.demand(request).most_bytes
        except Exception as exc:  # whatever it is, the stream's other requests go on
            session.send(_failed(message.request_id, message.epoch, typed(exc, message.request_id)))
            return
        self._requests[message.request_id] = _Request(
            session, self._identity.frame_ident(message, request.recipe), max_bytes
        )
        self._thread.post(lambda: self._open_in_engine(request))

    def _open_in_engine(self, request: DecodeRequest) -> None:
        try:
            self.engine.open(request)
        except Exception as exc:
            self._tell([FailedEvent(request.request_id, request.epoch, typed(exc, request.request_id))])

    def _close(self, request_id: str) -> None:
        """Forget a request and free what the engine holds of it."""
        epoch = self._requests.pop(request_id).ident.epoch
        self._thread.post(lambda: self._cancel(request_id, None, epoch))

    def _cancel(self, request_id: str, choice: int | None, epoch: int) -> None:
        self.engine.cancel(request_id, choice, epoch)

    def _step(self) -> bool:
        events = self.engine.step()
        if events:
            self._tell(events)
        return self.engine.has_work

    def _tell(self, events: list[Event]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: list[Event]) -> None:
        """Send a step's events, the tokens of each gateway in one batch."""
        touched: set[_Session] = set()
        for event in events:
            request = self._requests.get(event.request_id)
            if request is None or request.ident.epoch != event.epoch:
                continue
            session = request.session
            touched.add(session)
            if isinstance(event, TokensEvent):
                session.add(_entry(event))
            else:
                session.send(_message(event))
            if isinstance(event, (FinishedEvent, FailedEvent)):
                del self._requests[event.request_id]
        for session in touched:
            session.flush()


def make_decode_service(
    model: Model,
    config: ServeConfig,
    identity: WorkerIdentity,
    *,
    recorder: Recorder | None = None,
    on_crash: Callable[[BaseException], None] | None = None,
) -> DecodeService:
    """The service as a process of this configuration runs it."""
    host = HostPages(config.kv_offloading_bytes, model.device) if config.kv_offloading_bytes else None
    return DecodeService(
        DecodeEngine(model, config.kv_cache_bytes, config.max_num_seqs, config.max_queue, host),
        identity,
        recorder=recorder,
        setup=use_threads(config.torch_threads, config.decode_workers),
        on_crash=on_crash,
    )


def _decode_request(message: wpb.Open) -> DecodeRequest:
    return DecodeRequest(
        request_id=message.request_id,
        epoch=message.epoch,
        num_prompt_tokens=message.num_prompt_tokens,
        recipe=Recipe.from_json(message.recipe_json),
        sampling=SamplingParams(**sampling_fields(message.sampling)),
        credits=message.credits,
    )


def _failed(request_id: str, epoch: int, error: KvsluiceError) -> wpb.FromDecode:
    failed = wpb.Failed(request_id=request_id, epoch=epoch, error_type=type(error).__name__, message=error.message)
    if isinstance(error, InvalidRequest):
        failed.field, failed.allowed = error.field, error.allowed
    return wpb.FromDecode(failed=failed)


def _message(event: Event) -> wpb.FromDecode:
    ident: dict[str, Any] = {"request_id": event.request_id, "epoch": event.epoch}
    if isinstance(event, OpenedEvent):
        return wpb.FromDecode(opened=wpb.Opened(**ident))
    if isinstance(event, FailedEvent):
        return _failed(event.request_id, event.epoch, event.error)
    if isinstance(event, FinishedEvent):
        return wpb.FromDecode(
            finished=wpb.Finished(
                **ident, resident_bytes=event.resident_bytes, bytes_read=event.bytes_read, steps=event.steps
            )
        )
    raise InternalError(f"unknown event {type(event).__name__}")


def _entry(event: TokensEvent) -> wpb.TokenEntry:
    entry = wpb.TokenEntry(
        request_id=event.request_id, epoch=event.epoch, choice=event.choice, first_index=event.first_index
    )
    for sampled in event.sampled:
        token = entry.tokens.add(token_id=sampled.token_id)
        if sampled.logprob is not None:
            token.logprob = sampled.logprob
            token.top_logprobs.extend(fpb.TokenLogprob(token_id=t, logprob=p) for t, p in sampled.top)
        entry.finish_reason = sampled.finish_reason
    return entry
