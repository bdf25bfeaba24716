"""How a decode worker's memory stands at one moment: what `WorkerInfo.tiers` carries, field for field."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .scheduler import Scheduler
from .stays import IN_STORE, Place


@dataclass(frozen=True)
class TierSnapshot:
    """Bytes, sequences and moves of each tier. Numbers of what has happened count from the worker's start.

    Attributes:
        device_capacity_bytes, host_capacity_bytes, store_capacity_bytes: what a tier may hold; 0 = there is no such.
        device_used_bytes: reserved on the device by requests that were let in, and held by sessions that are kept.
        host_used_bytes: the same in host memory: values, parked requests, kept sessions.
        store_used_bytes: of parked requests that lie in the store, or are on their way there or back.
        device_sequences: running requests on the device, or on their way to it or from it.
        host_sequences: running requests that are parked in host memory.
        store_sequences: running requests that are parked in the store, or on their way there or back.
        preemptions, resumes: requests that left the device before their end, and that came back.
        device_to_host_bytes, host_to_device_bytes: that moved with them.
        store_writes, store_reads: parked requests that were written to the store, and read back.
        host_to_store_bytes, store_to_host_bytes: that moved with them.
        store_failures: moves that the store failed; a request that could not be read back is run again elsewhere.
        kept_sessions, kept_session_bytes: ended turns whose cache is still here, on the device or in host memory.
        session_hits, session_misses: later turns of sessions that went on with a cache kept here, and that did not.
        store_cache_used_bytes: of frames of the store in memory.
        store_cache_hits, store_cache_misses: frames that were read from there, and from the store itself.
    """

    device_capacity_bytes: int = 0
    device_used_bytes: int = 0
    device_sequences: int = 0
    host_capacity_bytes: int = 0
    host_used_bytes: int = 0
    host_sequences: int = 0
    store_capacity_bytes: int = 0
    store_used_bytes: int = 0
    store_sequences: int = 0
    preemptions: int = 0
    resumes: int = 0
    device_to_host_bytes: int = 0
    host_to_device_bytes: int = 0
    store_writes: int = 0
    store_reads: int = 0
    host_to_store_bytes: int = 0
    store_to_host_bytes: int = 0
    store_failures: int = 0
    kept_sessions: int = 0
    kept_session_bytes: int = 0
    session_hits: int = 0
    session_misses: int = 0
    store_cache_used_bytes: int = 0
    store_cache_hits: int = 0
    store_cache_misses: int = 0


def snapshot_of(scheduler: Scheduler) -> TierSnapshot:
    """Of what a scheduler has let in. Any thread may ask: numbers may be a step apart, and none is torn."""
    pool, host, tiers = scheduler.pool, scheduler.host, scheduler.tiers
    counted = TierSnapshot(
        device_capacity_bytes=pool.capacity_bytes,
        device_used_bytes=pool.used_bytes,
        device_sequences=scheduler.num_started,
        host_capacity_bytes=0 if host is None else host.capacity_bytes,
        host_used_bytes=0 if host is None else host.used_bytes,
    )
    kept = scheduler.sessions
    if kept is not None:
        counted = replace(
            counted,
            kept_sessions=len(kept),
            kept_session_bytes=kept.device_bytes + kept.host_bytes,
            session_hits=kept.hits,
            session_misses=kept.misses,
        )
    if tiers is None:
        return counted
    counts, overflow = tiers.counts, tiers.overflow
    parked, stored = len(tiers.at(Place.PARKED)), len(tiers.at(*IN_STORE))
    return replace(
        counted,
        device_sequences=counted.device_sequences - parked - stored,
        host_sequences=parked,
        store_capacity_bytes=overflow.policy.store_bytes if overflow.is_attached else 0,
        store_used_bytes=overflow.used_bytes,
        store_sequences=stored,
        preemptions=counts.preemptions,
        resumes=counts.resumes,
        device_to_host_bytes=counts.bytes_down,
        host_to_device_bytes=counts.bytes_up,
        store_writes=overflow.counts.writes,
        store_reads=overflow.counts.reads,
        host_to_store_bytes=overflow.counts.bytes_down,
        store_to_host_bytes=overflow.counts.bytes_up,
        store_failures=overflow.counts.failures,
    )
