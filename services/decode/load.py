"""What a decode engine has to do, and what its memories hold; any thread may ask."""

from __future__ import annotations

from .scheduler import Scheduler
from .snapshot import TierSnapshot, snapshot_of


class EngineLoad:
    """The figures of an engine that has this scheduler."""

    scheduler: Scheduler

    @property
    def num_running(self) -> int:
        """Choices that have started and not ended."""
        return self.scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that wait for memory."""
        return self.scheduler.num_waiting

    @property
    def capacity_bytes(self) -> int:
        return self.scheduler.pool.capacity_bytes

    @property
    def free_bytes(self) -> int:
        """Of its caches' memory, for whoever comes: what ended turns have left makes room."""
        kept = self.scheduler.sessions
        return self.scheduler.pool.free_bytes + (0 if kept is None else kept.device_bytes)

    @property
    def host_capacity_bytes(self) -> int:
        """Host memory that values may lie in."""
        return 0 if self.scheduler.host is None else self.scheduler.host.capacity_bytes

    @property
    def host_free_bytes(self) -> int:
        """The same of host memory."""
        host, kept = self.scheduler.host, self.scheduler.sessions
        return 0 if host is None else host.free_bytes + (0 if kept is None else kept.host_bytes)

    def tier_snapshot(self) -> TierSnapshot:
        """What the tiers hold and have moved; any thread may ask."""
        return snapshot_of(self.scheduler)
