"""What a decode worker says of itself."""

from __future__ import annotations

from dataclasses import asdict

from ...protos import worker_pb2 as wpb
from ..worker import WorkerIdentity
from .engine import DecodeEngine
from .keeping import KeptRequests


def worker_account(engine: DecodeEngine, identity: WorkerIdentity, store: KeptRequests | None) -> wpb.WorkerInfo:
    """Its identity, load and memory; any thread may ask.

    Args:
        store: where requests are kept, if they can be.
    """
    info = identity.info(
        capacity_bytes=engine.capacity_bytes,
        free_bytes=engine.free_bytes,
        running=engine.num_running,
        waiting=engine.num_waiting,
        host_capacity_bytes=engine.host_capacity_bytes,
        host_free_bytes=engine.host_free_bytes,
    )
    info.has_store = store is not None
    tiers = engine.tier_snapshot()
    if store is not None:
        tiers = store.with_cache(tiers)
    info.tiers.CopyFrom(wpb.TierSnapshot(**asdict(tiers)))
    return info
