"""A client that does not read holds up itself and nobody else."""

from __future__ import annotations

import asyncio

import grpc

from kvsluice.protos import generation_pb2 as pb
from kvsluice.protos import generation_pb2_grpc

NUM_CHOICES, NUM_TOKENS = 8, 500


async def test_a_slow_reader_pauses_only_its_own_sequence(fleet):
    script = fleet.script
    script.eos, script.num_top = False, 20
    request = pb.GenerateRequest(
        prompt="abc", sampling=pb.SamplingParams(n=NUM_CHOICES, max_tokens=NUM_TOKENS, logprobs=20)
    )
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]
    async with grpc.aio.insecure_channel(fleet.address, options=options) as channel:
        call = generation_pb2_grpc.GenerationStub(channel).Generate(request)
        await call.initial_metadata()
        sent, quiet = -1, 0
        async with asyncio.timeout(30):
            while quiet < 10:  # until decode has sent nothing more for a while
                await asyncio.sleep(0.05)
                quiet = quiet + 1 if script.sent_tokens == sent else 0
                sent = script.sent_tokens
        assert sent < NUM_CHOICES * (NUM_TOKENS - 1), "decode ran to the end though nobody read"

        other = await fleet.client.generate("abc", max_tokens=100)
        assert other.usage.completion_tokens == 100

        tokens = 0
        async for response in call:
            tokens += len(response.chunk.token_ids)
        assert tokens == NUM_CHOICES * NUM_TOKENS
        assert await call.code() is grpc.StatusCode.OK
