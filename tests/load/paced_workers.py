"""Workers without a model: they send tokens as engines do, a batch a step, at a pace that is set."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from kvsluice.compression.recipe import ModelShape
from kvsluice.protos import frame_pb2 as fpb
from kvsluice.protos import worker_pb2 as wpb
from kvsluice.protos import worker_pb2_grpc
from kvsluice.services.lifecycle import WorkerHost
from kvsluice.services.worker import WorkerIdentity

SHAPE = ModelShape(
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=32768,
    layer_windows=(None,) * 4,
)
MESSAGE_BYTES = 16 << 20


@dataclass
class Pace:
    """How the workers answer.

    Attributes:
        token_ids: of every answer, again and again.
        step_s: between two steps; 0 = as fast as they are taken.
        stamps: when each token was sent, by request, seconds of the machine's monotonic clock; None = not kept.
    """

    token_ids: list[int]
    vocab_size: int
    step_s: float = 0.0
    stamps: dict[str, list[float]] | None = None


@dataclass
class _Sequence:
    body: wpb.Open
    credits: int
    told: int = 1  # the first token is prefill's


class _Service:
    def __init__(self, worker_id: str, pace: Pace) -> None:
        self.pace = pace
        self._identity = WorkerIdentity(worker_id, "decode", "paced", "f" * 32, pace.vocab_size, SHAPE, {})

    async def start(self) -> None: ...
    async def stop(self) -> None: ...

    async def Info(self, request: wpb.InfoRequest, context: Any) -> wpb.WorkerInfo:
        return self._identity.info(capacity_bytes=1 << 30, free_bytes=1 << 30)


class PacedPrefill(_Service, worker_pb2_grpc.PrefillWorkerServicer):
    """Answers with the first token at once."""

    def add_to(self, server: Any) -> None:
        worker_pb2_grpc.add_PrefillWorkerServicer_to_server(self, server)

    async def Prefill(self, request: wpb.PrefillRequest, context: Any) -> None:
        await context.send_initial_metadata(())
        token = fpb.SampledToken(token_id=self.pace.token_ids[0])
        choices = [fpb.ChoiceState(index=i, emitted=[token]) for i in range(request.sampling.n)]
        await context.write(wpb.PrefillEvent(first_tokens=wpb.FirstTokens(choices=choices)))
        await context.write(wpb.PrefillEvent(shipped=wpb.Shipped(payload_bytes=1, frames=1)))


class PacedDecode(_Service, worker_pb2_grpc.DecodeWorkerServicer):
    """Sends one token of every sequence that has credits, a step, until its `max_tokens`."""

    def add_to(self, server: Any) -> None:
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(self, server)

    async def Attach(self, requests: Any, context: Any) -> None:
        await context.send_initial_metadata(())
        live: dict[tuple[str, int], _Sequence] = {}
        woken = asyncio.Event()
        stepping = asyncio.create_task(self._run(live, woken, context))
        try:
            async for message in requests:
                kind = message.WhichOneof("message")
                body = getattr(message, kind)
                key = (body.request_id, body.epoch)
                if kind == "open":
                    live[key] = _Sequence(body, body.credits)
                elif kind == "credit" and key in live:
                    live[key].credits += body.tokens
                elif kind == "cancel":
                    live.pop(key, None)
                woken.set()
        finally:
            stepping.cancel()

    async def _run(self, live: dict[tuple[str, int], _Sequence], woken: asyncio.Event, context: Any) -> None:
        opened: set[tuple[str, int]] = set()
        while True:
            if self.pace.step_s:
                await asyncio.sleep(self.pace.step_s)
            opened &= live.keys()
            for key in live.keys() - opened:
                await context.write(wpb.FromDecode(opened=wpb.Opened(request_id=key[0], epoch=key[1])))
                opened.add(key)
            entries = [entry for key in opened & live.keys() if (entry := self._entry(key, live[key])) is not None]
            if not entries:
                await woken.wait()
                woken.clear()
                continue
            await context.write(wpb.FromDecode(tokens=wpb.TokenBatch(entries=entries)))
            for entry in entries:
                if entry.finish_reason:
                    key = (entry.request_id, entry.epoch)
                    live.pop(key, None)
                    finished = wpb.Finished(request_id=key[0], epoch=key[1], steps=1)
                    await context.write(wpb.FromDecode(finished=finished))

    def _entry(self, key: tuple[str, int], sequence: _Sequence) -> wpb.TokenEntry | None:
        if not sequence.credits:
            return None
        index, pace = sequence.told, self.pace
        sequence.told, sequence.credits = index + 1, sequence.credits - 1
        if pace.stamps is not None:
            pace.stamps.setdefault(key[0], []).append(time.monotonic())
        return wpb.TokenEntry(
            request_id=key[0],
            epoch=key[1],
            first_index=index,
            tokens=[fpb.SampledToken(token_id=pace.token_ids[index % len(pace.token_ids)])],
            finish_reason="length" if sequence.told == sequence.body.sampling.max_tokens else "",
        )


async def _serve(pipe: Connection, pace: Pace) -> None:
    hosts = [WorkerHost([kind("paced-0", pace)], MESSAGE_BYTES) for kind in (PacedPrefill, PacedDecode)]
    pipe.send([await host.start("127.0.0.1") for host in hosts])
    while (order := await asyncio.to_thread(pipe.recv)) is not None:
        # (pace, whether times are kept) begins a run; what the last one kept is the reply
        stamps, (pace.step_s, keeps) = pace.stamps, order
        pace.stamps = {} if keeps else None
        pipe.send(stamps)
    for host in hosts:
        await host.stop()


def serve_workers(pipe: Connection, token_ids: list[int], vocab_size: int) -> None:
    """Body of the workers' process: sends the addresses of both, then takes orders until it is sent None."""
    asyncio.run(_serve(pipe, Pace(token_ids, vocab_size)))
