"""Gateway, prefill and decode services together, with a tiny random model and real frames over real gRPC."""

from __future__ import annotations

import asyncio
import os

import grpc
import pytest
import torch

from kvsluice.compression.recipe import get_recipe, recipe_names
from kvsluice.errors import InvalidRequest, RequestCancelled
from kvsluice.kvstore.frame import DType, Kind, TensorSlice, encode_frame
from kvsluice.kvstore.identity import FrameIdent
from kvsluice.models.forward import forward_tokens
from kvsluice.protos import worker_pb2 as wpb
from kvsluice.protos import worker_pb2_grpc
from kvsluice.protos.worker_pb2_grpc import DecodeWorkerStub, PrefillWorkerStub
from kvsluice.services.decode.engine import DecodeEngine
from kvsluice.services.lifecycle import WorkerHost


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 256, (length,), generator=generator).tolist()


def monolithic(model, ids: list[int], num_tokens: int) -> tuple[int, ...]:
    """Greedy tokens without any of the services: one dense forward a token."""
    out: list[int] = []
    for _ in range(num_tokens):
        out.append(int(forward_tokens(model, torch.tensor(ids + out))[-1].argmax()))
    return tuple(out)


async def test_answers_are_the_same_with_values_in_host_memory(make_real_fleet):
    """Layers are sent whole and part of each then lies on the host; what a request may take of it bounds admission."""
    slots = {"retrieval": {"kind": "chunks", "chunk": 4, "outliers": 0, "budget_tokens": 16, "budget_rate": 0.01}}
    options = {"recipe": "sluice-full", "slots": slots, "temperature": 1.0, "seed": 3, "max_tokens": 20, "n": 2}
    near, far = await make_real_fleet(), await make_real_fleet(kv_offloading_bytes=64 << 20)
    wanted, found = [await fleet.client.generate(prompt(2500), **options) for fleet in (near, far)]
    assert [choice.token_ids for choice in found.choices] == [choice.token_ids for choice in wanted.choices]
    assert found.recipe.fallback_reason == ""
    assert found.recipe.resident_bytes < wanted.recipe.resident_bytes
    await far.until_idle()
    assert far.decode.host.num_free == far.decode.host.num_pages == 64
    assert far.decode.scheduler.host.high_water_bytes > 0


async def test_exact_equals_a_monolithic_run_singly_and_together(real_fleet):
    prompts = [prompt(length, seed=length) for length in (3, 40, 130, 257)]
    options = {"temperature": 0, "max_tokens": 9, "ignore_eos": True, "recipe": "exact"}
    wanted = [monolithic(real_fleet.model, ids, 9) for ids in prompts]
    singly = [(await real_fleet.client.generate(ids, **options)).token_ids for ids in prompts]
    together = await asyncio.gather(*(real_fleet.client.generate(ids, **options) for ids in prompts))
    assert singly == wanted
    assert [done.token_ids for done in together] == wanted


@pytest.mark.parametrize("recipe", recipe_names())
async def test_every_recipe_runs_and_reports_what_it_cost(real_fleet, recipe):
    ids = prompt(1500)
    done = await real_fleet.client.generate(ids, recipe=recipe, temperature=0, max_tokens=6, ignore_eos=True)
    report = done.recipe
    assert (report.requested, report.effective, report.fallback_reason) == (recipe, recipe, "")
    assert len(done.token_ids) == 6
    assert report.handoff_bf16_bytes == 2 * 2 * 4 * 2 * 16 * 1500
    assert report.resident_bytes > 0
    assert report.bytes_read_per_step > 0
    frames = real_fleet.recorder.events("prefill.frame_sent", request_id=done.request_id)
    assert report.handoff_bytes == sum(e.fields["payload_bytes"] for e in frames) > 0
    if recipe not in ("exact", "shadowkv"):  # these ship rows in the compute dtype, which is float32 here
        assert report.handoff_bytes < report.handoff_bf16_bytes


