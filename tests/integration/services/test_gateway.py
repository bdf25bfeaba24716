"""The gateway's promises to its clients, over real gRPC."""

from __future__ import annotations

import asyncio

from kvsluice.client import Chunk


async def test_a_request_streams_and_ends_with_a_report(fleet):
    stream = fleet.client.stream("abcdefgh", request_id="r1", max_tokens=50)
    chunks: list[Chunk] = [chunk async for chunk in stream]
    done = stream.completion
    assert "".join(c.text for c in chunks) == done.text == "Hello, worl"  # the last token ends it and gives no text
    assert done.token_ids == tuple(map(ord, "Hello, world"))
    assert done.choices[0].finish_reason == "stop"
    assert done.choices[0].stop_match == "d"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (8, 12)
    assert done.recipe.effective == "exact"
    assert done.recipe.handoff_bytes == 1234
    assert done.recipe.handoff_bf16_bytes == 2 * 2 * 4 * 2 * 16 * 8
    assert (done.recipe.resident_bytes, done.recipe.bytes_read_per_step) == (777, 10)
    assert done.timing.prefill_s == 0.002
    assert done.timing.time_to_first_token_s > 0
    await asyncio.sleep(0)
    assert fleet.gateway.num_requests == 0
