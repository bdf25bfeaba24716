"""Traces through the real gateway and real workers, over real gRPC, with spans kept in memory."""

from __future__ import annotations

import subprocess
import sys

import grpc
import pytest
import torch
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from kvsluice.errors import RequestCancelled
from kvsluice.protos import generation_pb2 as pb
from kvsluice.protos import generation_pb2_grpc
from kvsluice.services import tracing
from kvsluice.services.otel import OtelTracer

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(2, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Spans:
    """Those that have ended."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    def all(self):
        return self._exporter.get_finished_spans()

    def named(self, name: str):
        return [span for span in self.all() if span.name == f"kvsluice.{name}"]

    def one(self, name: str):
        (span,) = self.named(name)
        return span


@pytest.fixture
def spans():
    exporter = InMemorySpanExporter()
    tracer = OtelTracer("test", exporter, processor=SimpleSpanProcessor(exporter))
    tracing.use_tracer(tracer)
    yield Spans(exporter)
    tracing.use_tracer(None)
    tracer.stop()


async def test_a_request_is_one_trace_through_all_processes(real_fleet, spans, until):
    options = {"temperature": 0, "max_tokens": 5, "ignore_eos": True, "recipe": "exact"}
    done = await real_fleet.client.generate(prompt(40), request_id="seen", **options)
    await real_fleet.until_idle()
    await until(lambda: len(spans.all()) == 6)
    parents = {"request": None, "attempt": "request", "prefill": "attempt", "decode": "attempt"}
    parents |= {"handoff": "prefill", "receive": "handoff"}
    for name, above in parents.items():
        span = spans.one(name)
        assert (span.parent and span.parent.span_id) == (above and spans.one(above).context.span_id), name
        assert span.context.trace_id == spans.one("request").context.trace_id
        assert span.attributes["kvsluice.request_id"] == "seen"
        assert span.status.status_code is StatusCode.UNSET
    request, handoff = spans.one("request").attributes, spans.one("handoff").attributes
    assert request["kvsluice.recipe"] == spans.one("decode").attributes["kvsluice.recipe"] == "exact"
    assert (request["kvsluice.prompt_tokens"], request["kvsluice.completion_tokens"]) == (40, 5)
    assert handoff["kvsluice.payload_bytes"] == request["kvsluice.handoff_bytes"] == done.recipe.handoff_bytes
    assert spans.one("decode").attributes["kvsluice.steps"] == 4
    assert [event.name for event in spans.one("attempt").events] == ["first_token"]


async def test_a_clients_trace_goes_on_and_its_choice_not_to_sample_holds(real_fleet, spans, until):
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt(20)), sampling=pb.SamplingParams(max_tokens=3))
    async with grpc.aio.insecure_channel(real_fleet.client._address) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        for flags, words in (("01", f"00-{TRACE_ID}-{PARENT_ID}-"), ("00", f"00-{TRACE_ID}-{PARENT_ID}-")):
            metadata = (("traceparent", words + flags), ("tracestate", "vendor=1"))
            async for _ in stub.Generate(request, metadata=metadata):
                pass
        async for _ in stub.Generate(request, metadata=(("traceparent", "no such thing"),)):
            pass
    await real_fleet.until_idle()
    await until(lambda: len(spans.all()) == 12)
    mine = [span for span in spans.all() if f"{span.context.trace_id:032x}" == TRACE_ID]
    assert len(mine) == 6  # of the first one; the second was not to be sampled, and the third has a trace of its own
    (top,) = [span for span in mine if span.name == "kvsluice.request"]
    assert f"{top.parent.span_id:016x}" == PARENT_ID
    assert top.context.trace_state.get("vendor") == "1"


async def test_migrations_are_events_and_errors_have_no_words(make_fleet, spans, until):
    fleet = await make_fleet()
    await fleet.add_worker("decode-1", "decode")

    async def lose(request) -> None:
        fleet.script.prefill = None
        at = request.decode_address
        await fleet.kill_worker(next(m.worker_id for m in fleet.members.view().members if m.address == at))

    fleet.script.prefill = lose
    await fleet.client.generate("secret words", max_tokens=4, request_id="moved")
    request = spans.one("request")
    assert [event.name for event in request.events] == ["migrated"]
    assert request.attributes["kvsluice.migrations"] == 1
    first, second = spans.named("attempt")
    assert first.status.status_code is StatusCode.ERROR
    assert first.attributes["error.type"] == request.events[0].attributes["kvsluice.error_type"] == "WorkerLost"
    assert second.status.status_code is StatusCode.UNSET
    # whichever of them gave it
    assert [event.name for event in (*first.events, *second.events)] == ["first_token"]
    assert "secret" not in "".join(span.to_json() for span in spans.all())


async def test_a_cancelled_request_ends_its_spans(real_fleet, spans, until):
    stream = real_fleet.client.stream(prompt(20), request_id="gone", max_tokens=400, ignore_eos=True, recipe="exact")
    with pytest.raises(RequestCancelled):
        async for _ in stream:
            await real_fleet.client.cancel("gone")
    await real_fleet.until_idle()
    await until(lambda: spans.named("decode") and spans.named("request"))
    for name in ("request", "attempt", "decode"):
        assert spans.one(name).attributes["error.type"] in ("RequestCancelled", "CancelledError"), name


def test_without_an_endpoint_the_library_is_not_imported():
    program = (
        "import sys\n"
        "import kvsluice.services.gateway.server, kvsluice.services.prefill.server, kvsluice.services.decode.server\n"
        "from kvsluice.services import config, tracing\n"
        "tracing.configure_tracing(config.load_config(), 'p')\n"
        "assert tracing.start_span('x') is tracing.NO_SPAN\n"
        "with tracing.spanning('x') as span: assert span is tracing.NO_SPAN\n"
        "print([m for m in sys.modules if m.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
