"""Ships one prompt's compressed KV to its decode worker while later layers still run.

    engine thread: on_layer ─┐ bounded: `ready` is False while layers wait to be packed, or frames for their acks
    a worker thread:         └─> copy to the host, FramePacker ─┐
    event loop:                                                 └─> PutFrames ──> acks … manifest last ──> Shipped

A layer is copied and packed while the next one computes, so the device holds at most MAX_LAYERS of them beside the one
that computes. The first tokens go to the gateway by another way and never wait for a frame.

An acknowledgement is what the receiver grants the next frame by: it comes when a frame is placed, and where it is kept,
taken in for the store. So no more than a window of frames is under way, whatever networks buffer, and a receiver, store
or device that is slow slows the prompts that go there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from asyncio import AbstractEventLoop, Future, Queue
from collections.abc import Awaitable, Callable
from threading import Lock
from typing import Any

from ...compression.interfaces import EncodedLayer
from ...errors import InternalError, KvsluiceError
from ...kvstore.frame import decode_frame
from ...kvstore.identity import FrameIdent, frame_key
from ...kvstore.manifest import ChoiceState, EmittedToken, FrameEntry, Manifest, encode_manifest, frame_entry
from ...models.sampling import Sampled
from ...protos import frame_pb2 as fpb
from ...protos import worker_pb2 as wpb
from ...protos.worker_pb2_grpc import DecodeWorkerStub
from ..framing import FramePacker
from ..rpc import read_all
from ..staging import Event, HostCopies
from ..telemetry import FieldValue, Recorder, about, where
from ..tracing import NO_SPAN, Carrier, Span, spanning
from .engine import PrefillJob

logger = logging.getLogger(__name__)

MAX_LAYERS = 2  # that wait to be packed: while there are as many, no further item runs

WriteEvent = Callable[[wpb.PrefillEvent], Awaitable[None]]


class Publisher:
    """One prompt's way out. The `on_…` methods and `ready` are the engine's sink; `run` belongs to the event loop.

    Args:
        job: the prompt.
        ident: whom its frames belong to.
        span: of the prompt; ended with its first tokens.
        window: frames that may be under way without an acknowledgement; while more wait, the engine is held back.
        copies: how layers come to the host.
        wake: has the engine look at `ready` again.
    """

    def __init__(
        self,
        job: PrefillJob,
        ident: FrameIdent,
        window: int,
        copies: HostCopies,
        wake: Callable[[], None],
        loop: AbstractEventLoop,
        recorder: Recorder,
        span: Span = NO_SPAN,
    ) -> None:
        self._job = job
        self._ident = ident
        self._window = window
        self._wake = wake
        self._loop = loop
        self._recorder, self._span = recorder, span
        self._copies = copies
        self._packer = FramePacker(ident, len(job.prompt_ids), copies=copies)
        self._lock = Lock()
        self._unpacked = 0
        self._unacked = 0
        self._acked = 0
        self._granted = asyncio.Event()  # a frame was acknowledged, or none will be any more
        self._acks_ended = False
        self._committed = False
        self._closed = False
        self._found_tokens = 0
        self._submitted_s = time.monotonic()
        self._started_s = self._submitted_s
        self._first_tokens_s: float | None = None
        self._first_frame_s: float | None = None
        self._first: Future[wpb.FirstTokens] = loop.create_future()
        # None ends the layers; an error ends the prompt
        self._layers: Queue[tuple[EncodedLayer, Event | None] | KvsluiceError | None] = Queue()
        self._choices: tuple[ChoiceState, ...] = ()
        self._entries: list[FrameEntry] = []

    # --- the engine's side ---------------------------------------------------------------------------------

    def ready(self) -> bool:
        with self._lock:
            return self._unacked < self._window and self._unpacked < MAX_LAYERS

    def on_found(self, num_tokens: int) -> None:
        """So many of the prompt's first tokens need not run."""
        self._found_tokens = num_tokens

    def on_layer_start(self, layer: int) -> None:
        if layer == 0:
            self._started_s = time.monotonic()
        self._record("prefill.layer_started", layer=layer)

    def on_layer(self, encoded: EncodedLayer) -> None:
        with self._lock:
            self._unpacked += 1
        self._post((encoded, self._copies.mark()))

    def on_first_tokens(self, sampled: list[Sampled]) -> None:
        now = self._first_tokens_s = time.monotonic()
        message = wpb.FirstTokens(
            choices=[_choice_message(index, token) for index, token in enumerate(sampled)],
            queue_s=self._started_s - self._submitted_s,
            prefill_s=now - self._started_s,
            cached_tokens=self._found_tokens,
        )
        self._choices = tuple(
            ChoiceState((EmittedToken(s.token_id, s.logprob, tuple(s.top)),), s.finish_reason) for s in sampled
        )
        self._record("prefill.first_tokens")
        self._loop.call_soon_threadsafe(self._settle, message)

    def on_done(self) -> None:
        self._post(None)

    def on_error(self, error: KvsluiceError) -> None:
        self._post(error)

    def _post(self, item: tuple[EncodedLayer, Event | None] | KvsluiceError | None) -> None:
        self._loop.call_soon_threadsafe(self._arrive, item)

    @property
    def _ended(self) -> bool:
        if self._job.resumed:
            return False
        return bool(self._choices) and all(choice.finish_reason for choice in self._choices)

    # --- the event loop's side -----------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the layers that will not be sent. The engine may hold on to its sink, and call it, for a while."""
        self._closed = True
        while not self._layers.empty():
            self._layers.get_nowait()

    def _arrive(self, item: tuple[EncodedLayer, Event | None] | KvsluiceError | None) -> None:
        if not self._closed:
            self._layers.put_nowait(item)

    async def run(self, stub: DecodeWorkerStub, write: WriteEvent) -> None:
        """Report the first tokens, ship the frames, report that. Raises what the engine or the decode worker raised."""
        shipping = asyncio.create_task(self._ship(stub))
        try:
            await asyncio.wait((self._first, shipping), return_when=asyncio.FIRST_COMPLETED)
            if not self._first.done():
                shipping.result()
                raise InternalError("prefill ended without a first token")
            await write(wpb.PrefillEvent(first_tokens=self._first.result()))
            self._span.end()  # what is left is the handoff's
            if not self._ended:
                await write(wpb.PrefillEvent(shipped=await shipping))
        finally:
            shipping.cancel()
            await asyncio.gather(shipping, return_exceptions=True)

    def _settle(self, message: wpb.FirstTokens) -> None:
        if not self._first.done():
            self._first.set_result(message)

    async def _ship(self, stub: DecodeWorkerStub) -> wpb.Shipped:
        job = self._job
        named: dict[str, FieldValue] = {"request_id": job.request_id, "epoch": job.epoch, "recipe": job.recipe.name}
        with spanning("kvsluice.handoff", self._span.carrier, "client", **named) as span:
            shipped = await self._ship_over(stub, span.carrier)
            span.set(payload_bytes=shipped.payload_bytes, frames=shipped.frames, exposed_s=shipped.exposed_s)
            return shipped

    async def _ship_over(self, stub: DecodeWorkerStub, trace: Carrier) -> wpb.Shipped:
        call = stub.PutFrames(metadata=trace)
        acks = asyncio.create_task(read_all(call, self._take_ack))
        acks.add_done_callback(self._end_acks)
        sends = asyncio.create_task(self._write_frames(call))
        try:
            await asyncio.wait((acks, sends), return_when=asyncio.FIRST_EXCEPTION)
            if sends.done() and not sends.cancelled() and isinstance(sends.exception(), KvsluiceError):
                return sends.result()
            # whatever writing to a broken call raised, its status says why
            await acks
            if self._committed:
                return self._timed(await sends)
            if self._ended:
                return wpb.Shipped()
            raise InternalError("a decode worker ended the handoff before it was whole")
        finally:
            acks.cancel()
            sends.cancel()
            call.cancel()
            await asyncio.gather(acks, sends, return_exceptions=True)

    def _timed(self, shipped: wpb.Shipped) -> wpb.Shipped:
        """The same account, with how long it has taken up to now."""
        now = time.monotonic()
        begun_s = now if self._first_frame_s is None else self._first_frame_s
        shipped.handoff_s = now - begun_s
        shipped.exposed_s = now - max(begun_s, self._first_tokens_s or begun_s)
        self._record("prefill.shipped", seconds=shipped.handoff_s, payload_bytes=shipped.payload_bytes)
        return shipped

    async def _write_frames(self, call: Any) -> wpb.Shipped:
        shipped = wpb.Shipped()
        while (item := await self._layers.get()) is not None:
            if isinstance(item, KvsluiceError):
                raise item
            # megabytes are copied and hashed: not on the event loop
            packing = asyncio.to_thread(self._pack, *item)
            del item  # while its frames are written its memory is free
            for frame in await packing:
                await self._put(call, wpb.FramePut(frame=frame), shipped)
        if not self._ended:
            for frame in await asyncio.to_thread(self._noted, self._packer.flush()):
                await self._put(call, wpb.FramePut(frame=frame), shipped)
            await self._put(call, wpb.FramePut(manifest=self._manifest()), shipped)
            await call.done_writing()
        return shipped

    def _pack(self, encoded: EncodedLayer, after: Event | None) -> list[bytes]:
        """The frames that leave with a layer. On a worker thread, one layer after the other."""
        fault = None
        try:
            frames = self._noted(self._packer.add(encoded, after))
        except Exception as exc:
            # what is raised must not lead to the layer, whose memory the device may be short of
            fault, place = type(exc).__name__, where(exc)
        if fault is not None:
            logger.error(
                "packing layer %d of request %s failed: %s",
                encoded.layer,
                self._job.request_id,
                place,
                extra=about(self._job.request_id),
            )
            raise InternalError(f"packing a layer failed: {fault}")
        with self._lock:
            self._unpacked -= 1
        self._wake()
        return frames

    def _noted(self, frames: list[bytes]) -> list[bytes]:
        """The same frames, once they are counted and the manifest knows of them."""
        for frame in frames:
            key = frame_key(self._ident, len(self._entries))
            self._entries.append(frame_entry(key, decode_frame(frame)))
        with self._lock:
            self._unacked += len(frames)
        return frames

    async def _put(self, call: Any, message: wpb.FramePut, shipped: wpb.Shipped) -> None:
        while shipped.frames - self._acked >= self._window and not self._acks_ended:
            self._granted.clear()
            await self._granted.wait()
        if self._first_frame_s is None:
            self._first_frame_s = time.monotonic()
        await call.write(message)
        shipped.payload_bytes += message.ByteSize()
        shipped.frames += 1
        self._record("prefill.frame_sent", index=shipped.frames - 1, payload_bytes=message.ByteSize())

    def _take_ack(self, ack: wpb.FrameAck) -> None:
        if ack.index != self._acked:
            raise InternalError("a decode worker acknowledged frames out of order")
        self._acked += 1
        self._committed = ack.committed
        with self._lock:
            self._unacked -= 1
        self._record("prefill.frame_acked", index=ack.index)
        self._granted.set()
        self._wake()

    def _end_acks(self, _: asyncio.Task[None]) -> None:
        """Nothing is granted any more; what is still written finds out why."""
        self._acks_ended = True
        self._granted.set()

    def _manifest(self) -> bytes:
        return encode_manifest(
            Manifest(
                ident=self._ident,
                recipe_json=self._job.recipe.to_json(),
                prompt_ids=self._job.prompt_ids,
                choices=self._choices,
                seed=self._job.sampling.seed,
                frames=tuple(self._entries),
            )
        )

    def _record(self, name: str, **fields: float) -> None:
        self._recorder.record(name, request_id=self._job.request_id, epoch=self._job.epoch, **fields)


def _choice_message(index: int, sampled: Sampled) -> fpb.ChoiceState:
    token = fpb.SampledToken(token_id=sampled.token_id)
    if sampled.logprob is not None:
        token.logprob = sampled.logprob
        token.top_logprobs.extend(fpb.TokenLogprob(token_id=t, logprob=p) for t, p in sampled.top)
    return fpb.ChoiceState(index=index, emitted=[token], finish_reason=sampled.finish_reason)
