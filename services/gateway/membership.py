"""Which workers there are: a table with generation numbers that gateways wait on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

Role = Literal["prefill", "decode", "gateway"]


@dataclass(frozen=True)
class Member:
    """One role of one worker process. A restarted worker keeps its id and gets a new incarnation and address.

    Attributes:
        model: the name under which it is served; empty = that of whoever looks.
        max_num_seqs: choices that it runs together; 0 = not known.
        draining: it finishes what it has, and gets nothing new.
    """

    worker_id: str
    role: Role
    address: str
    incarnation: str
    model: str = ""
    max_num_seqs: int = 0
    draining: bool = False


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
    """The table itself. Lives in one event loop.

    Args:
        generation: the first; one table's follow those of an earlier one that it replaces.
        hidden: nobody sees it until `show`: a table that is only just being filled would take workers away.
    """

    def __init__(self, generation: int = 1, hidden: bool = False) -> None:
        self._members: dict[tuple[str, str], Member] = {}
        self._generation = generation
        self._hidden = hidden
        self._changed = asyncio.Condition()

    @property
    def generation(self) -> int:
        return self._generation

    def view(self) -> View:
        return View(self._generation, tuple(self._members.values()))

    async def show(self) -> None:
        """Let it be seen from now on."""
        async with self._changed:
            self._hidden = False
            self._changed.notify_all()

    async def register(self, member: Member) -> None:
        """Add a member, or replace the earlier incarnation of the same worker and role."""
        await self._update(lambda members: members | {(member.worker_id, member.role): member})

    async def remove(self, worker_id: str) -> None:
        await self._update(lambda members: {k: m for k, m in members.items() if m.worker_id != worker_id})

    async def drain(self, worker_id: str) -> None:
        """Let a worker get nothing new."""

        def drained(member: Member) -> Member:
            return replace(member, draining=True) if member.worker_id == worker_id else member

        await self._update(lambda members: {key: drained(member) for key, member in members.items()})

    async def _update(self, change: Callable[[dict[tuple[str, str], Member]], dict[tuple[str, str], Member]]) -> None:
        async with self._changed:
            members = change(self._members)
            if members != self._members:
                self._members = members
                self._generation += 1
                self._changed.notify_all()

    async def watch(self, after: int, timeout_s: float) -> View:
        async with self._changed:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait_for(lambda: not self._hidden and self._generation > after)
            except TimeoutError:
                pass
            return View(after, ()) if self._hidden else self.view()
