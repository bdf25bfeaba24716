"""What a process tells of itself: log lines, recorded events and metrics. None of it ever holds prompts or answers."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # the engines log through this module, and run where no metrics library is installed
    from prometheus_client import Counter, Gauge, Histogram

FieldValue = str | int | float | bool


@dataclass(frozen=True)
class Recorded:
    """One event.

    Attributes:
        name: what happened, such as ``decode.frame_acked``.
        at_s: when, on this process's monotonic clock.
        fields: request id, layer, bytes and the like.
    """

    name: str
    at_s: float
    fields: dict[str, FieldValue] = field(default_factory=dict)


class Recorder(Protocol):
    """Where the events of requests go. Called from any thread; must not block."""

    def record(self, name: str, **fields: FieldValue) -> None: ...


class NullRecorder:
    """Keeps nothing."""

    def record(self, name: str, **fields: FieldValue) -> None:
        return None


class MemoryRecorder:
    """Keeps the newest events in memory, in the order in which they happened."""

    def __init__(self, max_events: int = 100_000) -> None:
        self._max_events = max_events
        self._events: list[Recorded] = []
        self._lock = Lock()

    def record(self, name: str, **fields: FieldValue) -> None:
        with self._lock:
            self._events.append(Recorded(name, time.monotonic(), fields))
            if len(self._events) > self._max_events:
                del self._events[: self._max_events // 2]

    def events(self, name: str | None = None, **fields: FieldValue) -> list[Recorded]:
        """The events of that name whose fields include those given."""
        with self._lock:
            events = list(self._events)
        return [
            e
            for e in events
            if (name is None or e.name == name) and all(e.fields.get(k) == v for k, v in fields.items())
        ]


def where(exc: BaseException) -> str:
    """Type and place of a foreign exception. Its text is left out: it may hold prompts or paths."""
    frames = traceback.extract_tb(exc.__traceback__)
    places = " < ".join(f"{f.name}:{f.lineno}" for f in reversed(frames[-4:]))
    return f"{type(exc).__name__} at {places}"


def configure_logging(level: str) -> None:
    """Send the package's log lines to standard error; called once by a process's entry point, never on import."""
    root = logging.getLogger("kvsluice")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False


_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_STEP_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)


class GatewayMetrics:
    """Prometheus metrics of a gateway, with vLLM's meanings under our prefix. Each instance has its own registry."""

    def __init__(self, model_name: str) -> None:
        from prometheus_client import CollectorRegistry

        self.registry = CollectorRegistry()
        self._label = {"model_name": model_name}
        self._ttft = self._histogram("time_to_first_token_seconds", "Accepted to first token", _LATENCY_S)
        self._itl = self._histogram("inter_token_latency_seconds", "Between tokens of a choice", _STEP_S)
        self._e2e = self._histogram("e2e_request_latency_seconds", "Accepted to finished", _LATENCY_S)
        self._queue = self._histogram("request_queue_time_seconds", "Accepted to started", _LATENCY_S)
        self._running = self._gauge("num_requests_running", "Requests that a worker works on")
        self._waiting = self._gauge("num_requests_waiting", "Requests that wait for room")
        self._usage = self._gauge("kv_cache_usage_perc", "Reserved share of the decode workers' cache, 1 = full")
        self._finished = self._counter("request_success", "Finished requests", ["finished_reason"])
        self._failed = self._counter("request_failure", "Requests that ended with an error", ["error_type"])
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished requests")
        self._generation_tokens = self._counter("generation_tokens", "Generated tokens of finished requests")
        self._migrations = self._counter("request_migrations", "Requests that other workers went on with", ["start"])
        self._recomputed = self._counter("recomputed_tokens", "Tokens run more than once after a loss", ["kind"])
        self._stalls = self._histogram("migration_stall_seconds", "Last token before a loss to the next", _LATENCY_S)
        self._handoff = self._counter("handoff_bytes", "Bytes sent from prefill to decode", ["recipe"])
        self._handoff_bf16 = self._counter("handoff_bf16_bytes", "Bytes the same caches take in bf16", ["recipe"])

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        from prometheus_client import Histogram

        metric = Histogram(f"kvsluice_{name}", text, ["model_name"], registry=self.registry, buckets=buckets)
        return metric.labels(**self._label)

    def _gauge(self, name: str, text: str) -> Gauge:
        from prometheus_client import Gauge

        return Gauge(f"kvsluice_{name}", text, ["model_name"], registry=self.registry).labels(**self._label)

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Counter:
        from prometheus_client import Counter

        return Counter(f"kvsluice_{name}", text, ["model_name", *(labels or [])], registry=self.registry)

    def load(self, running: int, waiting: int) -> None:
        self._running.set(running)
        self._waiting.set(waiting)

    def cache_usage(self, share: float) -> None:
        self._usage.set(share)

    def started(self, queue_s: float) -> None:
        self._queue.observe(queue_s)

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def next_tokens(self, seconds: float, num_tokens: int) -> None:
        """`num_tokens` tokens of one choice that came `seconds` after the ones before."""
        for _ in range(num_tokens):
            self._itl.observe(seconds / num_tokens)

    def migrated(self, start: str) -> None:
        """Other workers go on with a request."""
        self._migrations.labels(**self._label, start=start).inc()

    def resumed(self, seconds: float) -> None:
        """The first token behind a migration came so long after the one before it."""
        self._stalls.observe(seconds)

    def recomputed(self, tokens: int, prompt_tokens: int) -> None:
        self._recomputed.labels(**self._label, kind="answer").inc(tokens)
        self._recomputed.labels(**self._label, kind="prompt").inc(prompt_tokens)

    def finished(self, reason: str, seconds: float, prompt_tokens: int, generation_tokens: int) -> None:
        self._e2e.observe(seconds)
        self._finished.labels(**self._label, finished_reason=reason).inc()
        self._prompt_tokens.labels(**self._label).inc(prompt_tokens)
        self._generation_tokens.labels(**self._label).inc(generation_tokens)

    def handoff(self, recipe: str, payload_bytes: int, bf16_bytes: int) -> None:
        self._handoff.labels(**self._label, recipe=recipe).inc(payload_bytes)
        self._handoff_bf16.labels(**self._label, recipe=recipe).inc(bf16_bytes)

    def failed(self, error_type: str) -> None:
        self._failed.labels(**self._label, error_type=error_type).inc()
