"""What a gateway makes of workers that end too early, too late or oddly."""

from __future__ import annotations

import asyncio

import pytest

from kvsluice.errors import InternalError, InvalidRequest, WorkerLost
from kvsluice.protos import worker_pb2 as wpb


async def test_prefill_lost_for_good_before_its_first_token_ends_the_request(make_fleet, until):
    fleet = await make_fleet(worker_wait_s=1.0)
    fleet.script.early = True
    fleet.script.prefill = lambda request: asyncio.Event().wait()
    running = asyncio.create_task(fleet.client.generate("abc", timeout_s=8))
    await until(lambda: fleet.script.sent_tokens >= 3)
    await asyncio.sleep(0.2)  # for them to arrive
    await fleet.kill_worker("prefill-0")
    with pytest.raises(WorkerLost, match="was lost while it worked on the request; no prefill worker is there"):
        await running


async def test_a_prefill_that_ends_without_first_tokens_is_an_error(fleet):
    fleet.script.silent = True
    with pytest.raises(InternalError, match="without its first tokens"):
        await fleet.client.generate("abc", timeout_s=5)


async def test_decode_lost_behind_the_last_token_does_not_spoil_the_answer(fleet):
    fleet.script.report = lambda: asyncio.Event().wait()
    stream = fleet.client.stream("abc", max_tokens=5)
    async for chunk in stream:
        if chunk.finish_reason:
            await fleet.kill_worker("decode-0")
    assert stream.completion.text == "Hello"


async def test_what_decode_refuses_names_the_public_field_and_what_it_allows(fleet):
    fleet.script.refusal = wpb.Failed(
        error_type="InvalidRequest",
        message="num_prompt_tokens: takes 9 bytes; allowed: at most 8 bytes",
        field="num_prompt_tokens",
        allowed="at most 8 bytes",
    )
    with pytest.raises(InvalidRequest, match=r"^prompt: takes 9 bytes") as caught:
        await fleet.client.generate("abc", timeout_s=5)
    assert (caught.value.field, caught.value.allowed) == ("prompt", "at most 8 bytes")
    with pytest.raises(InvalidRequest) as caught:
        await fleet.client.generate([65], timeout_s=5)
    assert caught.value.field == "token_ids"
