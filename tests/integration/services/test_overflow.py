"""Real engines with little memory: requests of the whole service lie in the store until it is their turn."""

from __future__ import annotations

import asyncio

import pytest

from kvsluice.errors import StoreUnavailable
from kvsluice.kvstore.memory import MemoryStore

IMAGES = "kvsluice:image:"
PROMPTS = [[(37 * i + 11 * p) % 250 + 3 for i in range(300)] for p in range(6)]
OPTIONS = {"max_tokens": 24, "ignore_eos": True}
SMALL = {"kv_cache_bytes": 1 << 20, "kv_offloading_bytes": 2 << 20, "kv_time_slice_steps": 2, "store_keep_every": 4}


class Depot(MemoryStore):
    """Counts what of running requests is written; some of it is refused, or is gone when it is asked for."""

    def __init__(self, fault: str) -> None:
        super().__init__(1 << 30)
        self.fault, self.written = fault, 0

    async def put(self, key, value, ttl_s):
        if key.startswith(IMAGES):
            self.written += 1
            if self.fault == "full":
                raise StoreUnavailable("no room")
        await super().put(key, value, ttl_s)
        if key.startswith(IMAGES) and self.fault == "emptied":
            await self.delete(key)


@pytest.mark.parametrize("fault", ["", "full", "emptied"])
async def test_whatever_becomes_of_the_store_every_request_says_what_it_says_alone(make_real_fleet, until, fault: str):
    """Of all levels of durability, several choices, and clients that read late."""
    store = Depot(fault)
    fleet = await make_real_fleet(store=store, **SMALL)
    kinds = [
        {"durability": ("none", "handoff", "tokens")[i % 3], "seed": i, "temperature": 0.9, "n": 1 + (i == 2)}
        for i in range(len(PROMPTS))
    ]
    alone = [await fleet.client.generate(p, **kind, **OPTIONS) for p, kind in zip(PROMPTS, kinds, strict=True)]
    assert not store.written, "one has room"
    streams = [fleet.client.stream(p, **kind, **OPTIONS) for p, kind in zip(PROMPTS, kinds, strict=True)]
    for stream in streams:  # all run before any is read to its end
        await anext(stream)

    async def rest(stream):
        async for _ in stream:
            pass
        return stream.completion

    together = await asyncio.gather(*(rest(stream) for stream in streams))
    for one, other in zip(alone, together, strict=True):
        assert [choice.token_ids for choice in one.choices] == [choice.token_ids for choice in other.choices]
    tiers = fleet.decode.tier_snapshot()
    assert store.written
    if fault:
        assert tiers.store_failures > 0
    else:
        assert (tiers.store_writes, tiers.store_failures) == (tiers.store_reads, 0)
        assert tiers.store_writes > 0
    await fleet.until_idle()
    await until(lambda: not any(key.startswith(IMAGES) for key in store._values))
    store.check_integrity()
