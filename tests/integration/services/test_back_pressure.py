"""Whoever is slow slows its own request: clients, stores and links. What waits for them is bounded, and what is too
much is refused with a hint."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from kvsluice.errors import Overloaded
from kvsluice.kvstore.memory import MemoryStore
from kvsluice.protos import generation_pb2 as pb
from kvsluice.protos import generation_pb2_grpc
from kvsluice.protos import worker_pb2 as wpb
from kvsluice.services.decode import keeper, keeping
from kvsluice.services.gateway import links
from kvsluice.services.prefill import server as prefill_server
from kvsluice.services.status import error_from_rpc
from kvsluice.tests.faults.rig.proxy import Proxy, Rules

GREEDY = {"temperature": 0.0, "ignore_eos": True}
PROMPT = [(41 * i) % 250 + 3 for i in range(400)]
MBIT = 125_000  # bytes
SMALL_WINDOWS = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]


@asynccontextmanager
async def unread(fleet: Any, request: pb.GenerateRequest):
    """A stream whose client has begun it and reads nothing."""
    async with grpc.aio.insecure_channel(fleet.address, options=SMALL_WINDOWS) as channel:
        call = generation_pb2_grpc.GenerationStub(channel).Generate(request)
        await call.initial_metadata()
        yield call


async def test_readers_that_stop_leave_a_bounded_amount_in_the_gateway(make_fleet, until):
    """What waits in the gateway is what the credits of one request allow, however long its answer is."""
    num_choices, num_tokens, num_credits = 4, 2000, 16
    fleet = await make_fleet(stream_credits=num_credits)
    script = fleet.script
    script.eos, script.num_top = False, 20
    sampling = pb.SamplingParams(n=num_choices, max_tokens=num_tokens, logprobs=20)
    (link,) = fleet.gateway.pool._decodes()
    async with unread(fleet, pb.GenerateRequest(prompt="abc", sampling=sampling)) as call:
        sent, quiet = -1, 0
        async with asyncio.timeout(30):
            while quiet < 10:
                await asyncio.sleep(0.05)
                quiet = quiet + 1 if script.sent_tokens == sent else 0
                sent = script.sent_tokens
        assert sent < num_choices * num_tokens / 2, "decode went on though nobody read"
        waiting = sum(inbox._queue.qsize() for inbox in link._inboxes.values())
        assert waiting <= num_choices * num_credits
        assert link._outbox.qsize() == 0
        others = [fleet.client.generate("abc", max_tokens=300) for _ in range(4)]
        assert [done.usage.completion_tokens for done in await asyncio.gather(*others)] == [300] * 4
        assert sum(inbox._queue.qsize() for inbox in link._inboxes.values()) <= num_choices * num_credits
        call.cancel()
    await until(lambda: fleet.gateway.num_requests == 0 and not link._inboxes)


async def test_overload_is_shed_with_its_status_and_a_hint(make_fleet, until):
    fleet = await make_fleet(max_num_seqs=1, max_queue=1)
    await fleet.client.generate("abc")
    whole = await fleet.client.generate("abc")  # the rate at which requests end is known now
    go = asyncio.Event()
    fleet.script.gate = go.wait
    running = [asyncio.create_task(fleet.client.generate("abc")) for _ in range(2)]
    await until(lambda: fleet.gateway.intake.admission.num_waiting == 1)
    async with grpc.aio.insecure_channel(fleet.address) as channel:
        call = generation_pb2_grpc.GenerationStub(channel).Generate(pb.GenerateRequest(prompt="abc"))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in call:
                pass
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    error = error_from_rpc(refused.value)
    assert isinstance(error, Overloaded) and error.retry_after_s > 0
    go.set()
    for task in running:
        assert (await task).text == whole.text


async def test_requests_that_wait_for_the_first_workers_are_bounded(make_fleet, until):
    fleet = await make_fleet(workers=False, max_queue=2)
    early = [asyncio.create_task(fleet.client.generate("abc")) for _ in range(5)]
    await until(lambda: sum(task.done() for task in early) == 3)
    assert all(isinstance(task.exception(), Overloaded) for task in early if task.done())
    await fleet.add_worker("prefill-0", "prefill")
    await fleet.add_worker("decode-0", "decode")
    served = [await task for task in early if not task.done() or task.exception() is None]
    assert len(served) == 2 and all(done.text.startswith("Hello") for done in served)


async def test_a_worker_that_reads_nothing_is_sent_no_more(fleet, monkeypatch):
    monkeypatch.setattr(links, "MAX_UNSENT", 2)
    (link,) = fleet.gateway.pool._decodes()
    for epoch in (1, 2):  # nothing runs in between that could write them
        link.open(wpb.Open(request_id="a", epoch=epoch), links.Inbox())
    with pytest.raises(links.WorkerLost, match="takes no messages"):
        link.open(wpb.Open(request_id="a", epoch=3), links.Inbox())
    for epoch in (1, 2):
        link.close("a", epoch, finished=True)


class GatedStore(MemoryStore):
    """One that takes nothing while its gate is shut."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = 0

    async def put(self, *args: Any) -> None:
        self.waiting += 1
        await self.gate.wait()
        self.waiting -= 1
        await super().put(*args)

    async def delete(self, *args: Any) -> bool:
        await self.gate.wait()
        return await super().delete(*args)


