"""A decode worker's gRPC service: one multiplexed stream a gateway, one stream of frames a request."""

from __future__ import annotations

import asyncio
from asyncio import AbstractEventLoop
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc.aio

from ...errors import DuplicateRequest, FrameMismatch, KvsluiceError, RequestCancelled, SequenceLost
from ...kvstore.cached import CachedStore
from ...kvstore.frame import decode_frame
from ...kvstore.identity import FrameIdent, sequence_key
from ...kvstore.manifest import decode_manifest
from ...kvstore.store import Store
from ...models.model import Model
from ...protos import worker_pb2 as wpb
from ...protos import worker_pb2_grpc
from ..config import ServeConfig
from ..lifecycle import EngineThread
from ..staging import HostCopies, PlainCopies, make_host_copies
from ..telemetry import NullRecorder, Recorder, current_request_id
from ..tracing import NO_SPAN, current_span, incoming_trace, spanning
from ..uploads import make_uploads
from ..worker import WorkerIdentity, use_threads
from .account import worker_account
from .engine import (
    DecodeEngine,
    DecodeRequest,
    Event,
    FailedEvent,
    FinishedEvent,
    OpenedEvent,
    RowsEvent,
    TokensEvent,
)
from .failures import typed
from .keeper import Keeper
from .keeping import KeptRequests
from .making import make_engine
from .messages import (
    decode_request,
    decode_span,
    event_message,
    failed_message,
    sent_choices,
    tell_keeper,
    tell_span,
    token_entry,
)
from .offload import ImageId
from .overflow import OverflowPolicy
from .parallel import LeadingEngine
from .receiver import Receiver
from .requests import GatewayStream, OpenRequest
from .restore import Restoring
from .start import most_frame_bytes
from .store_tier import StoreImages
from .target import EngineTarget


