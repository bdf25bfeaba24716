"""A decode worker's tiers as metrics, the same at the gateway and at the worker itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...protos import worker_pb2 as wpb
from .registry import Sample

TIERS = ("device", "host", "store")
MOVES = ("device_to_host", "host_to_device", "host_to_store", "store_to_host")


def tier_samples(prefix: str, labels: Mapping[str, str], tiers: wpb.TierSnapshot) -> Iterator[Sample]:
    """Samples of metrics that are called `{prefix}tier_…` and the like.

    Args:
        labels: that each of them carries besides its own.
    """
    for tier in TIERS:
        own = {**labels, "tier": tier}
        yield f"{prefix}tier_capacity_bytes", own, getattr(tiers, f"{tier}_capacity_bytes")
        yield f"{prefix}tier_used_bytes", own, getattr(tiers, f"{tier}_used_bytes")
        yield f"{prefix}tier_sequences", own, getattr(tiers, f"{tier}_sequences")
    for move in MOVES:
        yield f"{prefix}tier_moved_bytes", {**labels, "move": move}, getattr(tiers, f"{move}_bytes")
    yield f"{prefix}preemptions", labels, tiers.preemptions
    yield f"{prefix}resumes", labels, tiers.resumes
    yield f"{prefix}tier_store_failures", labels, tiers.store_failures
    yield f"{prefix}kept_sessions", labels, tiers.kept_sessions
    yield f"{prefix}kept_session_bytes", labels, tiers.kept_session_bytes
    yield f"{prefix}kept_session_hits", labels, tiers.session_hits
    yield f"{prefix}kept_session_misses", labels, tiers.session_misses
    yield f"{prefix}store_cache_hits", labels, tiers.store_cache_hits
    yield f"{prefix}store_cache_misses", labels, tiers.store_cache_misses
