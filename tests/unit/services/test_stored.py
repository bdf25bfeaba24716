"""Bytes of a tenant's sessions in the store."""

from __future__ import annotations

import pytest

from kvsluice.errors import Overloaded, StoreUnavailable
from kvsluice.kvstore.identity import TenantId
from kvsluice.kvstore.session import Session
from kvsluice.services.gateway.stored import LOOK_AGAIN_S, StoredBytes

ALICE = TenantId("alice")
TTL_S = 1000.0


class Stored:
    """A store's sessions, and a clock."""

    def __init__(self):
        self.now_s, self.found, self.looks, self.broken = 5000.0, [], 0, False
        self.ledger = StoredBytes(self.sessions, TTL_S, lambda: self.now_s)

    async def sessions(self, tenant):
        if self.broken:
            raise StoreUnavailable("gone")
        self.looks += 1
        return [one for one in self.found if one.tenant == tenant]

    def session(self, session_id, stored_bytes, tenant=ALICE):
        return Session(
            session_id, tenant, "f", "exact", "{}", False, 1, 1, (1,), (), self.now_s, self.now_s, stored_bytes
        )  # fmt: skip

    async def refusal(self, most=100):
        with pytest.raises(Overloaded) as caught:
            await self.ledger.check(ALICE, most)
        return caught.value


@pytest.fixture
def stored():
    return Stored()


async def test_who_has_no_limit_is_not_looked_at(stored):
    await stored.ledger.check(ALICE, None)
    assert stored.looks == 0


async def test_the_last_turn_that_is_let_in_may_go_beyond(stored):
    stored.found = [stored.session("a", 99), stored.session("b", 500, TenantId("bob"))]
    await stored.ledger.check(ALICE, 100)
    stored.ledger.kept(stored.session("a", 140))
    refused = await stored.refusal()
    assert refused.reason == "tenant_stored_bytes" and "140 bytes" in refused.message
    assert stored.looks == 1, "what this gateway changes needs no look"


async def test_there_is_room_once_sessions_are_deleted_or_expire(stored):
    stored.found = [stored.session("a", 60)]
    await stored.ledger.check(ALICE, 100)
    stored.now_s += 10
    stored.ledger.kept(stored.session("b", 60))
    assert (await stored.refusal()).retry_after_s == TTL_S - 10, "until the first one expires"
    stored.ledger.deleted(ALICE, "b")
    await stored.ledger.check(ALICE, 100)
    stored.ledger.kept(stored.session("b", 60))
    stored.found = [stored.session("b", 60)]
    stored.now_s += TTL_S - 10
    await stored.ledger.check(ALICE, 100)


async def test_what_other_gateways_do_is_seen_after_a_while(stored):
    await stored.ledger.check(ALICE, 100)
    stored.found = [stored.session("a", 200)]
    await stored.ledger.check(ALICE, 100)
    stored.now_s += LOOK_AGAIN_S
    await stored.refusal()
    stored.found = []
    stored.now_s -= 2 * LOOK_AGAIN_S  # a clock that was put back
    await stored.ledger.check(ALICE, 100)


async def test_a_store_that_is_away_is_asked_again(stored):
    stored.broken = True
    with pytest.raises(StoreUnavailable):
        await stored.ledger.check(ALICE, 100)
    stored.broken, stored.found = False, [stored.session("a", 200)]
    await stored.refusal()


async def test_what_happens_while_the_store_is_asked_counts(stored):
    async def sessions(tenant):
        stored.ledger.kept(stored.session("b", 200))
        stored.ledger.deleted(ALICE, "a")
        return [stored.session("a", 500)]  # as it was when it was asked

    stored.ledger = StoredBytes(sessions, TTL_S, lambda: stored.now_s)
    assert "200 bytes" in (await stored.refusal()).message
