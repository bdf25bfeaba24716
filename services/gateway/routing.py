"""Which worker takes a request. Pure policy over numbers: no transport, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeLoad:
    """What is known of a decode worker's load; `ours` counts what its own numbers cannot hold yet. A worker without
    host memory for values has a `host_capacity_bytes` of 0."""

    worker_id: str
    free_bytes: int
    capacity_bytes: int
    running: int
    waiting: int
    ours: int
    host_free_bytes: int = 0
    host_capacity_bytes: int = 0

    @property
    def free_share(self) -> float:
        """Of the memory that there is less of."""
        shares = [self.free_bytes / max(1, self.capacity_bytes)]
        if self.host_capacity_bytes:
            shares.append(self.host_free_bytes / self.host_capacity_bytes)
        return min(shares)


@dataclass(frozen=True)
class PrefillLoad:
    """What is known of a prefill worker's load.

    Attributes:
        pending_tokens: what prompts cost that have not run.
        saved_tokens: what the prompt that it is picked for should cost it less than one of which it knows nothing.
    """

    worker_id: str
    pending_tokens: float
    saved_tokens: float = 0.0


def pick_decode(loads: Sequence[DecodeLoad], near: str | None = None) -> str | None:
    """The worker with no queue, then the most free cache, then the fewest sequences; ties go to the smaller id.

    Args:
        near: a worker that has what the request needs in memory; of those with no longer queue than others it is taken
            as long as it is not all but full.
    """
    if not loads:
        return None

    def order(load: DecodeLoad) -> tuple[int, bool, int, float, str]:
        # sixteenths: workers that are about equally full are told apart by how many sequences they run
        free = round(load.free_share * 16)
        is_near = load.worker_id == near and free > 0
        return (load.waiting, not is_near, -free, max(load.ours, load.running), load.worker_id)

    return min(loads, key=order).worker_id


def pick_prefill(loads: Sequence[PrefillLoad]) -> str | None:
    """The worker that has the fewest tokens to run once it has this prompt as well: one that knows the prompt's
    beginning is taken until its queue is longer than another's by more than that saves. Ties go to the smaller id."""
    if not loads:
        return None
    return min(loads, key=lambda load: (load.pending_tokens - load.saved_tokens, load.worker_id)).worker_id