async def test_a_short_prompt_runs_exact_and_says_so(real_fleet):
    done = await real_fleet.client.generate(prompt(5), recipe="balanced", max_tokens=3, ignore_eos=True)
    assert (done.recipe.requested, done.recipe.effective) == ("balanced", "exact")
    assert done.recipe.fallback_reason


async def test_decode_has_the_first_layer_before_prefill_starts_its_last(make_real_fleet):
    fleet = await make_real_fleet(num_layers=12)
    done = await fleet.client.generate(prompt(1024), max_tokens=3, ignore_eos=True)
    of_request = {"request_id": done.request_id}
    acked = fleet.recorder.events("decode.frame_acked", index=0, **of_request)
    last = fleet.recorder.events("prefill.layer_started", layer=11, **of_request)
    committed = fleet.recorder.events("decode.committed", **of_request)
    assert acked[0].fields["layer_begin"] == 0
    assert acked[0].at_s < last[0].at_s < committed[0].at_s
    await fleet.until_idle()


async def test_sampling_is_a_function_of_the_seed(real_fleet):
    options = {"seed": 7, "n": 2, "max_tokens": 8, "logprobs": 2, "ignore_eos": True}
    first = await real_fleet.client.generate(prompt(20), **options)
    again = await real_fleet.client.generate(prompt(20), **options)
    other = await real_fleet.client.generate(prompt(20), **{**options, "seed": 8})
    assert [c.token_ids for c in first.choices] == [c.token_ids for c in again.choices]
    assert first.choices[0].token_ids != first.choices[1].token_ids
    assert first.token_ids != other.token_ids
    assert len(first.choices[0].logprobs) == 8
    assert len(first.choices[0].logprobs[3].top) == 2


async def test_a_stop_string_ends_one_choice_and_frees_it(real_fleet):
    options = {"seed": 3, "n": 2, "max_tokens": 40, "ignore_eos": True}
    free = await real_fleet.client.generate(prompt(20), **options)
    stop = free.choices[0].text[10:12]
    assert stop not in free.choices[1].text
    done = await real_fleet.client.generate(prompt(20), stop=stop, **options)
    begin = free.choices[0].text.index(stop)
    assert done.choices[0].text == free.choices[0].text[:begin]
    assert [c.finish_reason for c in done.choices] == ["stop", "length"]
    assert done.choices[1].text == free.choices[1].text


async def test_cancel_while_prefill_runs_frees_everything(real_fleet, until):
    stream = real_fleet.client.stream(prompt(3000), request_id="long", max_tokens=900, ignore_eos=True)
    await until(lambda: real_fleet.recorder.events("prefill.layer_started", request_id="long", layer=0))
    assert await real_fleet.client.cancel("long")
    with pytest.raises(RequestCancelled):
        async for _ in stream:
            pass


async def test_a_request_waits_for_memory_and_one_that_never_fits_is_refused(make_real_fleet):
    # room for one request of this size and not for two
    fleet = await make_real_fleet(kv_cache_bytes=1 << 20)
    options = {"max_tokens": 5, "ignore_eos": True}
    both = await asyncio.gather(*(fleet.client.generate(prompt(600), **options) for _ in range(2)))
    assert [len(done.token_ids) for done in both] == [5, 5]
    with pytest.raises(InvalidRequest):
        await fleet.client.generate(prompt(4000), **options)
    await fleet.until_idle()


async def attach_and_open(fleet, request_id: str, epoch: int):
    """A gateway's stream with one request opened on it."""
    channel = grpc.aio.insecure_channel(fleet.decode_address)
    call = DecodeWorkerStub(channel).Attach()
    sampling = wpb.Sampling(max_tokens=4, temperature=0, top_p=1, repetition_penalty=1, n=1)
    recipe = get_recipe("exact")
    message = wpb.Open(
        request_id=request_id,
        epoch=epoch,
        num_prompt_tokens=8,
        recipe_json=recipe.to_json(),
        sampling=sampling,
        credits=4,
    )
    await call.write(wpb.ToDecode(open=message))
    assert (await call.read()).opened.request_id == request_id
    ident = FrameIdent(
        request_id=request_id,
        epoch=epoch,
        tenant="",
        model_fingerprint=fleet.fingerprint,
        recipe_fingerprint=recipe.fingerprint,
    )
    return channel, call, ident


