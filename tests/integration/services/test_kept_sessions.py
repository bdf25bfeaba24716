"""A turn goes on with the cache that the one before has left on its worker, and says what it says from the store."""

from __future__ import annotations

import pytest

from kvsluice.kvstore.memory import MemoryStore

PROMPT = [(37 * i) % 250 + 3 for i in range(300)]
SECOND = [(11 * i) % 250 + 3 for i in range(90)]
THIRD = [7, 8, 9]
SEEDED = {"temperature": 0.9, "top_p": 0.95, "seed": 11, "max_tokens": 40, "ignore_eos": True}
HOST = {"kv_offloading_bytes": 64 << 20}


class SharedStore(MemoryStore):
    """One that outlives the workers that use it."""

    async def close(self):
        return None


@pytest.fixture
async def make(make_real_fleet):
    """make(session bytes) -> a fleet whose decode engine keeps so much; some launch a step ahead, as on a GPU."""

    async def make(session_cache_bytes: int, lookahead: bool = False, **settings):
        store = SharedStore(1 << 30)
        settings = {"store_keep_every": 4, "session_cache_bytes": session_cache_bytes} | settings
        fleet = await make_real_fleet(store=store, **settings)
        fleet.store, fleet.decode.lookahead = store, lookahead
        return fleet

    return make


async def talk(fleet, turns=(PROMPT, SECOND, THIRD), session="s", **options):
    """What is said in each turn."""
    return [(await fleet.client.generate(turn, session_id=session, **SEEDED | options)).token_ids for turn in turns]


@pytest.mark.parametrize(
    ("recipe", "lookahead", "settings"),
    [("exact", False, {}), ("sluice-full", True, HOST), ("kivi", True, {}), ("streaming", False, {})],
)
async def test_the_kept_cache_says_what_the_store_says(make, recipe: str, lookahead: bool, settings: dict):
    kept, read = await make(1 << 30, lookahead, **settings), await make(0, **settings)
    assert await talk(kept, recipe=recipe) == await talk(read, recipe=recipe)
    told = kept.decode.tier_snapshot()
    assert (told.session_hits, told.session_misses, told.kept_sessions) == (2, 0, 1)
    assert told.kept_session_bytes > 0
    assert read.decode.tier_snapshot().kept_sessions == 0
    # what was gone on with here was written as well: another worker finds all of it
    await kept.add_decode("other", kept.store)
    await kept.lose("worker-0")
    assert await talk(kept, [[5, 6]], recipe=recipe) == await talk(read, [[5, 6]], recipe=recipe)
    await kept.until_idle()


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("recipe", ["exact", "sluice-full"])
async def test_what_a_turn_did_not_deliver_is_forgotten(make, recipe: str, lookahead: bool):
    """Answers that end by a stop token, or by a stop string, after which some tokens had been run."""
    kept, read = await make(1 << 30, lookahead), await make(0)
    free = await read.client.generate(PROMPT, recipe=recipe, **SEEDED)
    for name, end in (("token", {"stop_token_ids": [free.token_ids[20]]}), ("text", {"stop": free.text[12:14]})):
        pair = []
        for fleet in (kept, read):
            first = await fleet.client.generate(PROMPT, session_id=name, recipe=recipe, **SEEDED | end)
            assert len(first.token_ids) < len(free.token_ids)
            second = await fleet.client.generate(SECOND, session_id=name, **SEEDED)
            pair.append((first.token_ids, second.token_ids, second.session.tokens))
        assert pair[0] == pair[1], name
    told = kept.decode.tier_snapshot()
    assert told.session_hits + told.session_misses == 2
    assert told.session_hits >= 1, "rows that nothing was sealed from are forgotten"


async def test_what_is_kept_of_an_earlier_turn_is_dropped(make):
    kept, read = await make(1 << 30), await make(0)
    wanted = await talk(read)
    await kept.add_decode("other", kept.store)
    places = kept.gateway.sessions._places
    said = await talk(kept, [PROMPT])
    ((name, first),) = places.items()
    for turn, place in ((SECOND, {"worker-0": "other", "other": "worker-0"}[first]), (THIRD, first)):
        places[name] = place
        said += await talk(kept, [turn])
    assert said == wanted
    told = [engine.tier_snapshot() for engine in kept.engines.values()]
    assert sum(one.session_hits for one in told) == 0
    assert sum(one.session_misses for one in told) == 2


async def test_whoever_needs_the_room_has_it(make):
    fleet = await make(1 << 30, kv_cache_bytes=1 << 20)
    wanted = await talk(await make(0))
    assert await talk(fleet, (PROMPT, SECOND)) == wanted[:2]
    assert fleet.decode.tier_snapshot().kept_sessions == 1
    assert fleet.decode.free_bytes == fleet.decode.capacity_bytes, "nobody is sent away for it"
    await fleet.client.generate([*PROMPT, *PROMPT], temperature=0.0, max_tokens=60, ignore_eos=True)
    assert fleet.decode.tier_snapshot().kept_sessions == 0
    assert await talk(fleet, (THIRD,)) == wanted[2:]
    small = await make(400_000)
    assert await talk(small) == wanted
    assert small.decode.tier_snapshot().kept_sessions == 0, "it is larger than all that may be kept"
