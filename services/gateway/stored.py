"""What the sessions of a tenant take up in the store, against what they may."""

from __future__ import annotations

import time
from asyncio import Lock
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from ...errors import Overloaded
from ...kvstore.identity import TenantId
from ...kvstore.session import Session

LOOK_AGAIN_S = 60.0  # other gateways keep and delete sessions, too


@dataclass
class _Account:
    """A tenant's.

    Attributes:
        sessions: id -> bytes, and when they are gone.
        looked_s: when the store was asked; None = never.
        changed: what this gateway has done while it is asked; None = it is gone.
    """

    sessions: dict[str, tuple[int, float]] = field(default_factory=dict)
    looked_s: float | None = None
    changed: dict[str, tuple[int, float] | None] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)


class StoredBytes:
    """Bytes in the store of the sessions of tenants whose are limited. The store is asked now and then, and what this
    gateway changes meanwhile is counted at once.

    Args:
        sessions: a tenant's, as the store has them.
        ttl_s: how long a session lives without a turn.
        clock: Unix seconds.
    """

    def __init__(
        self,
        sessions: Callable[[TenantId], Awaitable[list[Session]]],
        ttl_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._sessions, self._ttl_s, self._clock = sessions, ttl_s, clock
        self._accounts: dict[TenantId, _Account] = {}

    async def check(self, tenant: TenantId, most: int | None) -> None:
        """Refuse another turn of a tenant that has used up its room. What a turn takes is known when it has ended, so
        the last one that is let in may go beyond.

        Args:
            most: bytes that the tenant's sessions may take up; None = without limit.

        Raises:
            Overloaded: they do. StoreUnavailable: the store cannot be asked.
        """
        if most is None:
            return
        account = self._accounts.setdefault(tenant, _Account())
        async with account.lock:
            now_s = self._clock()
            if account.looked_s is None or not 0 <= now_s - account.looked_s < LOOK_AGAIN_S:
                account.changed = {}
                found = {one.session_id: self._entry(one) for one in await self._sessions(tenant)} | account.changed
                account.sessions = {name: entry for name, entry in found.items() if entry is not None}
                account.looked_s = now_s
        account.sessions = {name: one for name, one in account.sessions.items() if one[1] > now_s}
        held = sum(count for count, _ in account.sessions.values())
        if held >= most:
            first_s = min((gone_s for _, gone_s in account.sessions.values()), default=now_s) - now_s
            problem = (
                f"{len(account.sessions)} sessions of the key's tenant take up {held} bytes of the store, "
                f"and {most} are allowed; delete some, or let them expire"
            )
            raise Overloaded(problem, first_s, "tenant_stored_bytes")

    def kept(self, session: Session) -> None:
        """A turn of a session has been written."""
        if (account := self._accounts.get(session.tenant)) is not None:
            account.sessions[session.session_id] = account.changed[session.session_id] = self._entry(session)

    def deleted(self, tenant: TenantId, session_id: str) -> None:
        """A session is gone."""
        if (account := self._accounts.get(tenant)) is not None:
            account.sessions.pop(session_id, None)
            account.changed[session_id] = None

    def _entry(self, session: Session) -> tuple[int, float]:
        return session.stored_bytes, session.used_unix_s + self._ttl_s
