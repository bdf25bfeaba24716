"""Who a decode worker's service works for: gateways, and the requests that they have opened."""

from __future__ import annotations

from asyncio import Queue
from collections.abc import Sequence
from dataclasses import dataclass

from ...compression.recipe import Recipe
from ...kvstore.identity import FrameIdent
from ...protos import worker_pb2 as wpb
from ..tracing import NO_SPAN, Span
from .engine import EmittedChoice
from .keeper import Keeper


class GatewayStream:
    """What goes to one gateway. What waits in it is bounded by the credits that the gateway gave."""

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
class OpenRequest:
    """A request that a gateway has opened.

    Attributes:
        stream: where its answers go.
        max_bytes: that its layers may take.
        keeper: writes it to the store; None = it is not kept.
        end_ttl_s: how long what is kept lives after its end; 0 = it is deleted then.
        sent, history_tokens, from_store: see `worker.proto`.
        receiving: a stream of its frames has begun.
        span: of its trace, up to its end.
    """

    stream: GatewayStream
    ident: FrameIdent
    max_bytes: int
    recipe: Recipe
    num_prompt_tokens: int
    keeper: Keeper | None = None
    end_ttl_s: float = 0.0
    sent: Sequence[EmittedChoice] = ()
    history_tokens: int = 0
    from_store: bool = False
    receiving: bool = False
    span: Span = NO_SPAN
