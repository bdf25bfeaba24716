"""Whether a decode engine's states, ledgers and the memory really held agree."""

from __future__ import annotations

from collections.abc import Mapping

from .host_pages import HostPages
from .kept_sessions import KeptSessions
from .parking import Parking
from .scheduler import Scheduler
from .sequence import RequestRun


def check_memory(
    scheduler: Scheduler,
    runs: Mapping[str, RequestRun],
    host: HostPages | None,
    parking: Parking | None,
    sessions: KeptSessions,
) -> None:
    """Assert that they do, whatever is under way."""
    scheduler.check_integrity()
    sizes = scheduler.pool.regions(kept=False)
    for request_id, run in runs.items():
        assert scheduler.phase(request_id) is not None, "every request has a state"
        assert set(run.choices) == set(scheduler.live_choices(request_id)), "every choice has a turn"
        reserved = sum(size for region, size in sizes.items() if region.request_id == request_id)
        assert run.held_bytes() <= reserved, f"{request_id} holds {run.held_bytes()} of {reserved} bytes"
    assert {region.request_id for region in sizes} <= set(runs), "no memory without a request"
    sessions.check_integrity()
    if host is not None:
        host.check_integrity()
        held = sum(run.host_bytes() for run in runs.values()) + sessions.host_bytes
        if parking is not None:
            parking.check_integrity()
            held += parking.held_bytes
        taken = (host.num_pages - host.num_free) * host.page_nbytes
        assert held == taken, f"requests hold {held} of {taken} bytes of host memory"
