"""The service as users start it: `kvsluice serve` with its workers in processes of their own, over the network."""

from __future__ import annotations

import subprocess
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from kvsluice.client import AsyncClient, Client
from kvsluice.errors import DeadlineExceeded, InvalidRequest, RequestCancelled
from kvsluice.protos import generation_pb2 as pb
from kvsluice.protos import generation_pb2_grpc

LONG_PROMPT = [(7 * i) % 40_000 + 100 for i in range(6000)]


@pytest.fixture
def client(service):
    with Client(service.address, timeout_s=120.0) as client:
        yield client


def run(service, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "kvsluice.services.cli", *arguments, "--address", service.address]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)


def test_generate_streams_text(client):
    stream = client.stream("The capital of France is", temperature=0, max_tokens=6, recipe="exact")
    chunks = list(stream)
    assert len(chunks) > 1
    assert "Paris" in stream.completion.text
    assert stream.completion.usage.completion_tokens == 6


async def test_the_async_client_does_the_same(service, client):
    options = {"temperature": 0, "max_tokens": 6, "recipe": "exact"}
    async with AsyncClient(service.address, timeout_s=120.0) as other:
        done = await other.generate("The capital of France is", **options)
        info = await other.model_info()
    assert done.text == client.generate("The capital of France is", **options).text
    assert info.model == client.model_info().model


def test_chat_uses_the_models_template(client):
    done = client.generate([{"role": "user", "content": "Say hello."}], temperature=0, max_tokens=8)
    assert done.usage.prompt_tokens > 10
    assert done.text


def test_cancel_by_id_and_by_leaving(client):
    stream = client.stream(LONG_PROMPT, request_id="to-cancel", max_tokens=8)
    while not client.cancel("to-cancel"):  # until the service has heard of it
        pass
    with pytest.raises(RequestCancelled):
        next(stream)
    stream = client.stream("A story:", max_tokens=500, ignore_eos=True)
    next(stream)
    stream.cancel()
    with pytest.raises(RequestCancelled):
        for _ in stream:
            pass
    assert client.generate("abc", max_tokens=2, ignore_eos=True).text


def test_a_deadline_holds(client):
    with pytest.raises(DeadlineExceeded):
        client.generate(LONG_PROMPT, max_tokens=8, timeout_s=0.5)
    assert client.generate("abc", max_tokens=2, ignore_eos=True).text


def test_bad_input_is_refused_and_the_service_lives(client):
    for options in ({"top_p": 9.0}, {"recipe": "nope"}, {"n": 0}, {"max_tokens": 10**9}, {"logit_bias": {10**6: 1.0}}):
        with pytest.raises(InvalidRequest):
            client.generate("abc", **options)
    with pytest.raises(InvalidRequest):
        client.generate("x" * (20 << 20))
    assert client.generate("abc", max_tokens=2, ignore_eos=True).text


def test_health_and_reflection_through_the_official_clients(service):
    with grpc.insecure_channel(service.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "kvsluice.v1.Generation"):
            reply = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "kvsluice.v1.Generation" in database.get_services()
        described = database.FindFileContainingSymbol("kvsluice.v1.Generation")
        assert {"Generate", "Cancel", "GetModelInfo"} <= {m.name for s in described.service for m in s.method}


def test_eight_at_once(client):
    prompts = [f"{i} plus {i} is" for i in range(8)]
    options = {"temperature": 0, "max_tokens": 5, "ignore_eos": True, "recipe": "exact"}
    singly = [client.generate(prompt, **options).text for prompt in prompts]
    streams = [client.stream(prompt, **options) for prompt in prompts]
    for stream in streams:
        for _ in stream:
            pass
    assert [stream.completion.text for stream in streams] == singly


def test_only_the_gateways_service_is_public(service):
    with grpc.insecure_channel(service.address) as channel:
        call = channel.unary_unary("/kvsluice.worker.v1.DecodeWorker/Info")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        reply = generation_pb2_grpc.GenerationStub(channel).Cancel(pb.CancelRequest(request_id="x"), timeout=10)
        assert not reply.found


def test_the_command_line_generates(service, tmp_path):
    done = run(service, "generate", "The capital of France is", "--temperature", "0", "--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "first token" in done.stderr
    assert "recipe balanced -> exact" in " ".join(done.stderr.split())

    file = tmp_path / "prompt.txt"
    file.write_text("Say hello.")
    chat = run(service, "generate", "How?", "--file", str(file), "--chat", "--max-tokens", "4", "-n", "2")
    assert chat.returncode == 0, chat.stderr
    assert chat.stdout.startswith("[0] ")
    assert "[1] " in chat.stdout

    piped = run(service, "generate", "--max-tokens", "2", "--ignore-eos", stdin="Once upon a time")
    assert piped.returncode == 0, piped.stderr
    assert run(service, "models").stdout.startswith("smollm2-135m")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("x", "--recipe", "nope"), "recipe"),
        (("x", "--slots", "{"), "--slots"),
        (("x", "--temperature", "9"), "sampling.temperature"),
        (("--file", "/no/such/file"), "--file"),
    ],
)
def test_the_command_line_says_what_is_wrong(service, arguments, said):
    done = run(service, "generate", *arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
