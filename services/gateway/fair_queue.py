"""Whose turn it is: requests that wait, by priority class, by what their tenants have used, by when they came.

Within a class every tenant has a counter of tokens that it was served, divided by its weight; who has least goes first
(virtual token counters: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024). A tenant that comes back
begins where the least of those that are busy stands, so that nobody saves up. Tokens are charged by estimate when a
request starts, and settled when it ends. Pure: no clock, no tasks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from ...kvstore.identity import TenantId
from ..keys import UNLIMITED, TenantLimits

CLASSES = ("high", "normal", "low")
LEAST_SHARE = 0.01  # of what ends, that a class is taken to get beside higher ones
_numbers = count()


@dataclass(eq=False)
class Place:
    """A request in the queue, or running.

    Attributes:
        need: choices that it takes up.
        prompt_tokens: that its prompt costs, as far as that is known.
        tokens: of prompt and answer, as far as they are known; what its tenant is charged.
    """

    tenant: TenantId
    limits: TenantLimits
    need: int
    prompt_tokens: float
    tokens: float
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def rank(self) -> int:
        """Of its class; the smallest goes first."""
        return CLASSES.index(self.limits.priority)


def choices(place: Place) -> float:
    """Of a request."""
    return place.need


@dataclass
class _Tenant:
    limits: TenantLimits = UNLIMITED
    used: float = 0.0  # tokens / weight
    waiting: deque[Place] = field(default_factory=deque)
    running: int = 0  # choices

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def rank(self) -> int:
        return CLASSES.index(self.limits.priority)

    def waits(self, size: Callable[[Place], float]) -> float:
        return sum(map(size, self.waiting))


class FairQueue:
    """The queue, and what each tenant of it has used."""

    def __init__(self) -> None:
        self._tenants: dict[TenantId, _Tenant] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def room(self, tenant: TenantId, limits: TenantLimits, max_waiting: int) -> int:
        """How many more requests of a tenant may wait: its share of the queue, by weight, among those that are busy.
        What others have in the queue from when fewer were busy does not count against it, until the queue is twice as
        long as it should be."""
        own = self._tenants.get(tenant, _Tenant())
        weights = sum(one.limits.weight for name, one in self._tenants.items() if one.is_busy and name != tenant)
        share = max(1, int(max_waiting * limits.weight / (weights + limits.weight))) if max_waiting else 0
        return min(share - len(own.waiting), 2 * max_waiting - self._length)

    def ahead(self, place: Place, size: Callable[[Place], float] = choices) -> float:
        """What would start before a request that came now, in the mean: that which waits, and what other tenants go on
        to ask for, as what they have running says. Between tenants of a class shares are by weight.

        Args:
            size: what is added up, such as choices.
        """
        own = self._tenants.get(place.tenant, _Tenant())
        others = [one for name, one in self._tenants.items() if name != place.tenant and one.rank <= place.rank]
        higher = [one for one in others if one.rank < place.rank]
        equal = [one for one in others if one.rank == place.rank]
        own_waiting = own.waits(size)
        mine = own_waiting + size(place)
        waiting = sum(one.waits(size) for one in higher)
        waiting += sum(min(one.waits(size), mine / place.limits.weight * one.limits.weight) for one in equal)
        running = max(1, sum(one.running for one in self._tenants.values()))
        weights = sum(one.limits.weight for one in equal if one.is_busy)
        left = 1 - sum(one.running for one in higher) / running
        share = max(
            left - sum(one.running for one in equal) / running,
            left * place.limits.weight / (place.limits.weight + weights),
        )
        return max(waiting + own_waiting, mine / max(share, LEAST_SHARE) - size(place))

    def add(self, place: Place) -> None:
        """Have a request wait."""
        tenant = self._tenants.setdefault(place.tenant, _Tenant())
        tenant.limits = place.limits
        if not tenant.is_busy:
            tenant.used = max(tenant.used, self._least(place.rank))
        tenant.waiting.append(place)
        self._length += 1

    def remove(self, place: Place) -> None:
        """A request that waits no longer wants to."""
        self._tenants[place.tenant].waiting.remove(place)
        self._length -= 1
        self._forget(place.tenant)

    def first(self) -> Place | None:
        """The request whose turn it is."""
        waiting = [one for one in self._tenants.values() if one.waiting]
        if not waiting:
            return None
        return min(waiting, key=lambda one: (one.rank, one.used, one.waiting[0].number)).waiting[0]

    def start(self, place: Place) -> None:
        """A request that waits begins; its tenant is charged."""
        tenant = self._tenants[place.tenant]
        tenant.waiting.remove(place)
        self._length -= 1
        tenant.running += place.need
        tenant.used += place.tokens / tenant.limits.weight

    def end(self, place: Place, used_tokens: float | None = None) -> None:
        """A request that ran has ended.

        Args:
            used_tokens: what it really took; None = what was charged.
        """
        tenant = self._tenants[place.tenant]
        tenant.running -= place.need
        if used_tokens is not None:
            tenant.used += (used_tokens - place.tokens) / tenant.limits.weight
        self._forget(place.tenant)

    def _least(self, rank: int) -> float:
        return min((one.used for one in self._tenants.values() if one.is_busy and one.rank == rank), default=0.0)

    def _forget(self, name: TenantId) -> None:
        """Drop tenants whose counters would be lifted anyway when they came back."""
        if self._tenants[name].is_busy:
            return
        least = [self._least(rank) for rank in range(len(CLASSES))]  # once: there may be thousands of tenants
        for other, one in list(self._tenants.items()):
            if not one.is_busy and one.used <= least[one.rank]:
                del self._tenants[other]
        if not any(one.is_busy for one in self._tenants.values()):
            self._tenants.clear()