def frame(ident: FrameIdent) -> bytes:
    data = memoryview(bytes(64))
    item = TensorSlice(0, Kind.KEYS, "k", DType.FLOAT32, (16,), 0, 16, 0, 2, data)
    return encode_frame(ident, (0, 8), [item])


async def put(channel, *messages: wpb.FramePut) -> grpc.StatusCode:
    """Send messages as a prefill worker would. Returns the status that the call ends with."""
    call = DecodeWorkerStub(channel).PutFrames()
    try:
        for message in messages:
            await call.write(message)
            await call.read()
        await call.done_writing()
    except (grpc.RpcError, asyncio.InvalidStateError):
        pass
    return await call.code()


async def test_decode_refuses_frames_that_it_does_not_expect(real_fleet):
    channel, call, ident = await attach_and_open(real_fleet, "r", 5)
    sound = frame(ident)
    other = {"request_id": "other", "epoch": 5} | {
        name: getattr(ident, name) for name in ("tenant", "model_fingerprint", "recipe_fingerprint")
    }
    old = {**other, "request_id": "r", "epoch": 4}
    model = {**old, "epoch": 5, "model_fingerprint": "e" * 32}
    async with channel:
        status = grpc.StatusCode
        assert await put(channel, wpb.FramePut(frame=sound[:-9] + b"x" + sound[-8:])) is status.DATA_LOSS
        assert await put(channel, wpb.FramePut(frame=b"")) is status.DATA_LOSS
        assert await put(channel, wpb.FramePut(manifest=b"junk")) is status.DATA_LOSS
        for wrong in (other, old, model):
            refused = await put(channel, wpb.FramePut(frame=frame(FrameIdent(**wrong))))
            assert refused is status.FAILED_PRECONDITION
        twice = wpb.FramePut(frame=sound)
        assert await put(channel, twice, twice) is status.DATA_LOSS
        call.cancel()
    await real_fleet.until_idle()  # the gateway's stream took its request with it
    done = await real_fleet.client.generate(prompt(10), max_tokens=3, ignore_eos=True)
    assert len(done.token_ids) == 3


async def test_decode_refuses_an_open_request_a_second_time(real_fleet):
    channel, call, _ = await attach_and_open(real_fleet, "r", 5)
    async with channel:
        again = wpb.Open(request_id="r", epoch=6, num_prompt_tokens=8, recipe_json=get_recipe("exact").to_json())
        await call.write(wpb.ToDecode(open=again))
        assert (await call.read()).failed.error_type == "DuplicateRequest"
        call.cancel()


