"""The network between a decode worker and everyone else fails: its streams go on elsewhere, and it lets go of them."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from kvsluice.kvstore.memory import MemoryStore
from kvsluice.tests.faults.rig.proxy import Proxy, Rules

PROMPT = [(37 * i) % 250 + 3 for i in range(300)]
LOST, HONEST = Rules(drop=True), Rules()
OPTIONS = {"recipe": "exact", "temperature": 0.8, "seed": 3, "max_tokens": 60, "ignore_eos": True}


class SharedStore(MemoryStore):
    """One that both workers use."""

    async def close(self) -> None:
        return None


@pytest.fixture
async def far(make_real_fleet):
    """A fleet whose one decode worker is reached through a proxy, that proxy, what a request says there, and a store
    for others."""
    store = SharedStore(1 << 30)
    with ExitStack() as stack:

        def through(address: str) -> str:
            host, _, port = address.rpartition(":")
            proxies.append(stack.enter_context(Proxy(host, int(port))))
            return f"{host}:{proxies[0].port}"

        proxies: list[Proxy] = []
        fleet = await make_real_fleet(store=store, store_keep_every=4, worker_lease_s=0.5, max_migrations=16)
        await fleet.add_decode("far", store, through)
        await fleet.lose("worker-0")
        whole = await fleet.client.generate(PROMPT, **OPTIONS)
        yield fleet, proxies[0], whole.token_ids, store


async def broken_at(fleet, store, position: int, break_it, **options):
    """The answer to a request that another worker may go on with once something has been done."""
    stream = fleet.client.stream(PROMPT, **OPTIONS, **options)
    came, is_broken = 0, False
    async for chunk in stream:
        came += len(chunk.token_ids)
        if came >= position and not is_broken:
            is_broken = True
            break_it()
            await fleet.add_decode("near", store)
    assert is_broken
    return stream.completion


@pytest.mark.parametrize("durability", ["none", "tokens"])
@pytest.mark.parametrize(
    ("requests", "replies"), [(LOST, LOST), (LOST, HONEST), (HONEST, LOST)], ids=["both", "requests", "replies"]
)
async def test_a_silent_partition_costs_a_lease(far, until, durability, requests, replies):
    fleet, proxy, whole, store = far

    def part() -> None:
        proxy.requests, proxy.replies = requests, replies

    done = await broken_at(fleet, store, 20, part, durability=durability)
    assert done.token_ids == whole
    # a worker that hears nothing may still tell all that it has credits for
    assert done.durability.migrations == 1 or (replies is HONEST and done.durability.migrations == 0)
    proxy.clear()
    if requests is not replies:
        proxy.reset_all()  # otherwise the worker finds out by itself, by its keepalive
    await fleet.until_idle()
    await until(lambda: len(fleet.gateway.pool._decodes()) == 2)
    assert (await fleet.client.generate(PROMPT, **OPTIONS)).token_ids == whole


@pytest.mark.parametrize("direction", ["requests", "replies"])
async def test_a_connection_that_breaks_at_any_byte_costs_no_token(far, until, direction):
    """Every connection ends behind so many bytes until another worker has taken over. What is sent to a decode worker
    is frames as well: its link to the gateway may live on, and it still cannot be used."""
    fleet, proxy, whole, store = far
    await fleet.add_decode("near", store)
    for after in (50, 200, 700, 3000, 20_000, 100_000):
        setattr(proxy, direction, Rules(reset_after=after))
        proxy.reset_all()
        for durability in ("none", "tokens"):
            done = await fleet.client.generate(PROMPT, durability=durability, **OPTIONS)
            assert done.token_ids == whole
        proxy.clear()
        await until(lambda: len(fleet.gateway.pool._decodes()) == 2)
    proxy.reset_all()
    await fleet.until_idle()
