"""Where a request's layers go on a decode worker's service: to the device, then into the engine, on its thread."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ...compression.interfaces import EncodedLayer
from ..lifecycle import EngineThread
from ..uploads import Uploads
from .engine import DecodeEngine, EmittedChoice
from .kept_sessions import SessionTurn
from .messages import resumed_message
from .requests import OpenRequest


class EngineTarget:
    """A request's layers on their way into the engine."""

    def __init__(self, thread: EngineThread, engine: DecodeEngine, uploads: Uploads, request: OpenRequest) -> None:
        self._thread = thread
        self._engine = engine
        self._uploads = uploads
        self._request = request
        self._request_id, self._epoch = request.ident.request_id, request.ident.epoch

    async def add_layer(self, encoded: EncodedLayer) -> None:
        """Hand over a layer. Raises what `DecodeEngine.add_layer` does."""
        # the engine's thread goes on with its steps meanwhile
        layer, wait = await asyncio.to_thread(self._uploads.upload, encoded)
        await self._thread.call(lambda: self._engine.add_layer(self._request_id, layer, self._epoch, wait))

    async def adopt(self, turn: SessionTurn) -> bool:
        """Go on with a cache that is still here. Raises what `DecodeEngine.adopt` does."""
        return await self._thread.call(lambda: self._engine.adopt(self._request_id, turn, self._epoch))

    async def commit(self, prompt_ids: Sequence[int], emitted: Sequence[EmittedChoice]) -> None:
        """Start the request. Raises what `DecodeEngine.commit` does."""
        request = self._request
        again = await self._thread.call(lambda: self._engine.commit(self._request_id, prompt_ids, emitted, self._epoch))
        if request.sent:
            prompt_again = 0 if request.from_store else len(prompt_ids)
            request.stream.send(resumed_message(request.ident, again, prompt_again))
