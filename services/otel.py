"""Spans by OpenTelemetry, sent by OTLP. Imported when traces are switched on."""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Span as LibrarySpan
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from .. import __version__
from .telemetry import FieldValue
from .tracing import Carrier, Kind, error_name

PREFIX = "kvsluice."
EXPORT_TIMEOUT_S = 5.0
_PROPAGATOR = TraceContextTextMapPropagator()
_KINDS = {"server": SpanKind.SERVER, "client": SpanKind.CLIENT, "internal": SpanKind.INTERNAL}


def otlp_exporter(endpoint: str) -> SpanExporter:
    """Sends spans to a collector over gRPC.

    Args:
        endpoint: `http://HOST:PORT`, or `https://…` for TLS by the system's authorities.
    """
    return OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=EXPORT_TIMEOUT_S)


class OtelSpan:
    """See `tracing.Span`."""

    def __init__(self, span: LibrarySpan) -> None:
        self._span = span

    @property
    def carrier(self) -> Carrier:
        carried: dict[str, str] = {}
        _PROPAGATOR.inject(carried, set_span_in_context(self._span))
        return tuple(carried.items())

    def set(self, **attributes: FieldValue) -> None:
        self._span.set_attributes(_named(attributes))

    def event(self, name: str, **attributes: FieldValue) -> None:
        self._span.add_event(name, _named(attributes))

    def end(self, error: BaseException | None = None) -> None:
        if not self._span.is_recording():  # it has ended, or is not in the sample
            return
        if error is not None:
            self._span.set_attribute("error.type", error_name(error))
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


class OtelTracer:
    """See `tracing.Tracer`. What cannot be sent is dropped; nobody waits for it.

    Args:
        process: the name of the process.
        exporter: where spans go.
        sample_rate: share of the traces that begin here; those that others began are kept as those have decided.
        processor: how spans come to the exporter; None = in batches, on a thread.
    """

    def __init__(
        self, process: str, exporter: SpanExporter, sample_rate: float = 1.0, processor: SpanProcessor | None = None
    ) -> None:
        resource = Resource.create(
            {"service.name": "kvsluice", "service.instance.id": process, "service.version": __version__}
        )
        self._provider = TracerProvider(resource=resource, sampler=ParentBased(TraceIdRatioBased(sample_rate)))
        self._provider.add_span_processor(processor or BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("kvsluice", __version__)

    def start(self, name: str, parent: Carrier, kind: Kind, attributes: Mapping[str, FieldValue]) -> OtelSpan:
        context = _PROPAGATOR.extract(dict(parent))
        span = self._tracer.start_span(name, context, _KINDS[kind], _named(attributes), record_exception=False)
        return OtelSpan(span)  # type: ignore[arg-type]

    def stop(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _named(attributes: Mapping[str, FieldValue]) -> dict[str, FieldValue]:
    return {PREFIX + name: value for name, value in attributes.items()}
