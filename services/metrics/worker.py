"""What a worker exports: its engines' figures, its tiers, its store, its GPU, the handoffs that it takes part in."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

from ...errors import ConfigError
from ...kvstore.store import Store
from ...protos import worker_pb2 as wpb
from ..config import ServeConfig
from ..keys import KeysFile
from ..rpc import join_address
from ..security import FleetSecurity, Guard, OpenGuard
from ..settings.addresses import is_loopback
from ..telemetry import FieldValue, NullRecorder, Recorder
from .catalog import WORKER
from .exposition import serve_metrics
from .figures import DecodeFigures, Figures, PrefillFigures, out_of_memory
from .gpu import gpu_samples
from .registry import Buckets, Registry, Sample
from .store import MeasuredStore
from .tiers import tier_samples

log = logging.getLogger("kvsluice.metrics")


class Watched(Protocol):
    """A service of a worker, and what its engine counts."""

    @property
    def figures(self) -> Figures: ...

    def account(self) -> wpb.WorkerInfo:
        """What it answers to `Info`."""
        ...


class WorkerMetrics:
    """Metrics of one worker process, whatever its roles.

    Args:
        role: prefill, decode or both.

    Attributes:
        registry: the library's.
    """

    def __init__(self, model_name: str, worker_id: str, role: str) -> None:
        self._all = Registry(WORKER, {"model_name": model_name, "worker": worker_id, "role": role})
        self.registry = self._all.prometheus

    def render(self) -> bytes:
        """The text that `/metrics` answers with."""
        return self._all.render()

    def watch(self, service: Watched) -> None:
        """Export what a service's engine counts."""
        figures = service.figures
        if isinstance(figures, PrefillFigures):
            self._all.on_scrape(lambda: _prefill_samples(figures, service.account()), lambda: _prefill_buckets(figures))
        elif isinstance(figures, DecodeFigures):
            self._all.on_scrape(lambda: _decode_samples(figures, service.account()), lambda: _decode_buckets(figures))

    def watch_gpu(self, device: Any) -> None:
        """Export figures of torch's device, where it is a GPU."""
        self._all.on_scrape(gpu_samples(device))

    def recorder(self, behind: Recorder | None = None) -> Recorder:
        """Counts the events of handoffs, and hands all events on to the recorder behind it."""
        return _HandoffRecorder(self._all, behind or NullRecorder())

    def measured(self, store: Store) -> Store:
        """The same store, whose operations are exported."""
        counters = getattr(store, "counters", None)  # of a store over the network
        if counters is not None:
            self._all.on_scrape(lambda: _store_samples(counters))
        return MeasuredStore(store, self._observe_store)

    def serve(self, config: ServeConfig, host: str) -> int | None:
        """Answer `/metrics` on a worker's address, as long as the process lives. Returns the port; None = as configured
        it is not answered.

        Raises:
            ConfigError: it cannot listen there, or anybody could read what is there.
        """
        port = config.worker_metrics_port
        if port is None:
            return None
        if config.api_keys_file is None and not (config.allow_anonymous or is_loopback(host)):
            allowed = "with api_keys_file, allow_anonymous or on loopback"
            raise ConfigError(f"worker_metrics_port: anybody could read metrics on {host}; allowed: {allowed}")
        guard: Guard = OpenGuard() if config.api_keys_file is None else KeysFile(config.api_keys_file)
        tls = FleetSecurity.of(config).tls
        bound = serve_metrics(self.registry, host, port, guard, tls)
        log.info("metrics are on %s://%s/metrics", "http" if tls is None else "https", join_address(host, bound))
        return bound

    def _observe_store(self, operation: str, seconds: float, failed: bool) -> None:
        self._all.labelled("worker_store_operation_seconds", operation=operation).observe(seconds)
        if failed:
            self._all.labelled("worker_store_operation_failures", operation=operation).inc()


