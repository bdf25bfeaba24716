"""The engine as a process of a configuration runs it."""

from __future__ import annotations

from collections.abc import Callable

from ...models.model import Model
from ..config import ServeConfig
from ..staging import Event as DeviceEvent
from .engine import DecodeEngine
from .host_pages import HostPages
from .overflow import OverflowPolicy
from .parallel import LeadingEngine
from .tiers import TierPolicy


def make_engine(
    model: Model, config: ServeConfig, mark: Callable[[], DeviceEvent | None] = lambda: None
) -> DecodeEngine:
    """An engine over a model; where several processes hold that, as each of them runs it.

    Args:
        mark: see `HostCopies.mark`.
    """
    ranks, size = model.ranks, 1 if model.ranks is None else model.ranks.size
    make = LeadingEngine if ranks is not None and ranks.leads else DecodeEngine
    host_bytes = config.kv_offloading_bytes // size
    host = HostPages(host_bytes, model.device) if host_bytes else None
    tiers = None
    # whether a copy is done differs between ranks, so none of them parks anything
    if config.kv_time_slice_steps and ranks is None:
        tiers = TierPolicy(config.kv_time_slice_steps, overflow=OverflowPolicy(config.store_offloading_bytes))
    capacity = config.kv_cache_bytes // size
    # nor does any keep what a session's turn has left, which another has to keep as well
    kept = config.session_cache_bytes if ranks is None else 0
    return make(
        model,
        capacity,
        config.max_num_seqs,
        config.max_queue,
        host,
        mark=mark,
        tiers=tiers,
        session_bytes=kept,
        # a rank that finds its device busy would leave the others waiting in the middle of a comparison
        quality_sample_rate=config.quality_sample_rate if ranks is None else 0.0,
    )
