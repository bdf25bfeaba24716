"""Every metric that is exported: name, type, labels, meaning. docs/metrics.md has the same table, held by a test.

Names and meanings are vLLM's where it has the same thing. What a gateway exports is about requests and carries
`model_name`; what a worker exports is about its engines, is called `worker_…` and carries `worker` and `role` as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "kvsluice_"

LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
STEP_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
SHARE = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1, 2)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: without the prefix, and without the `_total` that counters end with when they are exported.
        text: its meaning, one line.
        labels: besides those that all metrics of the process carry.
        buckets: upper bounds of a histogram.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def exported_name(self) -> str:
        """As it stands in the output of `/metrics`; a histogram's series add `_bucket`, `_sum` and `_count`."""
        return PREFIX + self.name + ("_total" if self.kind == "counter" else "")


def _counter(name: str, text: str, *labels: str) -> Metric:
    return Metric(name, "counter", text, labels)


def _gauge(name: str, text: str, *labels: str) -> Metric:
    return Metric(name, "gauge", text, labels)


def _histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return Metric(name, "histogram", text, labels, buckets)


GATEWAY_LABELS = ("model_name",)
GATEWAY = (
    _histogram("time_to_first_token_seconds", "Accepted to first token", LATENCY_S),
    _histogram("inter_token_latency_seconds", "Between tokens of a choice", STEP_S),
    _histogram(
        "request_time_per_output_token_seconds", "First to last token, a token of the longest choice behind it", STEP_S
    ),
    _histogram("e2e_request_latency_seconds", "Accepted to finished", LATENCY_S),
    _histogram("request_queue_time_seconds", "Accepted to the start of its prefill", LATENCY_S),
    _histogram("request_prefill_time_seconds", "Start of its prefill to first token", LATENCY_S),
    _histogram("request_decode_time_seconds", "First to last token", LATENCY_S),
    _histogram("request_inference_time_seconds", "Start of its prefill to last token", LATENCY_S),
    _gauge("num_requests_running", "Requests that a worker works on"),
    _gauge("num_requests_waiting", "Requests that wait for room"),
    _gauge("kv_cache_usage_perc", "Reserved share of the decode workers' cache, 1 = full"),
    _counter("request_success", "Finished requests", "finished_reason"),
    _counter("request_failure", "Requests that ended with an error", "error_type"),
    _counter("requests_shed", "Requests that were sent away because there was no room", "reason"),
    _counter("prompt_tokens", "Prompt tokens of finished requests"),
    _counter("generation_tokens", "Generated tokens of finished requests"),
    _counter("prefix_cache_queries", "Prompt tokens that were looked up in shared prefixes"),
    _counter("prefix_cache_hits", "Those of them that were found; 0 until prefixes are shared"),
    _counter("session_cached_tokens", "Input tokens of finished session turns that were not computed again"),
    _counter("request_migrations", "Requests that other workers went on with", "start"),
    _counter("recomputed_tokens", "Tokens run more than once after a loss", "kind"),
    _histogram("migration_stall_seconds", "Last token before a loss to the next", LATENCY_S),
    _counter("handoff_bytes", "Bytes sent from prefill to decode", "recipe"),
    _counter("handoff_bf16_bytes", "Bytes that the same caches take in bf16", "recipe"),
    _histogram("handoff_compression_ratio", "Bytes sent ÷ bytes in bf16, of each request", SHARE, "recipe"),
    _histogram("handoff_seconds", "First frame to the manifest's acknowledgement", LATENCY_S),
    _histogram("handoff_exposed_seconds", "The part of it behind the first token", LATENCY_S),
    _counter("handoff_failures", "Handoffs that began and did not end whole", "error_type"),
    _counter("recall_rows", "Rows that decode had propagated after all; 0 until there is recall"),
    _gauge("workers", "Workers that are up", "role"),
    _gauge("prefill_pending_tokens", "Prompt tokens that a prefill worker has not run yet", "worker"),
    _gauge("tier_capacity_bytes", "Memory of a decode worker for caches", "worker", "tier"),
    _gauge("tier_used_bytes", "Reserved part of it", "worker", "tier"),
)

TABLES = {"gateway": GATEWAY}