class _HandoffRecorder:
    """Counts frames and bytes of both sides of handoffs."""

    def __init__(self, metrics: Registry, behind: Recorder) -> None:
        self._behind = behind
        self._counted = {
            "prefill.frame_sent": (metrics["worker_sent_frames"], metrics["worker_sent_bytes"]),
            "decode.frame_acked": (metrics["worker_received_frames"], metrics["worker_received_bytes"]),
        }
        self._received = metrics["worker_received_handoffs"]
        self._shipped = metrics["worker_sent_handoffs"]
        self._seconds = metrics["worker_handoff_seconds"]

    def record(self, name: str, **fields: FieldValue) -> None:
        """See `Recorder`."""
        if name in self._counted:
            frames, size = self._counted[name]
            frames.inc()
            size.inc(float(fields["payload_bytes"]))
        elif name == "decode.committed":
            self._received.inc()
        elif name == "prefill.shipped":
            self._shipped.inc()
            self._seconds.observe(float(fields["seconds"]))
        self._behind.record(name, **fields)


def _prefill_samples(figures: PrefillFigures, info: wpb.WorkerInfo) -> Iterator[Sample]:
    yield "worker_prefill_prompts", {}, figures.prompts
    yield "worker_prefill_prompt_tokens", {}, figures.prompt_tokens
    yield "worker_prefill_pending_tokens", {}, info.pending_tokens
    yield "worker_prefill_requests", {}, info.running
    yield "worker_prefix_cache_queries", {}, figures.prefix_queries
    yield "worker_prefix_cache_hits", {}, figures.prefix_hits
    yield "worker_prefix_cache_used_bytes", {}, info.prefix_used_bytes
    yield "worker_prefix_cache_capacity_bytes", {}, info.prefix_capacity_bytes
    yield from _failures("prefill", figures.failures)


def _prefill_buckets(figures: PrefillFigures) -> Iterator[Buckets]:
    yield "worker_prefill_pack_rows", {}, figures.pack_rows
    yield "worker_prefill_pack_seconds", {}, figures.pack_seconds


def _decode_samples(figures: DecodeFigures, info: wpb.WorkerInfo) -> Iterator[Sample]:
    yield "worker_decode_tokens", {}, figures.tokens
    yield "worker_decode_running", {}, info.running
    yield "worker_decode_waiting", {}, info.waiting
    yield "worker_hot_set_lookups", {}, figures.hot_lookups
    yield "worker_hot_set_misses", {}, figures.hot_misses
    yield from tier_samples("worker_", {}, info.tiers)
    quality = figures.quality
    for recipe, seen in list(quality.divergence.items()):
        yield "worker_quality_steps", {"recipe": recipe}, sum(seen.counts)
        yield "worker_quality_top1_agreements", {"recipe": recipe}, quality.agreements[recipe]
    for (recipe, reason), count in list(quality.skipped.items()):
        yield "worker_quality_skipped_steps", {"recipe": recipe, "reason": reason}, count
    yield from _failures("decode", figures.failures)


def _decode_buckets(figures: DecodeFigures) -> Iterator[Buckets]:
    yield "worker_decode_batch_size", {}, figures.batch
    yield "worker_decode_step_seconds", {}, figures.step_seconds
    for recipe, seen in list(figures.quality.divergence.items()):
        yield "worker_quality_kl_divergence", {"recipe": recipe}, seen


def _failures(engine: str, failures: Counter[str]) -> Iterator[Sample]:
    yield "worker_out_of_memory", {"engine": engine}, out_of_memory(failures)
    for name, count in list(failures.items()):
        yield "worker_failures", {"engine": engine, "error_type": name}, count


def _store_samples(counters: Any) -> Iterator[Sample]:
    """Of `kvstore.guard.StoreCounters`."""
    yield "worker_store_retries", {}, counters.retries
    yield "worker_store_breaker_openings", {}, counters.breaker_openings
    yield "worker_store_operations_in_flight", {}, counters.operations_in_flight
    yield "worker_store_bytes_in_flight", {}, counters.bytes_in_flight
    for cause, count in list(counters.failed_attempts.items()):
        yield "worker_store_failed_attempts", {"cause": cause.name.lower()}, count
