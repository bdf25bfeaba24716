"""Every metric that is exported: name, type, labels, meaning. docs/metrics.md has the same table, held by a test.

Names and meanings are vLLM's where it has the same thing. What a gateway exports is about requests and carries
`model_name`; what a worker exports is about its engines, is called `worker_…` and carries `worker` and `role` as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .figures import BATCH, NATS, ROWS, WORK_S

PREFIX = "kvsluice_"

LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
STEP_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
STORE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
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


def _tiers(prefix: str, *labels: str) -> tuple[Metric, ...]:
    """Of a decode worker's memory; the gateway says them of every worker, and every worker of itself."""
    return (
        _gauge(f"{prefix}tier_capacity_bytes", "What a tier may hold; 0 = there is no such", *labels, "tier"),
        _gauge(f"{prefix}tier_used_bytes", "Reserved part of it", *labels, "tier"),
        _gauge(f"{prefix}tier_sequences", "Running requests that lie there", *labels, "tier"),
        _counter(f"{prefix}tier_moved_bytes", "Bytes that moved between tiers", *labels, "move"),
        _counter(f"{prefix}preemptions", "Requests that left the device before their end", *labels),
        _counter(f"{prefix}resumes", "Requests that came back to it", *labels),
        _counter(f"{prefix}tier_store_failures", "Moves that the store failed", *labels),
        _gauge(f"{prefix}kept_sessions", "Ended turns whose cache is still there", *labels),
        _gauge(f"{prefix}kept_session_bytes", "What they hold", *labels),
        _counter(f"{prefix}kept_session_hits", "Later turns that went on with such a cache", *labels),
        _counter(f"{prefix}kept_session_misses", "Later turns that did not", *labels),
        _counter(f"{prefix}store_cache_hits", "Frames of the store that were read from the worker's memory", *labels),
        _counter(f"{prefix}store_cache_misses", "Frames that were read from the store itself", *labels),
    )


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
    _counter("prefix_cache_hits", "Those of them that were found, so that they did not run"),
    _gauge("prefix_cache_capacity_bytes", "Memory for shared prefixes; 0 = there is none", "worker"),
    _gauge("prefix_cache_used_bytes", "Part of it that holds some", "worker"),
    _counter("session_cached_tokens", "Input tokens of finished session turns that were not computed again"),
    _counter("request_migrations", "Requests that other workers went on with", "start"),
    _counter("recomputed_tokens", "Tokens run more than once after a loss", "kind"),
    _histogram("migration_stall_seconds", "Last token before a loss to the next", LATENCY_S),
    _counter("handoff_bytes", "Bytes sent from prefill to decode", "recipe"),
    _counter("handoff_bf16_bytes", "Bytes that the same caches take in bf16", "recipe"),
    _histogram("handoff_compression_ratio", "Bytes sent over bytes in bf16, of each request", SHARE, "recipe"),
    _histogram("handoff_seconds", "First frame to the manifest's acknowledgement", LATENCY_S),
    _histogram("handoff_exposed_seconds", "The part of it behind the first token", LATENCY_S),
    _counter("handoff_failures", "Handoffs that began and did not end whole", "error_type"),
    _counter("recall_rows", "Rows of finished requests' prompts that decode brought back into the deep layers"),
    _gauge("workers", "Workers that are up", "role"),
    _gauge("prefill_pending_tokens", "Prompt tokens that a prefill worker has not run yet", "worker"),
    *_tiers("", "worker"),
)

