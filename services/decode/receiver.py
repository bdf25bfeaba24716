"""Takes one request's frames from its prefill worker and hands finished layers to the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from ...compression.interfaces import EncodedLayer
from ...errors import FrameMismatch
from ...kvstore.frame import decode_frame
from ...kvstore.identity import FrameIdent, frame_key
from ...kvstore.manifest import FrameEntry, Manifest, decode_manifest, frame_entry, verify
from ...protos import worker_pb2 as wpb
from ..framing import LayerAssembler
from ..telemetry import Recorder
from .engine import EmittedChoice
from .kept_sessions import SessionTurn


class Target(Protocol):
    """The request that frames are for."""

    async def add_layer(self, encoded: EncodedLayer) -> None: ...
    async def commit(self, prompt_ids: Sequence[int], emitted: Sequence[EmittedChoice]) -> None: ...
    async def adopt(self, turn: SessionTurn) -> bool:
        """Go on with the cache that the turn before has left, if it is here; no layers are wanted then."""
        ...


class Keeping(Protocol):
    """Writes what has arrived to a store."""

    async def frame(self, data: bytes) -> None: ...
    def manifest(self, manifest: Manifest, emitted: Sequence[EmittedChoice]) -> None: ...
    def started(self) -> None: ...


class Receiver:
    """Frames in order, the manifest last; whatever is not exactly that ends the stream with an error.

    Args:
        ident: whom every frame must belong to.
        num_layers: of the model.
        max_bytes: of all layers together, as reserved when the request was let in.
        target: where finished layers go.
        acknowledge: sends an acknowledgement.
        keeper: takes what has arrived, before it is acknowledged; None = it is not kept.
        sent: of every choice what earlier attempts have told, which counts, not what prefill has drawn again.
    """

    def __init__(
        self,
        ident: FrameIdent,
        num_layers: int,
        max_bytes: int,
        target: Target,
        acknowledge: Callable[[wpb.FrameAck], Awaitable[None]],
        recorder: Recorder,
        keeper: Keeping | None = None,
        sent: Sequence[EmittedChoice] = (),
    ) -> None:
        self._ident = ident
        self._sent = sent
        self._keeper = keeper
        self._target = target
        self._acknowledge = acknowledge
        self._recorder = recorder
        self._assembler = LayerAssembler(ident, num_layers, max_bytes)
        self._entries: list[FrameEntry] = []
        self._committed = False

    async def take(self, message: wpb.FramePut) -> None:
        """Take one message of the stream.

        Raises:
            CorruptFrame: it is no sound frame or manifest, or the manifest names other frames than those that came.
            FrameMismatch: it belongs to something else, or comes out of turn.
        """
        if self._committed:
            raise FrameMismatch("frames came after the manifest")
        kind = message.WhichOneof("message")
        if kind == "frame":
            await self._take_frame(message.frame)
        elif kind == "manifest":
            await self._take_manifest(message.manifest)
        else:
            raise FrameMismatch("an empty message came instead of a frame")

    async def _take_frame(self, data: bytes) -> None:
        # megabytes are hashed and copied: not on the event loop
        layers, entry = await asyncio.to_thread(self._place, data)
        for encoded in layers:
            await self._target.add_layer(encoded)
        index = len(self._entries)
        self._entries.append(entry)
        self._recorder.record(
            "decode.frame_acked",
            request_id=self._ident.request_id,
            epoch=self._ident.epoch,
            index=index,
            payload_bytes=len(data),
            layer_begin=entry.layers[0],
            layer_end=entry.layers[1],
        )
        if self._keeper is not None:
            await self._keeper.frame(data)
        await self._acknowledge(wpb.FrameAck(index=index))

    def _place(self, data: bytes) -> tuple[list[EncodedLayer], FrameEntry]:
        frame = decode_frame(data)
        layers = self._assembler.add_frame(frame)
        return layers, frame_entry(frame_key(self._ident, len(self._entries)), frame)

    async def _take_manifest(self, data: bytes) -> None:
        manifest = decode_manifest(data)
        if manifest.ident != self._ident:
            raise FrameMismatch("the manifest belongs to another request, epoch, model or recipe")
        verify(manifest, self._entries)
        emitted = self._sent or [
            EmittedChoice(tuple(token.token_id for token in choice.emitted), choice.finish_reason)
            for choice in manifest.choices
        ]
        if self._keeper is not None:  # before the first token can be told
            self._keeper.manifest(manifest, emitted)
        await self._target.commit(manifest.prompt_ids, emitted)
        if self._keeper is not None:
            self._keeper.started()
        self._committed = True
        self._recorder.record("decode.committed", request_id=self._ident.request_id, epoch=self._ident.epoch)
        await self._acknowledge(wpb.FrameAck(index=len(self._entries), committed=True))