class DecodeService(worker_pb2_grpc.DecodeWorkerServicer):
    """Serves one decode engine, which runs on a thread of its own.

    Args:
        copies: how rows come from the device to a store.
        store: where requests are kept that ask for it, and restored from; None = nowhere. Closed by `stop`.
        ttl_s: how long what is kept lives unless it is renewed.
        store_cache_bytes: of what was last written there or read, in memory; 0 = none.
        setup: settings of the engine's thread.
        on_crash: called when the engine's thread ends by an exception.
    """

    def __init__(
        self,
        engine: DecodeEngine,
        identity: WorkerIdentity,
        *,
        copies: HostCopies | None = None,
        store: Store | None = None,
        ttl_s: float = 900.0,
        store_cache_bytes: int = 0,
        recorder: Recorder | None = None,
        setup: Callable[[], None] | None = None,
        on_crash: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.engine = engine
        self._store: KeptRequests | None = None
        self._tier: StoreImages | None = None
        self._copies, self._ttl_s, self._cache_bytes = copies or PlainCopies(), ttl_s, store_cache_bytes
        self._uploads = make_uploads(engine.model.device)
        self._identity, self.figures = identity, engine.figures
        self._recorder = recorder or NullRecorder()
        self._thread = EngineThread("decode-engine", self._step, setup, on_crash)
        self._requests: dict[str, OpenRequest] = {}
        self._loop: AbstractEventLoop | None = None
        if store is not None:
            self.use_store(store)

    def use_store(self, store: Store) -> None:
        """From now on requests may be kept; those that run are not."""
        store = CachedStore(store, self._cache_bytes) if self._cache_bytes else store
        self._store = KeptRequests(store, self._ttl_s, self._copies, self._recorder)
        tiers = self.engine.scheduler.tiers
        policy = OverflowPolicy() if tiers is None else tiers.policy.overflow
        tier = self._tier = StoreImages(
            store, self._ttl_s, self._ident_of, self._thread, self._on_loop, self._recorder, policy
        )
        self._thread.post(lambda: self.engine.use_store(tier))

    def add_to(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(self, server)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        await asyncio.to_thread(self._thread.stop)
        if self._tier is not None:
            await self._tier.close()
        if isinstance(self.engine, LeadingEngine):
            await asyncio.to_thread(self.engine.stop)
        if self._store is not None:
            await self._store.stop()

    async def Info(self, request: wpb.InfoRequest, context: Any) -> wpb.WorkerInfo:
        """See `worker.proto`."""
        return self.account()

    def account(self) -> wpb.WorkerInfo:
        """What the worker says of itself; any thread may ask."""
        return worker_account(self.engine, self._identity, self._store)

    async def Attach(self, request_iterator: Any, context: Any) -> None:
        """See `worker.proto`. When the stream ends, so do the requests that were opened on it."""
        stream = GatewayStream()
        await context.send_initial_metadata(())
        writer = asyncio.create_task(self._write(stream, context))
        try:
            async for message in request_iterator:
                self._take(stream, message)
        finally:
            writer.cancel()
            # before anything is awaited: a call may be cancelled again while it cleans up
            for request_id, request in list(self._requests.items()):
                if request.stream is stream:  # another worker may be told to go on with what is kept
                    self._close(request_id, keep=True)
            await asyncio.gather(writer, return_exceptions=True)

    async def PutFrames(self, request_iterator: Any, context: Any) -> None:
        """See `worker.proto`."""
        with spanning("kvsluice.receive", incoming_trace.get(), "server"):
            await self._put_frames(request_iterator, context)

    async def _put_frames(self, request_iterator: Any, context: Any) -> None:
        receiver: Receiver | None = None
        request: OpenRequest | None = None
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

    def _expected(self, message: wpb.FramePut) -> OpenRequest:
        """The open request that a stream's first message belongs to."""
        ident = decode_frame(message.frame).ident if message.frame else decode_manifest(message.manifest).ident
        current_request_id.set(ident.request_id)
        request = self._requests.get(ident.request_id)
        if request is None or request.ident.epoch != ident.epoch:
            raise FrameMismatch("no such request and epoch is open here")
        if request.receiving or request.from_store:
            raise FrameMismatch("the request's frames come by another way already")
        request.receiving = True
        current_span.get().set(request_id=ident.request_id, epoch=ident.epoch)
        return request

    def _receiver(self, request: OpenRequest, context: Any) -> Receiver:
        ident, num_layers, target = request.ident, self._identity.shape.num_layers, self._target(request)
        return Receiver(
            ident, num_layers, request.max_bytes, target, context.write, self._recorder, request.keeper, request.sent
        )

    def _target(self, request: OpenRequest) -> EngineTarget:
        return EngineTarget(self._thread, self.engine, self._uploads, request)

    async def _write(self, stream: GatewayStream, context: Any) -> None:
        while True:
            await context.write(await stream.outbox.get())

    def _take(self, stream: GatewayStream, message: wpb.ToDecode) -> None:
        kind = message.WhichOneof("message")
        if kind == "open":
            self._open(stream, message.open)
            return
        body = message.credit if kind == "credit" else message.cancel
        request = self._requests.get(body.request_id)
        if request is None or request.stream is not stream or request.ident.epoch != body.epoch:
            return
        request_id, epoch = body.request_id, body.epoch
        if kind == "credit":
            tokens = message.credit.tokens
            self._thread.post(lambda: self.engine.grant(request_id, tokens, epoch))
        elif message.cancel.HasField("choice"):
            choice = message.cancel.choice
            self._thread.post(lambda: self._cancel(request_id, choice, epoch))
        elif kind == "cancel":
            self._close(request_id, message.cancel.keep)

    def _open(self, stream: GatewayStream, message: wpb.Open) -> None:
        try:
            if message.request_id in self._requests:
                raise DuplicateRequest("request_id: a request with this id is running")
            request = decode_request(message)
            sent = sent_choices(message)
            max_bytes = most_frame_bytes(request, self.engine.model)
        except Exception as exc:  # whatever it is, the stream's other requests go on
            stream.send(failed_message(message.request_id, message.epoch, typed(exc, message.request_id)))
            return
        ident = self._identity.frame_ident(message, request.recipe)
        if message.keeping.end_ttl_s:
            request = replace(request, session_key=sequence_key(ident))
        keeper = self._keeper(ident) if self._store is not None and message.HasField("keeping") else None
        opened = OpenRequest(
            stream,
            ident,
            max_bytes,
            request.recipe,
            request.num_prompt_tokens,
            keeper,
            message.keeping.end_ttl_s,
            sent,
            request.history_tokens,
            message.from_store,
        )
        opened.span = decode_span(message, request)
        self._requests[message.request_id] = opened
        self._thread.post(lambda: self._open_in_engine(request))

    def _keeper(self, ident: FrameIdent) -> Keeper:
        """Of a request that asks to be kept."""
        assert self._store is not None

        def lengthen(choice: int, rows: float) -> None:
            self._thread.post(lambda: self.engine.lengthen(ident.request_id, choice, rows, ident.epoch))

        return self._store.keeper(ident, lengthen, lambda error: self._refuse(ident, error))

    async def _restore(self, store: KeptRequests, request: OpenRequest) -> None:
        """Go on with what an earlier attempt has left in the store; an error ends the request."""
        ident, num_layers = request.ident, self._identity.shape.num_layers
        try:
            wanted = Restoring(
                ident, request.recipe, request.num_prompt_tokens, num_layers, request.max_bytes, request.sent,
                store.ttl_s, request.history_tokens,
            )  # fmt: skip
            await store.restore(wanted, self._target(request), request.keeper)
        except Exception as exc:
            self._refuse(ident, typed(exc, ident.request_id))

    def _begin_restoring(self, request: OpenRequest) -> None:
        if self._store is None:
            self._refuse(request.ident, SequenceLost("this worker has no store"))
        else:
            self._store.start(self._restore(self._store, request))

    def _refuse(self, ident: FrameIdent, error: KvsluiceError) -> None:
        """End a request with an error that did not come from the engine; another worker may go on with it."""
        request = self._requests.get(ident.request_id)
        if request is not None and request.ident == ident:
            request.stream.send(failed_message(ident.request_id, ident.epoch, error))
            request.span.end(error)
            self._close(ident.request_id, keep=True)

    def _open_in_engine(self, request: DecodeRequest) -> None:
        try:
            self.engine.open(request)
        except Exception as exc:
            self._tell([FailedEvent(request.request_id, request.epoch, typed(exc, request.request_id))])

    def _close(self, request_id: str, keep: bool) -> None:
        """Forget a request and free what the engine holds of it.

        Args:
            keep: leave what the store holds of it.
        """
        request = self._requests.pop(request_id)
        request.span.end(RequestCancelled("it was given up"))
        self._end_keeping(request, keep)
        epoch = request.ident.epoch
        self._thread.post(lambda: self._cancel(request_id, None, epoch))

    def _end_keeping(self, request: OpenRequest, keep: bool) -> None:
        if request.keeper is not None and self._store is not None:
            self._store.end(request.keeper, delete=not keep)

    def _finish_kept(self, request: OpenRequest, event: FinishedEvent) -> None:
        """End a request that may be continued; that it has ended is told when all of it is kept."""
        keeper = request.keeper
        assert keeper is not None and self._store is not None
        del self._requests[event.request_id]

        async def finish() -> None:
            await keeper.finish(request.end_ttl_s)
            request.stream.send(event_message(event, keeper))
            await keeper.close(delete=False)

        self._store.start(finish())

    def _cancel(self, request_id: str, choice: int | None, epoch: int) -> None:
        self.engine.cancel(request_id, choice, epoch)

    def _step(self) -> bool:
        events = self.engine.step()
        if events:
            self._tell(events)
        return self.engine.has_work

    def _tell(self, events: list[Event]) -> None:
        self._on_loop(lambda: self._dispatch(events))

    def _on_loop(self, action: Callable[[], None]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(action)

    def _ident_of(self, image: ImageId) -> FrameIdent | None:
        request = self._requests.get(image.request_id)
        return None if request is None or request.ident.epoch != image.epoch else request.ident

    def _dispatch(self, events: list[Event]) -> None:
        """Send a step's events, the tokens of each gateway in one batch."""
        touched: set[GatewayStream] = set()
        for event in events:
            request = self._requests.get(event.request_id)
            if request is None or request.ident.epoch != event.epoch:
                continue
            stream = request.stream
            touched.add(stream)
            if request.span is not NO_SPAN:
                tell_span(request.span, event)
            if request.keeper is not None:
                tell_keeper(request.keeper, event)
            if isinstance(event, TokensEvent):
                stream.add(token_entry(event))
            elif isinstance(event, FinishedEvent) and request.keeper is not None and request.end_ttl_s:
                self._finish_kept(request, event)
                continue
            elif not isinstance(event, RowsEvent):
                stream.send(event_message(event, request.keeper))
            if isinstance(event, OpenedEvent) and request.from_store:
                self._begin_restoring(request)
            if isinstance(event, (FinishedEvent, FailedEvent)):
                del self._requests[event.request_id]
                self._end_keeping(request, keep=isinstance(event, FailedEvent))
        for stream in touched:
            stream.flush()


def make_decode_service(
    model: Model,
    config: ServeConfig,
    identity: WorkerIdentity,
    *,
    recorder: Recorder | None = None,
    on_crash: Callable[[BaseException], None] | None = None,
    store: Store | None = None,
) -> DecodeService:
    """The service as a process of this configuration runs it.

    Args:
        store: where requests are kept; the service closes it.
    """
    copies = make_host_copies(model.device)
    return DecodeService(
        make_engine(model, config, copies.mark),
        identity,
        copies=copies,
        store=store,
        ttl_s=config.store_ttl_s,
        store_cache_bytes=config.store_cache_bytes,
        recorder=recorder,
        setup=use_threads(config.torch_threads, config.processes_of("decode")),
        on_crash=on_crash,
    )
