"""A gateway over small workers that speak the real protocol over real gRPC and answer from a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from kvsluice.client import AsyncClient
from kvsluice.compression.recipe import ModelShape, get_recipe, register, unregister
from kvsluice.kvstore.store import Store
from kvsluice.models.config import config_from_hf
from kvsluice.models.model import Model
from kvsluice.models.profiles import load_profile
from kvsluice.models.weights import random_weights
from kvsluice.protos import frame_pb2 as fpb
from kvsluice.protos import worker_pb2 as wpb
from kvsluice.protos import worker_pb2_grpc
from kvsluice.services.config import ServeConfig, load_config
from kvsluice.services.decode.engine import DecodeEngine
from kvsluice.services.decode.server import make_decode_service
from kvsluice.services.gateway.membership import Member, MembershipTable
from kvsluice.services.gateway.server import Gateway
from kvsluice.services.lifecycle import WorkerHost
from kvsluice.services.metrics.worker import WorkerMetrics
from kvsluice.services.model_shape import model_shape
from kvsluice.services.prefill.engine import PrefillEngine
from kvsluice.services.prefill.server import make_prefill_service
from kvsluice.services.security import FleetSecurity
from kvsluice.services.telemetry import MemoryRecorder
from kvsluice.services.worker import WorkerIdentity


async def wait_until(condition: Callable[[], object]) -> None:
    """Wait for something that another task or thread brings about."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for is anything at all
            await asyncio.sleep(0.005)


@pytest.fixture(name="until")
def until_fixture() -> Callable[[Callable[[], object]], Awaitable[None]]:
    return wait_until


SHAPE = ModelShape(
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    layer_windows=(None,) * 4,
)
VOCAB_SIZE = 256


class CharTokenizer:
    """One token a character; ids are code points below 256."""

    has_chat_template = True

    class Decoder:
        def push(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

        def finish(self) -> str:
            return ""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [min(ord(c), 255) for c in text]

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))

    def continue_chat(self, messages: list[dict[str, str]]) -> list[int]:
        return self.encode("<end>" + "".join(f"<{m['role']}>{m['content']}" for m in messages))

    def stream(self) -> Decoder:
        return self.Decoder()

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()


@dataclass
class Script:
    """What the workers answer.

    Attributes:
        text: tokens of every choice, one a character, the first from prefill.
        eos: whether its last token ends the choice, else `max_tokens` does.
        gate: what decode waits for before each token after the first.
        accept: what prefill does before it takes a prompt.
        prefill: what prefill does before its first token.
        early: whether decode begins before prefill has done that.
        silent: whether prefill ends without any token.
        report: what decode waits for between the last token and its report.
        refusal: what decode answers instead of making room.
        has_store: whether decode workers say that they have one.
        stores: those that do; empty = all.
        store_refusal: what decode answers where it is to go on from the store.
        stalled: workers that accept connections and answer nothing.
        protocols: versions that workers say they speak; those not named speak the gateway's.
    """

    text: str = "Hello, world"
    eos: bool = True
    num_top: int = 1
    gate: Callable[[], Awaitable[Any]] | None = None
    accept: Callable[[wpb.PrefillRequest], Awaitable[Any]] | None = None
    prefill: Callable[[wpb.PrefillRequest], Awaitable[Any]] | None = None
    early: bool = False
    silent: bool = False
    report: Callable[[], Awaitable[Any]] | None = None
    refusal: wpb.Failed | None = None
    has_store: bool = False
    stores: set[str] = field(default_factory=set)
    store_refusal: wpb.Failed | None = None
    stalled: set[str] = field(default_factory=set)
    protocols: dict[str, int] = field(default_factory=dict)
    opens: list[wpb.Open] = field(default_factory=list)
    cancels: list[wpb.Cancel] = field(default_factory=list)
    prefills: list[wpb.PrefillRequest] = field(default_factory=list)
    prefilled_by: list[str] = field(default_factory=list)
    prefix_chunk: int = 0
    pending: dict[str, int] = field(default_factory=dict)
    ended_prefills: int = 0
    sent_tokens: int = 0

    def token(self, index: int, max_tokens: int) -> tuple[fpb.SampledToken, str]:
        token = fpb.SampledToken(token_id=ord(self.text[index % len(self.text)]), logprob=-0.5)
        for _ in range(self.num_top):
            token.top_logprobs.add(token_id=65, logprob=-1.5)
        if self.eos and index == len(self.text) - 1:
            return token, "stop"
        return token, "length" if index + 1 == max_tokens else ""


