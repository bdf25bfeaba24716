"""The gateway's promises to its clients, over real gRPC with scripted workers."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvsluice.errors import DeadlineExceeded, DuplicateRequest, Overloaded, RequestCancelled, WorkerLost
from kvsluice.protos import generation_pb2 as pb
from kvsluice.protos import generation_pb2_grpc


async def read(stream):
    return [chunk async for chunk in stream]


def forever():
    """A gate or prefill hook that never lets go."""

    async def wait(*_args):
        await asyncio.Event().wait()

    return wait


async def test_a_request_streams_and_ends_with_a_report(fleet, until):
    stream = fleet.client.stream("abcdefgh", request_id="r1", max_tokens=50)
    chunks = await read(stream)
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
    await until(lambda: fleet.gateway.num_requests == 0)


async def test_defaults_reach_the_workers(fleet):
    await fleet.client.generate("abc")
    sampling = fleet.script.opens[0].sampling
    assert sampling.max_tokens == 512 - 3  # the rest of the context
    assert (sampling.temperature, sampling.top_p, sampling.n) == (1.0, 1.0, 1)
    assert fleet.script.prefills[0].epoch == fleet.script.opens[0].epoch
    first = fleet.script.opens[0].epoch
    await fleet.client.generate("abc")
    assert fleet.script.opens[1].epoch > first


async def test_length_ends_a_choice(fleet):
    done = await fleet.client.generate("abc", max_tokens=4)
    assert (done.text, done.choices[0].finish_reason, done.choices[0].stop_match) == ("Hell", "length", "")


async def test_one_token_needs_no_decode(fleet, until):
    done = await fleet.client.generate("abc", max_tokens=1)
    assert done.text == "H"
    assert done.recipe.handoff_bytes == 0
    await until(lambda: fleet.script.cancels)
    assert fleet.script.cancels[0].request_id == done.request_id  # what decode had reserved is free again


@pytest.mark.parametrize(
    ("stop", "text", "match"),
    [
        ("lo, w", "Hel", "lo, w"),  # across token boundaries
        (["xyz", "worl"], "Hello, ", "worl"),
        ("H", "", "H"),  # the first token, before decode has begun
        ("Hello, worl", "", "Hello, worl"),
        ("lx", "Hello, worl", "d"),  # the withheld "l" comes out when the model ends
    ],
)
async def test_stop_strings_end_a_choice_and_are_not_shown(fleet, stop, text, match, until):
    done = await fleet.client.generate("abc", stop=stop, max_tokens=12)
    assert (done.text, done.choices[0].finish_reason, done.choices[0].stop_match) == (text, "stop", match)
    await until(lambda: fleet.gateway.num_requests == 0)


async def test_text_that_could_begin_a_stop_string_is_withheld(fleet):
    fleet.script.text = "aXXb"
    fleet.script.eos = False
    chunks = await read(fleet.client.stream("abc", stop="XXX", max_tokens=4))
    assert [c.text for c in chunks if c.text] in (["a", "XXb"], ["aXXb"])  # tokens that come together share a chunk
    assert sum(len(c.token_ids) for c in chunks) == 4


async def test_min_tokens_keeps_stop_strings_from_ending_early(fleet):
    done = await fleet.client.generate("abc", stop=["H", "o"], min_tokens=6, max_tokens=12)
    assert (done.text, done.choices[0].stop_match) == ("Hello, w", "o")


async def test_choices_end_on_their_own(fleet):
    done = await fleet.client.generate("abc", n=3, max_tokens=5, logprobs=1)
    assert [c.text for c in done.choices] == ["Hello"] * 3
    assert done.usage.completion_tokens == 15
    logprob = done.choices[2].logprobs[1]
    assert (logprob.token, logprob.logprob, logprob.top[0].token) == ("e", -0.5, "A")


async def test_cancel_by_id_ends_the_request_everywhere(fleet, until):
    fleet.script.gate = forever()
    stream = fleet.client.stream("abc", request_id="victim")
    await anext(stream)
    assert await fleet.client.cancel("victim")
    with pytest.raises(RequestCancelled):
        await read(stream)
    await until(lambda: fleet.script.cancels and fleet.script.ended_prefills == 1)
    assert not await fleet.client.cancel("victim")
    assert fleet.gateway.num_requests == 0


@pytest.mark.parametrize("phase", ["prefill", "decode"])
async def test_a_client_that_goes_away_frees_the_workers(fleet, phase, until):
    if phase == "prefill":
        fleet.script.prefill = forever()
    else:
        fleet.script.gate = forever()
    stream = fleet.client.stream("abc")
    await until(lambda: fleet.script.prefills)
    stream.cancel()
    await until(lambda: fleet.script.cancels and fleet.script.ended_prefills == 1)
    await until(lambda: fleet.gateway.num_requests == 0)


async def test_the_clients_deadline_ends_the_request_everywhere(fleet, until):
    fleet.script.prefill = forever()
    with pytest.raises(DeadlineExceeded):
        await fleet.client.generate("abc", timeout_s=0.3)
    await until(lambda: fleet.script.cancels and fleet.script.ended_prefills == 1)


async def test_the_servers_deadline_holds_where_a_client_sets_none(make_fleet):
    fleet = await make_fleet(default_deadline_s=0.3)
    fleet.script.gate = forever()
    with pytest.raises(DeadlineExceeded, match=r"within 0\.3 s"):
        await fleet.client.generate("abc", timeout_s=None)


async def test_a_duplicate_id_is_refused_and_the_first_goes_on(fleet):
    gate = asyncio.Event()
    fleet.script.gate = gate.wait
    first = fleet.client.stream("abc", request_id="same")
    await anext(first)
    with pytest.raises(DuplicateRequest):
        await fleet.client.generate("abc", request_id="same")
    gate.set()
    await read(first)
    assert first.completion.usage.completion_tokens == 12
    await fleet.client.generate("abc", request_id="same")  # free again


async def test_a_full_queue_sheds_at_once(make_fleet, until):
    fleet = await make_fleet(max_num_seqs=1, max_queue=1)
    gate = asyncio.Event()
    fleet.script.gate = gate.wait
    running = fleet.client.stream("abc")
    await anext(running)
    waiting = asyncio.create_task(fleet.client.generate("abc"))
    await until(lambda: fleet.gateway.num_requests == 2)
    with pytest.raises(Overloaded):
        await fleet.client.generate("abc")
    gate.set()
    assert (await waiting).usage.completion_tokens == 12
    await read(running)


async def test_a_lost_decode_worker_that_nobody_follows_fails_its_requests_and_a_new_one_serves(make_fleet):
    fleet = await make_fleet(worker_wait_s=0.5)
    fleet.script.gate = forever()
    streams = [fleet.client.stream("abc") for _ in range(3)]
    for stream in streams:
        await anext(stream)
    await fleet.kill_worker("decode-0")
    for stream in streams:
        with pytest.raises(WorkerLost, match="decode"):
            await read(stream)
    fleet.script.gate = None
    pending = asyncio.create_task(fleet.client.generate("abc"))  # waits for a worker
    await fleet.add_worker("decode-0", "decode")
    assert (await pending).text == "Hello, worl"


async def test_a_lost_prefill_worker_that_nobody_follows_fails_its_requests_and_a_new_one_serves(make_fleet, until):
    fleet = await make_fleet(worker_wait_s=0.5)
    fleet.script.prefill = forever()
    pending = asyncio.create_task(fleet.client.generate("abc"))
    await until(lambda: fleet.script.prefills)
    await fleet.kill_worker("prefill-0")
    with pytest.raises(WorkerLost):
        await pending
    fleet.script.prefill = None
    pending = asyncio.create_task(fleet.client.generate("abc"))
    await fleet.add_worker("prefill-0", "prefill")
    assert (await pending).text == "Hello, worl"


async def test_waiting_for_a_worker_is_bounded(make_fleet):
    fleet = await make_fleet(workers=False, worker_wait_s=0.2)
    with pytest.raises(WorkerLost, match="no decode worker"):
        await fleet.client.generate("abc")


async def test_an_error_carries_its_details_as_a_trailer(fleet):
    async with grpc.aio.insecure_channel(fleet.address) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        request = pb.GenerateRequest(request_id="r7", prompt="abc", sampling=pb.SamplingParams(top_p=7.0))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(request).read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    info = pb.ErrorInfo.FromString(dict(caught.value.trailing_metadata())["kvsluice-error-bin"])
    assert (info.type, info.field, info.request_id) == ("InvalidRequest", "sampling.top_p", "r7")
    assert info.allowed == "above 0 and at most 1"
    assert not info.retryable


async def test_an_unexpected_fault_shows_nothing_of_the_inside(fleet, monkeypatch):
    async def broken():
        raise ValueError("/secret/path and the prompt")

    monkeypatch.setattr(fleet.gateway.pool, "route", broken)
    async with grpc.aio.insecure_channel(fleet.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generation_pb2_grpc.GenerationStub(channel).Generate(pb.GenerateRequest(prompt="abc")).read()
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert caught.value.details() == "internal error"


async def test_health_and_reflection(fleet):
    service = "kvsluice.v1.Generation"
    serving = health_pb2.HealthCheckResponse.SERVING
    not_serving = health_pb2.HealthCheckResponse.NOT_SERVING

    async with grpc.aio.insecure_channel(fleet.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def status(name):
            return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status

        watch = stub.Watch(health_pb2.HealthCheckRequest(service=service))
        while (await watch.read()).status != serving:
            pass
        await fleet.kill_worker("prefill-0")
        while (await watch.read()).status != not_serving:
            pass
        assert (await status(""), await status(service)) == (serving, not_serving)
        await fleet.add_worker("prefill-0", "prefill")
        while (await watch.read()).status != serving:
            pass
        watch.cancel()
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
        names = {item.name for item in (await call.read()).list_services_response.service}
        assert {service, "grpc.health.v1.Health"} <= names
        call.cancel()


async def test_a_drain_finishes_what_runs_and_takes_no_more(fleet, until):
    gate = asyncio.Event()
    fleet.script.gate = gate.wait
    stream = fleet.client.stream("abc")
    await anext(stream)
    draining = asyncio.create_task(fleet.gateway.drain(10))
    await until(lambda: not fleet.gateway.ready)
    with pytest.raises(WorkerLost, match="shutting down"):
        await fleet.client.generate("abc")
    gate.set()
    await read(stream)
    assert stream.completion.usage.completion_tokens == 12
    assert await draining


async def test_a_stop_past_its_grace_ends_what_is_left_with_an_error(fleet):
    fleet.script.gate = forever()
    stream = fleet.client.stream("abc")
    await anext(stream)
    stopping = asyncio.create_task(fleet.gateway.stop(0.1))
    with pytest.raises(WorkerLost, match="stopped"):
        await read(stream)
    await stopping


async def test_model_info(fleet):
    info = await fleet.client.model_info()
    assert (info.model, info.max_model_len, info.vocab_size) == ("chars", 512, 256)
    assert "exact" in info.recipes
    assert info.default_recipe == "exact"
