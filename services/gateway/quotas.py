"""What a tenant may use: tokens over time, choices at once. Pure: times are given."""

from __future__ import annotations

from ...errors import InvalidRequest, Overloaded
from ...kvstore.identity import TenantId
from ..keys import TenantLimits


class TokenBucket:
    """Tokens that come in at a rate and are used afterwards: a request is let in while there are any, and what it took
    is subtracted when it is known, so the level may be below zero."""

    def __init__(self, now_s: float) -> None:
        self._used = 0.0  # tokens that have not come in yet, or 0
        self._since_s = now_s

    def use(self, tokens: float, rate: float, now_s: float) -> None:
        """Take tokens out; a negative number puts some back."""
        self._drain(rate, now_s)
        self._used = max(0.0, self._used + tokens)

    def wait_s(self, rate: float, burst_s: float, now_s: float) -> float:
        """How long until there are tokens again; 0 = there are.

        Args:
            burst_s: so many seconds' worth may be used at once.
        """
        self._drain(rate, now_s)
        return max(0.0, self._used / rate - burst_s)

    def is_full(self, rate: float, now_s: float) -> bool:
        """Whether nothing of it is used."""
        self._drain(rate, now_s)
        return self._used == 0

    def _drain(self, rate: float, now_s: float) -> None:
        self._used = max(0.0, self._used - rate * (now_s - self._since_s))
        self._since_s = now_s


class Quotas:
    """What the tenants of a gateway use.

    Args:
        burst_s: seconds' worth of its tokens that a tenant may use at once.
    """

    def __init__(self, burst_s: float) -> None:
        self._burst_s = burst_s
        self._buckets: dict[TenantId, tuple[TokenBucket, float]] = {}
        self._seqs: dict[TenantId, int] = {}

    def check(self, tenant: TenantId, limits: TenantLimits, num_choices: int, now_s: float) -> None:
        """Raises `Overloaded` where a request of a tenant would be more than it may have now, `InvalidRequest` where it
        would always be."""
        seqs, most = self._seqs.get(tenant, 0), limits.max_num_seqs
        if most is not None and num_choices > most:
            raise InvalidRequest("sampling.n", f"got {num_choices}", f"at most {most}, as the key's tenant may run")
        if most is not None and seqs + num_choices > most:
            problem = f"{seqs} choices run or wait, and {num_choices} more are over the {most} of the key's tenant"
            raise Overloaded(problem, reason="tenant_seqs")
        rate, found = limits.tokens_per_s, self._buckets.get(tenant)
        if rate is not None and found is not None:
            wait_s = found[0].wait_s(rate, self._burst_s, now_s)
            if wait_s > 0:
                problem = f"the {rate:g} tokens/s of the key's tenant are used up for {wait_s:.3g} s"
                raise Overloaded(problem, wait_s, "tenant_tokens")

    def begin(self, tenant: TenantId, num_choices: int) -> None:
        """A request waits or runs from now on."""
        self._seqs[tenant] = self._seqs.get(tenant, 0) + num_choices

    def use(self, tenant: TenantId, limits: TenantLimits, tokens: float, now_s: float) -> None:
        """A tenant has used tokens, or fewer than it was charged for."""
        rate = limits.tokens_per_s
        if rate is None:
            return
        bucket, _ = self._buckets.setdefault(tenant, (TokenBucket(now_s), rate))
        self._buckets[tenant] = bucket, rate
        bucket.use(tokens, rate, now_s)

    def end(self, tenant: TenantId, num_choices: int, now_s: float) -> None:
        """A request neither waits nor runs any more."""
        left = self._seqs[tenant] - num_choices
        if left:
            self._seqs[tenant] = left
            return
        del self._seqs[tenant]
        for name, (bucket, rate) in list(self._buckets.items()):
            if name not in self._seqs and bucket.is_full(rate, now_s):
                del self._buckets[name]