class _Service:
    def __init__(self, worker_id: str, script: Script) -> None:
        self.script = script
        self._worker_id = worker_id
        self._identity = WorkerIdentity(worker_id, "decode", "chars", "f" * 32, VOCAB_SIZE, SHAPE, {})

    async def start(self) -> None: ...
    async def stop(self) -> None: ...

    async def Info(self, request: wpb.InfoRequest, context: Any) -> wpb.WorkerInfo:
        if self._worker_id in self.script.stalled:
            await asyncio.Event().wait()
        info = self._identity.info(capacity_bytes=1000, free_bytes=1000)
        info.prefix_chunk_tokens = self.script.prefix_chunk
        info.pending_tokens = self.script.pending.get(self._worker_id, 0)
        info.protocol = self.script.protocols.get(self._worker_id, info.protocol)
        info.has_store = self.script.has_store and self._worker_id in (self.script.stores or {self._worker_id})
        return info


class ScriptedPrefill(_Service, worker_pb2_grpc.PrefillWorkerServicer):
    def add_to(self, server: Any) -> None:
        worker_pb2_grpc.add_PrefillWorkerServicer_to_server(self, server)

    async def Prefill(self, request: wpb.PrefillRequest, context: Any) -> None:
        script = self.script
        script.prefills.append(request)
        script.prefilled_by.append(self._worker_id)
        try:
            if script.accept is not None:
                await script.accept(request)
            await context.send_initial_metadata(())
            if script.silent:
                return
            if script.early:
                STARTED[request.request_id, request.epoch].set()
            if script.prefill is not None:
                await script.prefill(request)
            choices = []
            for index in range(request.sampling.n):
                token, reason = script.token(0, request.sampling.max_tokens)
                choices.append(fpb.ChoiceState(index=index, emitted=[token], finish_reason=reason))
            first = wpb.FirstTokens(choices=choices, queue_s=0.001, prefill_s=0.002)
            await context.write(wpb.PrefillEvent(first_tokens=first))
            if all(choice.finish_reason for choice in choices):
                return
            STARTED[request.request_id, request.epoch].set()
            await context.write(wpb.PrefillEvent(shipped=wpb.Shipped(payload_bytes=1234, frames=2)))
        finally:
            script.ended_prefills += 1


STARTED: dict[tuple[str, int], asyncio.Event] = {}


class OneWriter:
    """A call's context whose messages are written one after the other, as gRPC wants them."""

    def __init__(self, context: Any) -> None:
        self._context, self._lock = context, asyncio.Lock()

    async def write(self, message: Any) -> None:
        async with self._lock:
            await self._context.write(message)


class ScriptedDecode(_Service, worker_pb2_grpc.DecodeWorkerServicer):
    def add_to(self, server: Any) -> None:
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(self, server)

    async def Attach(self, requests: Any, context: Any) -> None:
        await context.send_initial_metadata(())
        context = OneWriter(context)
        runs: dict[tuple[str, int], tuple[asyncio.Task[None], asyncio.Semaphore]] = {}
        ended: set[tuple[str, int, int]] = set()
        try:
            async for message in requests:
                kind = message.WhichOneof("message")
                body = getattr(message, kind)
                key = (body.request_id, body.epoch)
                if kind == "open":
                    self.script.opens.append(body)
                    STARTED[key] = asyncio.Event()
                    credit = asyncio.Semaphore(body.credits)
                    runs[key] = (asyncio.create_task(self._decode(body, credit, ended, context)), credit)
                elif kind == "credit" and key in runs:
                    for _ in range(body.tokens):
                        runs[key][1].release()
                elif kind == "cancel":
                    self.script.cancels.append(body)
                    if body.HasField("choice"):
                        ended.add((*key, body.choice))
                    elif key in runs:
                        runs.pop(key)[0].cancel()
        finally:
            for task, _ in runs.values():
                task.cancel()

    async def _decode(self, body: wpb.Open, credit: asyncio.Semaphore, ended: set[Any], context: Any) -> None:
        ident = {"request_id": body.request_id, "epoch": body.epoch}
        refusal = self.script.store_refusal if body.from_store else self.script.refusal
        if refusal is not None:
            refusal.MergeFrom(wpb.Failed(**ident))
            await context.write(wpb.FromDecode(failed=refusal))
            return
        await context.write(wpb.FromDecode(opened=wpb.Opened(**ident)))
        if not body.from_store:
            await STARTED[body.request_id, body.epoch].wait()
        if body.sent:
            resumed = wpb.Resumed(**ident, recomputed_tokens=3, recomputed_prompt_tokens=0 if body.from_store else 7)
            await context.write(wpb.FromDecode(resumed=resumed))
        told = {i: len(one.token_ids) for i, one in enumerate(body.sent)} or dict.fromkeys(range(body.sampling.n), 1)
        live = {i for i in told if not (body.sent and body.sent[i].finish_reason)}
        while live and self._worker_id not in self.script.stalled:
            for choice in sorted(live):
                index = told[choice]
                if self.script.gate is not None:
                    await self.script.gate()
                if (*ident.values(), choice) in ended:
                    live.discard(choice)
                    continue
                await credit.acquire()
                token, reason = self.script.token(index, body.sampling.max_tokens)
                entry = wpb.TokenEntry(**ident, choice=choice, first_index=index, tokens=[token], finish_reason=reason)
                told[choice] += 1
                self.script.sent_tokens += 1
                await context.write(wpb.FromDecode(tokens=wpb.TokenBatch(entries=[entry])))
                if reason:
                    live.discard(choice)
            await asyncio.sleep(0)
        if live:
            await asyncio.Event().wait()
        if self.script.report is not None:
            await self.script.report()
        finished = wpb.Finished(**ident, resident_bytes=777, bytes_read=30, steps=3)
        await context.write(wpb.FromDecode(finished=finished))


