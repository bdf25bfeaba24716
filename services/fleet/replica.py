"""A process of the fleet as the controller knows it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from .reconcile import Existing, State
from .report import Report
from .wanted import WantedGroup

__all__ = ["Replica", "State"]

FIRST_PAUSE_S = 5.0


@dataclass
class Replica:
    """One process, over its restarts.

    Attributes:
        state: and `since_s`, when it became so. `was`: the state before it was drained.
        seen_s: when it last reported.
        past: incarnations that others have followed.
        waits_for: why it has no place on a node; None = it has one. `placed_s`: when it last had none.
        drain_generation: of the membership that first says that it is drained.
        retry_at_s: when one that cannot start is tried again.
        gone: set once it has ended, or could not be.
    """

    worker_id: str
    group: str
    role: str
    model: str
    version: str
    number: int
    start_timeout_s: float
    state: State = "starting"
    since_s: float = 0.0
    seen_s: float = 0.0
    report: Report | None = None
    past: set[str] = field(default_factory=set)
    restarts: int = 0
    error: str = ""
    error_type: str = ""
    pause_s: float = FIRST_PAUSE_S
    retry_at_s: float = 0.0
    waits_for: str | None = None
    placed_s: float = 0.0
    was: State = "starting"
    drain_until_s: float = 0.0
    drain_generation: int = 0
    ending: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    def of(cls, group: WantedGroup, worker_id: str, number: int, now: float) -> Replica:
        return cls(
            worker_id,
            group.name,
            group.role,
            group.model,
            group.version,
            number,
            group.start_timeout_s,
            since_s=now,
            placed_s=now,
        )

    @property
    def is_gateway(self) -> bool:
        return self.role == "gateway"

    def become(self, state: State, now: float) -> None:
        self.state, self.since_s = state, now

    def existing(self) -> Existing:
        busy = 0.0 if self.report is None else self.report.load.running + self.report.load.usage
        return Existing(self.worker_id, self.group, self.version, self.state, self.number, busy)

    def saved(self) -> dict[str, Any]:
        """What a later controller needs of it."""
        return {
            "worker_id": self.worker_id,
            "group": self.group,
            "role": self.role,
            "model": self.model,
            "version": self.version,
            "number": self.number,
            "start_timeout_s": self.start_timeout_s,
            "draining": self.state == "draining",
        }

    @classmethod
    def restored(cls, saved: dict[str, Any], now: float) -> Replica:
        draining = saved.pop("draining")
        one = cls(**saved, since_s=now, placed_s=now)
        if draining:
            one.was = "serving"
            one.become("draining", now)
        return one