WORKER_LABELS = ("model_name", "worker", "role")
WORKER = (
    _histogram("worker_prefill_pack_rows", "Prompt rows of each pack that ran, of one layer", ROWS),
    _histogram("worker_prefill_pack_seconds", "Time of the engine's thread for each pack", WORK_S),
    _counter("worker_prefill_prompts", "Prompts that gave their first tokens"),
    _counter("worker_prefill_prompt_tokens", "Their tokens"),
    _gauge("worker_prefill_requests", "Prompts that are queued or run"),
    _gauge("worker_prefill_pending_tokens", "Prompt tokens that have not run yet"),
    _counter("worker_prefix_cache_queries", "Tokens of started prompts that were looked up in shared prefixes"),
    _counter("worker_prefix_cache_hits", "Those of them that were found, so that they did not run"),
    _gauge("worker_prefix_cache_capacity_bytes", "Memory for shared prefixes; 0 = there is none"),
    _gauge("worker_prefix_cache_used_bytes", "Part of it that holds some"),
    _counter("worker_sent_handoffs", "Caches that were sent whole"),
    _counter("worker_sent_frames", "Frames and manifests that were sent"),
    _counter("worker_sent_bytes", "Their bytes"),
    _histogram("worker_handoff_seconds", "First frame to the manifest's acknowledgement", LATENCY_S),
    _counter("worker_received_handoffs", "Caches that arrived whole"),
    _counter("worker_received_frames", "Frames that arrived and were placed"),
    _counter("worker_received_bytes", "Their bytes"),
    _histogram("worker_decode_batch_size", "Choices in each decode step", BATCH),
    _histogram("worker_decode_step_seconds", "Time of the engine's thread for each decode step", WORK_S),
    _counter("worker_decode_tokens", "Tokens that were drawn and told"),
    _gauge("worker_decode_running", "Choices that run"),
    _gauge("worker_decode_waiting", "Requests that wait for memory"),
    _counter("worker_hot_set_lookups", "Chunks of values in host memory that attention wanted"),
    _counter("worker_hot_set_misses", "Those of them that had to be fetched"),
    _histogram(
        "worker_quality_kl_divergence", "KL of a step's next token from full attention's, in nats", NATS, "recipe"
    ),
    _counter("worker_quality_steps", "Steps that were compared with full attention", "recipe"),
    _counter("worker_quality_top1_agreements", "Those of them whose best token was the same", "recipe"),
    _counter("worker_quality_skipped_steps", "Sampled steps that were not compared", "recipe", "reason"),
    *_tiers("worker_"),
    _counter("worker_failures", "Requests that ended by an error of an engine", "engine", "error_type"),
    _counter("worker_out_of_memory", "Those of them that found no memory", "engine"),
    _histogram(
        "worker_store_operation_seconds", "An operation of the store, with waiting and retries", STORE_S, "operation"
    ),
    _counter("worker_store_operation_failures", "Operations that ended with an error", "operation"),
    _counter("worker_store_retries", "Attempts that followed a failed one"),
    _counter("worker_store_failed_attempts", "Attempts that failed", "cause"),
    _counter("worker_store_breaker_openings", "Times that the store was given up for a while"),
    _gauge("worker_store_operations_in_flight", "Operations under way"),
    _gauge("worker_store_bytes_in_flight", "Bytes that they move"),
    _gauge("worker_gpu_utilization_ratio", "Share of the last interval in which a kernel ran", "gpu"),
    _gauge("worker_gpu_memory_used_bytes", "Memory of the GPU in use, by all processes", "gpu"),
    _gauge("worker_gpu_memory_total_bytes", "Memory of the GPU", "gpu"),
    _gauge("worker_gpu_torch_allocated_bytes", "Memory of the worker's tensors", "gpu"),
    _gauge("worker_gpu_torch_reserved_bytes", "Memory that its allocator holds for them", "gpu"),
    _gauge("worker_gpu_power_watts", "Power that the GPU draws", "gpu"),
    _gauge("worker_gpu_temperature_celsius", "Temperature of the GPU", "gpu"),
    _gauge("worker_gpu_pcie_receive_bytes_per_second", "What the GPU receives over PCIe", "gpu"),
    _gauge("worker_gpu_pcie_transmit_bytes_per_second", "What it sends", "gpu"),
)

TABLES = {"gateway": GATEWAY, "worker": WORKER}
