"""What a gateway refuses at once, and how much it puts into one message."""

from __future__ import annotations

import asyncio
import threading

import grpc

from kvsluice.errors import Overloaded
from kvsluice.protos import generation_pb2 as pb
from kvsluice.protos import generation_pb2_grpc


async def test_overload_is_told_before_anything_is_tokenized(make_fleet, monkeypatch):
    fleet = await make_fleet(max_num_seqs=1, max_queue=1)
    go = threading.Event()

    def encode(text, add_special_tokens=False):
        assert go.wait(10)
        return [65]

    monkeypatch.setattr(fleet.gateway.intake.tokenizer, "encode", encode)
    running = {asyncio.create_task(fleet.client.generate("abc")) for _ in range(6)}
    refused = []
    while len(refused) < 4:
        done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED, timeout=5)
        assert done, "requests past the queue's bound wait for the tokenizer"
        refused += done
    go.set()
    assert all(isinstance(task.exception(), Overloaded) for task in refused)
    assert [(await task).text for task in running] == ["Hello, worl"] * 2


async def test_a_reader_that_fell_behind_gets_messages_of_bounded_size(make_fleet):
    fleet = await make_fleet(max_message_bytes=64 * 1024, stream_credits=4096)
    fleet.script.eos, fleet.script.num_top = False, 20
    request = pb.GenerateRequest(prompt="abc", sampling=pb.SamplingParams(n=4, max_tokens=500, logprobs=20))
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]
    sizes, tokens = [], 0
    async with grpc.aio.insecure_channel(fleet.address, options=options) as channel:
        call = generation_pb2_grpc.GenerationStub(channel).Generate(request, timeout=30)
        await call.initial_metadata()
        await asyncio.sleep(1)  # meanwhile everything waits in the gateway
        async for response in call:
            sizes.append(response.ByteSize())
            tokens += len(response.chunk.token_ids)
    assert tokens == 2000
    assert max(sizes) <= 64 * 1024


async def test_an_ipv6_address_is_bracketed(make_fleet):
    fleet = await make_fleet(host="::1")
    assert fleet.address.startswith("[::1]:")
    assert (await fleet.client.generate("abc")).text