@pytest.mark.parametrize("fault", ["open recipe", "no text", "unforeseen"])
async def test_a_bad_open_leaves_the_other_requests_of_its_stream_alone(monkeypatch, real_fleet, fault):
    channel, call, _ = await attach_and_open(real_fleet, "r", 5)
    async with channel:
        name = "sluice" if fault == "open recipe" else "exact"
        text = "{" if fault == "no text" else get_recipe(name).to_json()
        sampling = wpb.Sampling(max_tokens=4, top_p=1, repetition_penalty=1, n=1)
        bad = wpb.Open(request_id="bad", epoch=1, num_prompt_tokens=500, recipe_json=text, sampling=sampling)
        with monkeypatch.context() as patch:
            if fault == "unforeseen":
                patch.setattr(DecodeEngine, "demand", lambda *args: 1 // 0)
            await call.write(wpb.ToDecode(open=bad))
            failed = (await call.read()).failed
        wanted = "InternalError" if fault == "unforeseen" else "InvalidRecipe"
        assert (failed.request_id, failed.epoch, failed.error_type) == ("bad", 1, wanted)
        assert bool(failed.field and failed.allowed) is (wanted == "InvalidRecipe")
        await call.write(wpb.ToDecode(cancel=wpb.Cancel(request_id="r", epoch=5)))
        again = wpb.Open(
            request_id="s",
            epoch=1,
            num_prompt_tokens=8,
            recipe_json=get_recipe("exact").to_json(),
            sampling=sampling,
            credits=4,
        )
        await call.write(wpb.ToDecode(open=again))
        assert (await call.read()).opened.request_id == "s", "the stream goes on"
        call.cancel()
    await real_fleet.until_idle()


def prefill_request(request_id: str, ids: list[int], decode_address: str) -> wpb.PrefillRequest:
    return wpb.PrefillRequest(
        request_id=request_id,
        epoch=1,
        prompt_ids=ids,
        recipe_json=get_recipe("exact").to_json(),
        sampling=wpb.Sampling(max_tokens=4, top_p=1, repetition_penalty=1, n=1),
        decode_address=decode_address,
    )


class SilentDecode(worker_pb2_grpc.DecodeWorkerServicer):
    """Takes frames and never acknowledges one."""

    def __init__(self) -> None:
        self.num_frames = 0

    async def start(self) -> None: ...
    async def stop(self) -> None: ...

    def add_to(self, server) -> None:
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(self, server)

    async def PutFrames(self, requests, context):
        async for _ in requests:
            self.num_frames += 1


async def test_the_first_token_does_not_wait_for_the_handoff(real_fleet):
    host = WorkerHost([SilentDecode()], 16 << 20)
    address = await host.start("127.0.0.1")
    async with grpc.aio.insecure_channel(real_fleet.prefill_address) as channel:
        call = PrefillWorkerStub(channel).Prefill(prefill_request("quick", prompt(50), address))
        assert len((await call.read()).first_tokens.choices) == 1
        assert not real_fleet.recorder.events("prefill.frame_acked", request_id="quick")
        call.cancel()
    await host.stop()


async def test_nothing_is_left_of_requests_of_any_fate(real_fleet, until):
    await real_fleet.client.generate(prompt(20), max_tokens=3, ignore_eos=True)
    tasks, descriptors = len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))
    for fate in range(12):
        stream = real_fleet.client.stream(prompt(200, fate), max_tokens=30, ignore_eos=True, request_id=f"r{fate}")
        if fate % 3 > 0:
            await anext(stream)
        if fate % 3 == 1:
            stream.cancel()
        elif fate % 3 == 2:
            await real_fleet.client.cancel(f"r{fate}")
        else:
            async for _ in stream:
                pass
        del stream
    await real_fleet.until_idle()
    await until(lambda: len(asyncio.all_tasks()) <= tasks)
    assert len(os.listdir("/proc/self/fd")) <= descriptors


async def test_prefill_is_held_back_while_its_frames_are_not_acknowledged(make_real_fleet, until):
    fleet = await make_real_fleet(num_layers=12, handoff_window=3)
    silent = SilentDecode()
    host = WorkerHost([silent], 16 << 20)
    address = await host.start("127.0.0.1")
    async with grpc.aio.insecure_channel(fleet.prefill_address) as channel:
        call = PrefillWorkerStub(channel).Prefill(prefill_request("held", prompt(2048), address))
        await until(lambda: silent.num_frames >= 3)
        # the engine is idle now: another prompt runs through while this one is held back
        done = await fleet.client.generate(prompt(600), max_tokens=2, ignore_eos=True)
        assert len(done.token_ids) == 2
        started = fleet.recorder.events("prefill.layer_started", request_id="held")
        assert len(started) < 12
        call.cancel()
    await host.stop()
    await fleet.until_idle()
