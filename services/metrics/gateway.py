"""What a gateway counts: requests, from the door to the last token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ...errors import KvsluiceError, Overloaded
from ...protos import worker_pb2 as wpb
from .catalog import GATEWAY
from .registry import Registry, Sample
from .tiers import tier_samples

ASKED = "kv_cache_usage_perc"  # when metrics are read


class GatewayMetrics:
    """Prometheus metrics of a gateway. Each instance has its own registry.

    Attributes:
        registry: the library's, for whoever answers `/metrics`.
    """

    def __init__(self, model_name: str) -> None:
        self._all = Registry(GATEWAY, {"model_name": model_name})
        self.registry = self._all.prometheus
        for metric in GATEWAY:  # rates of what has not happened yet are 0, and not absent
            if not metric.labels and metric.name != ASKED:
                self._all[metric.name]

    def render(self) -> bytes:
        """The text that `/metrics` answers with."""
        return self._all.render()

    def follow(self, workers: Callable[[], Iterable[tuple[str, wpb.WorkerInfo]]]) -> None:
        """Export what the workers say of themselves.

        Args:
            workers: role and latest account of every worker that is up.
        """
        self._all.on_scrape(lambda: _samples(list(workers())))

    def load(self, running: int, waiting: int) -> None:
        self._all["num_requests_running"].set(running)
        self._all["num_requests_waiting"].set(waiting)

    def started(self, queue_s: float) -> None:
        self._all["request_queue_time_seconds"].observe(queue_s)

    def first_token(self, seconds: float) -> None:
        self._all["time_to_first_token_seconds"].observe(seconds)

    def next_tokens(self, seconds: float, num_tokens: int) -> None:
        """`num_tokens` tokens of one choice that came `seconds` after the ones before."""
        itl = self._all["inter_token_latency_seconds"]
        for _ in range(num_tokens):
            itl.observe(seconds / num_tokens)

    def migrated(self, start: str) -> None:
        """Other workers go on with a request."""
        self._all.labelled("request_migrations", start=start).inc()

    def resumed(self, seconds: float) -> None:
        """The first token behind a migration came so long after the one before it."""
        self._all["migration_stall_seconds"].observe(seconds)

    def recomputed(self, tokens: int, prompt_tokens: int) -> None:
        self._all.labelled("recomputed_tokens", kind="answer").inc(tokens)
        self._all.labelled("recomputed_tokens", kind="prompt").inc(prompt_tokens)

    def finished(self, reason: str, seconds: float, prompt_tokens: int, generation_tokens: int) -> None:
        self._all["e2e_request_latency_seconds"].observe(seconds)
        self._all.labelled("request_success", finished_reason=reason).inc()
        self._all["prompt_tokens"].inc(prompt_tokens)
        self._all["generation_tokens"].inc(generation_tokens)

    def phases(self, prefill_s: float, decode_s: float, longest_choice: int) -> None:
        """Of a finished request.

        Args:
            longest_choice: tokens of its longest choice.
        """
        self._all["request_prefill_time_seconds"].observe(prefill_s)
        self._all["request_decode_time_seconds"].observe(decode_s)
        self._all["request_inference_time_seconds"].observe(prefill_s + decode_s)
        if longest_choice > 1:
            self._all["request_time_per_output_token_seconds"].observe(decode_s / (longest_choice - 1))

    def cached(self, queried_tokens: int, found_tokens: int, session_tokens: int) -> None:
        """Of a finished request: tokens that were looked up in shared prefixes, those of them that were found, and
        those that a session had kept."""
        self._all["prefix_cache_queries"].inc(queried_tokens)
        self._all["prefix_cache_hits"].inc(found_tokens)
        self._all["session_cached_tokens"].inc(session_tokens)

    def recalled(self, rows: int) -> None:
        """Of a finished request: rows of its prompt that decode has brought back."""
        self._all["recall_rows"].inc(rows)

    def handoff(self, recipe: str, payload_bytes: int, bf16_bytes: int) -> None:
        self._all.labelled("handoff_bytes", recipe=recipe).inc(payload_bytes)
        self._all.labelled("handoff_bf16_bytes", recipe=recipe).inc(bf16_bytes)
        if payload_bytes and bf16_bytes:
            self._all.labelled("handoff_compression_ratio", recipe=recipe).observe(payload_bytes / bf16_bytes)

    def handoff_took(self, seconds: float, exposed_s: float) -> None:
        """From the first frame to the manifest's acknowledgement, and how much of it was behind the first token."""
        self._all["handoff_seconds"].observe(seconds)
        self._all["handoff_exposed_seconds"].observe(exposed_s)

    def handoff_failed(self, error_type: str) -> None:
        self._all.labelled("handoff_failures", error_type=error_type).inc()

    def failed(self, error: KvsluiceError) -> None:
        """A request ended with an error."""
        self._all.labelled("request_failure", error_type=error.type_name).inc()
        if isinstance(error, Overloaded):
            self._all.labelled("requests_shed", reason=error.reason).inc()


def _samples(workers: list[tuple[str, wpb.WorkerInfo]]) -> Iterator[Sample]:
    """What workers say of themselves, by role."""
    decodes = [info for role, info in workers if role == "decode"]
    capacity = sum(info.capacity_bytes for info in decodes)
    free = sum(info.free_bytes for info in decodes)
    yield "kv_cache_usage_perc", {}, 1 - free / capacity if capacity else 0.0
    for role in ("prefill", "decode"):
        yield "workers", {"role": role}, sum(1 for other, _ in workers if other == role)
    for role, info in workers:
        if role == "prefill":
            yield "prefill_pending_tokens", {"worker": info.worker_id}, info.pending_tokens
            yield "prefix_cache_used_bytes", {"worker": info.worker_id}, info.prefix_used_bytes
            yield "prefix_cache_capacity_bytes", {"worker": info.worker_id}, info.prefix_capacity_bytes
            continue
        yield from tier_samples("", {"worker": info.worker_id}, info.tiers)