@dataclass
class Fleet:
    """A running gateway and what tests need to steer it."""

    gateway: Gateway
    client: AsyncClient
    address: str
    config: ServeConfig
    script: Script
    recorder: MemoryRecorder
    members: MembershipTable
    hosts: dict[str, WorkerHost] = field(default_factory=dict)

    def scripted(self, worker_id: str, role: str) -> _Service:
        return (ScriptedPrefill if role == "prefill" else ScriptedDecode)(worker_id, self.script)

    async def add_worker(self, worker_id: str, role: str, security: FleetSecurity | None = None) -> None:
        service, security = self.scripted(worker_id, role), security or FleetSecurity.of(self.config)
        host = self.hosts[worker_id] = WorkerHost([service], self.config.max_frame_bytes, security)
        address = await host.start("127.0.0.1")
        await self.members.register(Member(worker_id, role, address, "first"))  # type: ignore[arg-type]

    async def kill_worker(self, worker_id: str) -> None:
        await self.hosts.pop(worker_id).stop()

    async def until_ready(self) -> None:
        while not self.gateway.ready:
            await self.gateway.pool.changed.wait()


@pytest.fixture
async def make_fleet() -> AsyncIterator[Callable[..., Awaitable[Fleet]]]:
    """Starts a gateway with one scripted worker of each role; keyword arguments are configuration keys."""
    async with AsyncExitStack() as stack:

        async def make(workers: bool = True, **settings: Any) -> Fleet:
            tokens = settings.pop("fleet_tokens", ())
            config = load_config(
                {"model": "chars", "port": 0, "http_port": 0, "default_recipe": "exact", "worker_wait_s": 5.0}
                | settings
            ).model_copy(update={"fleet_tokens": tokens})
            members, recorder, script = MembershipTable(), MemoryRecorder(), Script()
            gateway = Gateway(config, CharTokenizer(), members, recorder)
            address = await gateway.start()
            client = AsyncClient(address, timeout_s=20.0)
            fleet = Fleet(gateway, client, address, config, script, recorder, members)

            async def close() -> None:
                await client.close()
                await gateway.stop()
                for host in fleet.hosts.values():
                    await host.stop()

            stack.push_async_callback(close)
            if workers:
                await fleet.add_worker("prefill-0", "prefill")
                await fleet.add_worker("decode-0", "decode")
                await fleet.until_ready()

            return fleet

        yield make


@pytest.fixture
async def fleet(make_fleet: Callable[..., Awaitable[Fleet]]) -> Fleet:
    return await make_fleet()


