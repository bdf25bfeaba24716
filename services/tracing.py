"""Traces of requests across the processes, off unless a process's entry point switches them on.

    kvsluice.request                gateway, from the door to the last token; migrations are events
      └ kvsluice.attempt            one pair of workers; the first token is an event
          ├ kvsluice.decode         decode worker, from opening to the last token
          └ kvsluice.prefill        prefill worker, up to the first tokens
              └ kvsluice.handoff    from there to decode, while it runs and behind it
                  └ kvsluice.receive  decode worker, up to the sequence's start

A trace goes from process to process by the names and words of W3C's Trace Context, as clients may send them. Spans hold
ids, numbers and names of recipes, never what was said. Switched off, starting one costs a function call, and the
library (`otel`) is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..errors import KvsluiceError
from .telemetry import FieldValue

if TYPE_CHECKING:
    from .config import ServeConfig

Carrier = tuple[tuple[str, str], ...]
"""`traceparent`, and `tracestate` where there is one, as metadata of a call; empty = no trace."""
Kind = Literal["server", "client", "internal"]

CARRIED = ("traceparent", "tracestate")
MAX_CHARS = 512


class Span(Protocol):
    """A piece of work in a trace."""

    @property
    def carrier(self) -> Carrier:
        """What makes others' spans children of this one."""
        ...

    def set(self, **attributes: FieldValue) -> None:
        """Say something of it; names get `kvsluice.` before them."""
        ...

    def event(self, name: str, **attributes: FieldValue) -> None:
        """Something happened in it now."""
        ...

    def end(self, error: BaseException | None = None) -> None:
        """It is over; only the first end counts."""
        ...


class NoSpan:
    """Of a process that traces nothing."""

    carrier: Carrier = ()

    def set(self, **attributes: FieldValue) -> None:
        return None

    def event(self, name: str, **attributes: FieldValue) -> None:
        return None

    def end(self, error: BaseException | None = None) -> None:
        return None


NO_SPAN = NoSpan()


class Tracer(Protocol):
    """Makes spans, and sends them somewhere."""

    def start(self, name: str, parent: Carrier, kind: Kind, attributes: Mapping[str, FieldValue]) -> Span: ...


_tracer: Tracer | None = None
current_span: ContextVar[Span] = ContextVar("current_span", default=NO_SPAN)
incoming_trace: ContextVar[Carrier] = ContextVar("incoming_trace", default=())
"""Set by a door before a handler runs."""


def use_tracer(tracer: Tracer | None) -> None:
    """Have this process's spans made by a tracer; None = there are none."""
    global _tracer
    _tracer = tracer


def configure_tracing(config: ServeConfig, process: str) -> None:
    """Trace as configured; called once by a process's entry point.

    Args:
        process: what spans call this process, such as a worker's id.
    """
    if config.otlp_endpoint is not None:
        from .otel import OtelTracer, otlp_exporter

        use_tracer(OtelTracer(process, otlp_exporter(config.otlp_endpoint), config.trace_sample_rate))


def accept(metadata: Iterable[tuple[str, Any]] | None) -> None:
    """Go on with the trace that a caller has sent, if it has and this process traces; what is no such is passed over.

    Args:
        metadata: of a call, or headers, with names in lower case.
    """
    if _tracer is not None:
        found = {k: v for k, v in metadata or () if k in CARRIED and isinstance(v, str) and len(v) <= MAX_CHARS}
        incoming_trace.set(tuple((name, found[name]) for name in CARRIED if name in found))


def start_span(name: str, parent: Carrier = (), kind: Kind = "internal", **attributes: FieldValue) -> Span:
    """A span that the caller ends.

    Args:
        parent: of its parent; empty = it begins a trace.
    """
    return NO_SPAN if _tracer is None else _tracer.start(name, parent, kind, attributes)


@contextmanager
def spanning(name: str, parent: Carrier = (), kind: Kind = "internal", **attributes: FieldValue) -> Iterator[Span]:
    """A span for the length of the block, which is the current one there; it ends with what the block raises."""
    if _tracer is None:
        yield NO_SPAN
        return
    span = _tracer.start(name, parent, kind, attributes)
    before = current_span.set(span)
    try:
        yield span
    except BaseException as exc:
        span.end(exc)
        raise
    else:
        span.end()
    finally:
        current_span.reset(before)


def error_name(error: BaseException) -> str:
    """What a span says of an error: never its text, which may quote a prompt."""
    return error.type_name if isinstance(error, KvsluiceError) else type(error).__name__