async def test_a_store_that_takes_nothing_holds_what_is_kept_in_it_alone(make_real_fleet, monkeypatch, until):
    """The prompt's frames wait where a bounded number of bytes has not been written, and so does prefill."""
    monkeypatch.setattr(keeper, "MAX_QUEUED_BYTES", 32 * 1024)
    store = GatedStore(1 << 30)
    fleet = await make_real_fleet(store=store, num_layers=8, handoff_window=2)
    whole = await fleet.client.generate(PROMPT, max_tokens=12, **GREEDY)
    store.gate.clear()
    options = {"max_tokens": 12, "durability": "tokens", "request_id": "kept", **GREEDY}
    held = asyncio.create_task(fleet.client.generate(PROMPT, **options))
    await until(lambda: store.waiting)
    for _ in range(3):
        other = await fleet.client.generate(PROMPT, max_tokens=12, **GREEDY)
        assert other.token_ids == whole.token_ids
    sent, acked = (len(fleet.recorder.events(f"prefill.frame_{what}", request_id="kept")) for what in ("sent", "acked"))
    assert sent - acked <= 2 and not held.done()
    assert len(fleet.recorder.events("decode.committed", request_id="kept")) == 0, "its frames are not all taken in"
    store.gate.set()
    assert (await held).token_ids == whole.token_ids
    assert (await held).durability.kept
    await fleet.until_idle()


async def test_a_full_store_is_given_up_and_nobody_waits_for_it(make_real_fleet):
    store = MemoryStore(64 * 1024)
    fleet = await make_real_fleet(store=store, store_keep_every=4)
    whole = await fleet.client.generate(PROMPT, max_tokens=40, **GREEDY)
    options = {"max_tokens": 40, "durability": "tokens", **GREEDY}
    for done in await asyncio.gather(*(fleet.client.generate(PROMPT, **options) for _ in range(3))):
        assert done.token_ids == whole.token_ids
        assert not done.durability.kept
    assert store.used_bytes <= store.capacity_bytes
    store.check_integrity()
    await fleet.until_idle()


async def test_ends_that_wait_for_a_slow_store_are_bounded(make_real_fleet, monkeypatch, until):
    monkeypatch.setattr(keeping, "MAX_TASKS", 2)
    store = GatedStore(1 << 30)
    fleet = await make_real_fleet(store=store)
    store.gate.clear()
    options = {"max_tokens": 4, "durability": "handoff", **GREEDY}
    for _ in range(6):
        await fleet.client.generate(PROMPT[:40], **options)
    service = next(s for s in fleet.hosts["worker-0"]._services)
    await until(lambda: len(service._store._tasks) <= 2)
    store.gate.set()
    await until(lambda: not service._store._tasks)
    await fleet.until_idle()


async def test_a_slow_link_to_a_decode_worker_holds_its_own_prompt_alone(make_real_fleet, monkeypatch, until):
    """A link that carries nothing, and then 1 Mbit/s."""
    fleet = await make_real_fleet(handoff_window=1)
    whole = await fleet.client.generate(PROMPT[:200], max_tokens=12, **GREEDY)
    host, _, port = fleet.decode_address.rpartition(":")
    make_channel = prefill_server.make_channel
    with Proxy(host, int(port)) as proxy:

        def by_proxy(address: str, *settings: Any) -> Any:
            slow = address == fleet.decode_address
            return make_channel(f"127.0.0.1:{proxy.port}" if slow else address, *settings)

        monkeypatch.setattr(prefill_server, "make_channel", by_proxy)
        (service,) = fleet.hosts["prefill"]._services
        await service._peers.close()  # its channel leads past the proxy
        proxy.requests = Rules(hold=True)
        held = asyncio.create_task(fleet.client.generate(PROMPT[:200], max_tokens=12, request_id="held", **GREEDY))
        await until(lambda: fleet.recorder.events("prefill.frame_sent", request_id="held"))
        await fleet.add_decode("near")
        for _ in range(3):
            other = await fleet.client.generate(PROMPT[:200], max_tokens=12, **GREEDY)
            assert other.token_ids == whole.token_ids
        sent = len(fleet.recorder.events("prefill.frame_sent", request_id="held"))
        assert sent == 1 and not fleet.recorder.events("prefill.frame_acked", request_id="held")
        assert fleet.prefill.num_requests == 1 and not held.done()
        proxy.requests = Rules(bytes_per_s=MBIT)
        assert (await held).token_ids == whole.token_ids
    await fleet.until_idle()