@dataclass
class RealFleet:
    """A gateway over one real prefill and one real decode worker with a tiny random model, all in this process."""

    gateway: Gateway
    client: AsyncClient
    recorder: MemoryRecorder
    model: Model
    prefill: PrefillEngine
    decode: DecodeEngine
    decode_address: str
    prefill_address: str
    fingerprint: str
    config: ServeConfig
    members: MembershipTable
    identity: WorkerIdentity
    hosts: dict[str, WorkerHost]
    engines: dict[str, DecodeEngine]
    metrics: WorkerMetrics

    async def add_decode(
        self, worker_id: str, store: Store | None = None, through: Callable[[str], str] = lambda address: address
    ) -> None:
        """Start another decode worker; it is in rotation when this returns. `through` gives the address at which others
        reach it."""
        identity = replace(self.identity, worker_id=worker_id, role="decode")
        service = make_decode_service(self.model, self.config, identity, recorder=self.recorder, store=store)
        host = self.hosts[worker_id] = WorkerHost([service], self.config.max_frame_bytes)
        self.engines[worker_id] = service.engine
        address = through(await host.start("127.0.0.1"))
        await self.members.register(Member(worker_id, "decode", address, "first"))
        await wait_until(lambda: any(link.member.worker_id == worker_id for link in self.gateway.pool._decodes()))

    async def lose(self, worker_id: str) -> None:
        """End a worker in the middle of what it does."""
        del self.engines[worker_id]
        await self.hosts.pop(worker_id).stop()

    def busy(self) -> str:
        """The decode worker that holds something."""
        return next(name for name, engine in self.engines.items() if engine.free_bytes < engine.capacity_bytes)

    async def until_idle(self) -> None:
        """Wait until nothing runs; then everything that requests held must be free again."""
        await wait_until(
            lambda: (
                self.gateway.num_requests == 0
                and self.prefill.num_requests == 0
                and all(engine.free_bytes == engine.capacity_bytes for engine in self.engines.values())
                and all(engine.host_free_bytes == engine.host_capacity_bytes for engine in self.engines.values())
            )
        )
        for engine in self.engines.values():
            engine.check_integrity()


def tiny_model(num_layers: int, max_positions: int) -> Model:
    config = config_from_hf(
        {
            "model_type": "llama",
            "num_hidden_layers": num_layers,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": max_positions,
            "eos_token_id": 1,
        }
    )
    return Model(config, random_weights(config, torch.float32, torch.device("cpu"), 0), fingerprint="f" * 32)


@pytest.fixture
def recalling() -> Iterator[str]:
    """The name of a recipe that recalls, for prompts as short as those here."""
    propagation = {"kind": "tsp", "layer": 1, "rate": 0.3, "window": 32, "recall": 0.1, "recall_step": 4}
    made = replace(get_recipe("exact", json.dumps({"propagation": propagation})), name="recalling")
    register(made)
    yield made.name
    unregister(made.name)


@pytest.fixture
async def make_real_fleet() -> AsyncIterator[Callable[..., Awaitable[RealFleet]]]:
    """Starts one; keyword arguments are configuration keys, `num_layers`, and the `store` of the decode worker."""
    async with AsyncExitStack() as stack:

        async def make(num_layers: int = 4, store: Store | None = None, **settings: Any) -> RealFleet:
            base = {
                "model": "tiny",
                "port": 0,
                "http": False,
                "default_recipe": "exact",
                "torch_threads": 1,
                "kv_cache_bytes": 64 << 20,
            }
            config = load_config(base | settings)
            model = tiny_model(num_layers, 4096)
            shape = model_shape(model.config)
            identity = WorkerIdentity(
                "worker-0", "both", "tiny", model.fingerprint, VOCAB_SIZE, shape, load_profile("tiny", shape)
            )
            recorder, members = MemoryRecorder(), MembershipTable()
            metrics = WorkerMetrics("tiny", "worker-0", "both")
            counting, kept = metrics.recorder(recorder), None if store is None else metrics.measured(store)
            prefill = make_prefill_service(model, config, identity, recorder=counting)
            decode = make_decode_service(model, config, identity, recorder=counting, store=kept)
            metrics.watch(prefill)
            metrics.watch(decode)
            addresses, hosts = {}, {}
            for role, service in (("prefill", prefill), ("decode", decode)):
                host = hosts["worker-0" if role == "decode" else role] = WorkerHost([service], config.max_frame_bytes)
                addresses[role] = await host.start("127.0.0.1")
                await members.register(Member("worker-0", role, addresses[role], "first"))  # type: ignore[arg-type]
            gateway = Gateway(config, CharTokenizer(), members, recorder)
            if store is not None:
                gateway.sessions.use_store(store)

            async def stop_hosts() -> None:
                for host in hosts.values():
                    await host.stop()

            stack.push_async_callback(stop_hosts)
            stack.push_async_callback(gateway.stop)
            client = AsyncClient(await gateway.start(), timeout_s=60.0)
            stack.push_async_callback(client.close)
            while not gateway.ready:
                await gateway.pool.changed.wait()
            return RealFleet(
                gateway,
                client,
                recorder,
                model,
                prefill.engine,
                decode.engine,
                addresses["decode"],
                addresses["prefill"],
                model.fingerprint,
                config,
                members,
                identity,
                hosts,
                {"worker-0": decode.engine},
                metrics,
            )

        yield make


@pytest.fixture
async def real_fleet(make_real_fleet: Callable[..., Awaitable[RealFleet]]) -> AsyncIterator[RealFleet]:
    """One with default settings that must have given everything back when the test ends."""
    fleet = await make_real_fleet()
    yield fleet
    await fleet.until_idle()
