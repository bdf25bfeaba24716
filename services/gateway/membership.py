"""Which workers there are: a table with generation numbers that gateways wait on."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal, Protocol

Role = Literal["prefill", "decode", "gateway"]


@dataclass(frozen=True)
class Member:
    """One role of one worker process. A restarted worker keeps its id and gets a new incarnation and address."""

    worker_id: str
    role: Role
    address: str
    incarnation: str


@dataclass(frozen=True)
class View:
    """All members as of a generation."""

    generation: int
    members: tuple[Member, ...]


class Membership(Protocol):
    """Where a gateway learns of the workers."""

    async def watch(self, after: int, timeout_s: float) -> View:
        """The view as soon as its generation is above `after`, or the unchanged one after `timeout_s`."""
        ...


class MembershipTable:
    """The table itself. Lives in one event loop."""

    def __init__(self) -> None:
        self._members: dict[tuple[str, str], Member] = {}
        self._generation = 1
        self._changed = asyncio.Condition()

    def view(self) -> View:
        return View(self._generation, tuple(self._members.values()))

    async def register(self, member: Member) -> None:
        """Add a member, or replace the earlier incarnation of the same worker and role."""
        async with self._changed:
            self._members[member.worker_id, member.role] = member
            self._generation += 1
            self._changed.notify_all()

    async def remove(self, worker_id: str) -> None:
        async with self._changed:
            self._members = {k: m for k, m in self._members.items() if m.worker_id != worker_id}
            self._generation += 1
            self._changed.notify_all()

    async def watch(self, after: int, timeout_s: float) -> View:
        async with self._changed:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait_for(lambda: self._generation > after)
            except TimeoutError:
                pass
            return self.view()
