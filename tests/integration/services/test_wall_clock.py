"""The wall clock is set an hour forwards or back under a running service: nothing that is promised hangs on it."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import pytest

from kvsluice.kvstore.memory import MemoryStore
from kvsluice.services.gateway.job import GATEWAYS, Epochs

PROMPT = [(37 * i) % 250 + 3 for i in range(120)]
OPTIONS = {"recipe": "exact", "temperature": 0.8, "seed": 3, "max_tokens": 60, "ignore_eos": True}
TURN = {"recipe": "exact", "temperature": 0.0, "max_tokens": 8, "ignore_eos": True}


class SharedStore(MemoryStore):
    """One that all workers use."""

    async def close(self) -> None:
        return None


@pytest.fixture
def set_clock(monkeypatch):
    """set_clock(seconds): what the service takes for the time of day is off by so much from now on. gRPC is left alone:
    it asks twice when a call begins, in Python and beneath, and a clock is not set in between."""

    def by(seconds: int) -> None:
        shifted = SimpleNamespace(**vars(time))
        shifted.time = lambda: time.time() + seconds
        shifted.time_ns = lambda: time.time_ns() + seconds * 10**9
        for name, module in list(sys.modules.items()):
            if name.startswith("kvsluice.") and not name.startswith("kvsluice.tests") and hasattr(module, "time"):
                monkeypatch.setattr(module, "time", shifted)

    return by


@pytest.mark.parametrize("seconds", [3600, -3600], ids=["forwards", "back"])
async def test_leases_and_what_is_kept_do_not_hang_on_the_time_of_day(make_real_fleet, until, set_clock, seconds):
    store = SharedStore(1 << 30)
    settings = {"worker_lease_s": 0.5, "store_ttl_s": 60.0, "session_ttl_s": 120.0, "stream_credits": 8}
    fleet = await make_real_fleet(store=store, store_keep_every=4, **settings)
    await fleet.add_decode("other", store)
    whole = (await fleet.client.generate(PROMPT, **OPTIONS)).token_ids
    begun = await fleet.client.generate(PROMPT, session_id="tea", **TURN)
    stream, came = fleet.client.stream(PROMPT, durability="tokens", **OPTIONS), 0
    async for chunk in stream:
        before, came = came, came + len(chunk.token_ids)
        if before < 20 <= came:
            set_clock(seconds)
            links = fleet.gateway.pool._decodes()
            before_it = [link.info for link in links]
            # each gives another account of itself, so no lease has ended
            await until(lambda ls=links, old=before_it: all(n.info is not o for n, o in zip(ls, old, strict=True)))
            assert len(links) == 2 and all(link.up for link in links)
            await fleet.lose(fleet.busy())
    done = stream.completion
    assert done.token_ids == whole
    assert (done.durability.migrations, done.durability.recomputed_prompt_tokens) == (1, 0), "it was read back"
    again = await fleet.client.generate([5, 6, 7], session_id="tea", session_turn=2, **TURN)
    assert again.usage.cached_tokens >= len(PROMPT), "neither the session nor its cache has expired"
    assert len(begun.token_ids) == len(again.token_ids) == 8


def test_epochs_grow_when_the_clock_is_set_back(set_clock):
    epochs = Epochs(gateway=7)
    first = epochs.next()
    set_clock(-3600)
    assert epochs.next() > first
    restarted = Epochs(gateway=7)
    assert restarted.next(above=first) > first, "a session's record says which epoch it was left under"
    assert restarted.next() % GATEWAYS == 7
