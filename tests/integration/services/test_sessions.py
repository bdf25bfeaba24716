"""Real engines: a conversation goes on by its id, and says what it would say if nothing had been lost in between."""

from __future__ import annotations

import asyncio

import grpc.aio
import pytest

from kvsluice.errors import (
    DuplicateRequest,
    Fenced,
    InvalidRequest,
    RequestCancelled,
    SessionMismatch,
    StoreUnavailable,
)
from kvsluice.kvstore.identity import FRAMES
from kvsluice.kvstore.memory import MemoryStore
from kvsluice.protos import worker_pb2 as wpb
from kvsluice.protos import worker_pb2_grpc

PROMPT = [(37 * i) % 250 + 3 for i in range(300)]
SECOND = [(11 * i) % 250 + 3 for i in range(90)]
THIRD = [7, 8, 9]
GREEDY = {"temperature": 0.0}
SEEDED = {"temperature": 0.9, "top_p": 0.95, "seed": 11, "presence_penalty": 0.5}
LONG = {"max_tokens": 40, "ignore_eos": True}
NOT_KEPT = {"store_keep_every": 4, "session_cache_bytes": 0}


class SharedStore(MemoryStore):
    """One that outlives the workers that use it. While it is `broken`, nothing works."""

    broken = False
    read_frames = 0

    async def get(self, key):
        self.read_frames += key.startswith(FRAMES)
        return await super().get(key)

    async def close(self):
        return None

    async def put(self, key, value, ttl_s):
        if self.broken:
            raise StoreUnavailable("the store is broken")
        await super().put(key, value, ttl_s)


@pytest.fixture
async def store():
    return SharedStore(1 << 30)


async def talk(fleet, turns=(PROMPT, SECOND, THIRD), session="s", **options):
    """The completions of a conversation."""
    return [await fleet.client.generate(turn, session_id=session, **(LONG | options)) for turn in turns]


async def tiers_of(fleet) -> wpb.TierSnapshot:
    """What the first decode worker says of its memory."""
    async with grpc.aio.insecure_channel(fleet.decode_address) as channel:
        return (await worker_pb2_grpc.DecodeWorkerStub(channel).Info(wpb.InfoRequest())).tiers


@pytest.mark.parametrize("recipe", ["exact", "sluice-full", "kivi", "streaming", "recalling"])
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.usefixtures("recalling")
async def test_turns_are_the_same_wherever_they_run(make_real_fleet, store, recipe, sampling):
    fleet = await make_real_fleet(store=store, store_keep_every=4)
    options = {"recipe": recipe, **sampling}
    whole = await talk(fleet, **options)
    assert [done.session.turn for done in whole] == [1, 2, 3]
    assert whole[0].usage.cached_tokens == 0
    for done, turn in zip(whole[1:], (SECOND, THIRD), strict=True):
        assert done.usage.prompt_tokens == done.session.tokens - 40
        assert done.usage.cached_tokens >= done.usage.prompt_tokens - len(turn) - 2 * 4 - 1, "only what is new is run"
        assert done.durability.recomputed_prompt_tokens == 0
    # another worker, and one that finds nothing in the store
    first, second = await talk(fleet, (PROMPT, SECOND), session="t", **options)
    assert (first.token_ids, second.token_ids) == (whole[0].token_ids, whole[1].token_ids)
    await fleet.add_decode("other", store)
    await fleet.lose("worker-0")
    for name in await store.scan("kvsluice:frame:"):
        await store.delete(name)
    third = await fleet.client.generate(THIRD, session_id="t", **LONG, **options)
    assert third.token_ids == whole[2].token_ids
    assert third.usage.cached_tokens == 0
    await fleet.until_idle()
    store.check_integrity()


async def test_a_conversation_stays_where_its_cache_is(make_real_fleet, store):
    fleet = await make_real_fleet(store=store, store_keep_every=4)
    await fleet.add_decode("other", store)
    whole = [done.token_ids for done in await talk(fleet, **SEEDED)]
    tasks = [asyncio.create_task(talk(fleet, session=name, **SEEDED)) for name in "tuv"]
    assert [[done.token_ids for done in await task] for task in tasks] == [whole] * 3
    assert store.read_frames == 0, "the worker of the last turn has them in memory"
    await fleet.until_idle()


@pytest.mark.parametrize("room", [0, 20_000])
async def test_what_is_not_in_memory_is_read_from_the_store(make_real_fleet, store, room):
    fleet = await make_real_fleet(store=store, store_cache_bytes=room, **NOT_KEPT)
    plain = await make_real_fleet(store=SharedStore(1 << 30), **NOT_KEPT)
    wanted = [done.token_ids for done in await talk(plain, **SEEDED)]
    tiers = await tiers_of(plain)
    assert tiers.store_cache_hits > 0 == tiers.store_cache_misses
    assert [done.token_ids for done in await talk(fleet, **SEEDED)] == wanted
    assert store.read_frames > 0


async def test_exact_says_what_the_whole_conversation_as_one_prompt_says(make_real_fleet, store):
    fleet = await make_real_fleet(store=store)
    one, two, _ = await talk(fleet, **GREEDY)
    whole = await fleet.client.generate([*PROMPT, *one.token_ids, *SECOND], **LONG, **GREEDY)
    assert two.token_ids == whole.token_ids


async def test_a_lost_worker_does_not_end_a_turn(make_real_fleet, store):
    fleet = await make_real_fleet(store=store, store_keep_every=4)
    whole = await talk(fleet, recipe="sluice-full", **SEEDED)
    await talk(fleet, (PROMPT,), session="t", recipe="sluice-full", **SEEDED)
    await fleet.add_decode("other", store)
    stream = fleet.client.stream(SECOND, session_id="t", **LONG, **SEEDED)
    came, lost = 0, False
    async for chunk in stream:
        came += len(chunk.token_ids)
        if came >= 9 and not lost:
            lost = True
            await fleet.lose(fleet.busy())
    assert stream.completion.token_ids == whole[1].token_ids
    assert stream.completion.session.turn == 2
    third = await fleet.client.generate(THIRD, session_id="t", **LONG, **SEEDED)
    assert third.token_ids == whole[2].token_ids


async def test_a_turn_that_fails_leaves_the_session_as_it_was(make_real_fleet, store):
    fleet = await make_real_fleet(store=store, store_keep_every=4)
    whole = await talk(fleet, recipe="sluice-full", **GREEDY)
    await talk(fleet, (PROMPT,), session="t", recipe="sluice-full", **GREEDY)
    stream = fleet.client.stream([5] * 50, session_id="t", max_tokens=2000, ignore_eos=True, **GREEDY)
    async for _ in stream:
        stream.cancel()
        break
    with pytest.raises(RequestCancelled):
        async for _ in stream:
            pass
    await fleet.until_idle()
    assert [one.turns for one in await fleet.client.sessions()] == [1, 3]
    second = await fleet.client.generate(SECOND, session_id="t", session_turn=2, **LONG, **GREEDY)
    assert second.token_ids == whole[1].token_ids
    assert second.usage.cached_tokens > len(PROMPT), "what the first turn has kept is still of use"


async def test_what_was_not_delivered_is_not_part_of_it(make_real_fleet, store):
    fleet = await make_real_fleet(store=store)
    free = await fleet.client.generate(PROMPT, **LONG, **GREEDY)
    stop = free.text[10:12]
    stopped = await fleet.client.generate(PROMPT, session_id="s", stop=stop, **LONG, **GREEDY)
    assert stopped.text == free.text[: free.text.index(stop)]
    ids = [ord(c) for c in stopped.text]
    assert stopped.session.tokens == len(PROMPT) + len(ids)
    second = await fleet.client.generate(SECOND, session_id="s", **LONG, **GREEDY)
    whole = await fleet.client.generate([*PROMPT, *ids, *SECOND], **LONG, **GREEDY)
    assert second.token_ids == whole.token_ids
    # a token that ends the answer gives no text
    end = free.token_ids[5]
    ended = await fleet.client.generate(PROMPT, session_id="e", stop_token_ids=[end], **LONG, **GREEDY)
    assert ended.session.tokens == len(PROMPT) + len(ended.token_ids) - 1


async def test_messages_are_joined_as_the_template_says(make_real_fleet, store):
    fleet = await make_real_fleet(store=store)
    ask = [{"role": "user", "content": "What is this about? " * 12}]
    more = [{"role": "user", "content": "and then?"}]
    one = await fleet.client.generate(ask, session_id="c", **LONG, **GREEDY)
    two = await fleet.client.generate(more, session_id="c", **LONG, **GREEDY)
    tokenizer = fleet.gateway.intake.tokenizer
    joined = [*tokenizer.apply_chat_template(ask), *one.token_ids, *tokenizer.continue_chat(more)]
    assert two.token_ids == (await fleet.client.generate(joined, **LONG, **GREEDY)).token_ids
    with pytest.raises(SessionMismatch, match="begun with messages"):
        await fleet.client.generate("plain text", session_id="c", max_tokens=2)


async def test_what_does_not_fit_is_refused_before_any_work(make_real_fleet, store):
    fleet = await make_real_fleet(store=store)
    await talk(fleet, (PROMPT,), recipe="kivi", **GREEDY)
    refused = [
        ({"recipe": "exact"}, SessionMismatch, "kivi"),
        ({"session_turn": 1}, SessionMismatch, "has 1 turns"),
        ({"session_turn": 3}, SessionMismatch, "has 1 turns"),
        ({"session_id": "gone", "session_turn": 2}, SessionMismatch, "expired"),
        ({"session_turn": 0}, InvalidRequest, "at least 1"),
        ({"n": 2}, InvalidRequest, "sampling.n"),
        ({"durability": "none"}, InvalidRequest, "durability"),
        ({"session_id": "with space"}, InvalidRequest, "session_id"),
        ({"max_tokens": 4000}, InvalidRequest, "max_tokens"),
    ]
    for options, error, match in refused:
        with pytest.raises(error, match=match):
            await fleet.client.generate(SECOND, **({"session_id": "s", "max_tokens": 5} | options))
    fleet.gateway.pool.model = None
    found = await fleet.gateway.sessions._book.find("", "s")
    other = type(found.session)(**(vars(found.session) | {"model_fingerprint": "0" * 32, "num_turns": 2}))
    await fleet.gateway.sessions._book.write(other, found.head)
    with pytest.raises(SessionMismatch, match="another model"):
        await fleet.client.generate(SECOND, session_id="s", max_tokens=5)
    await fleet.until_idle()


async def test_one_turn_at_a_time(make_real_fleet, store):
    fleet = await make_real_fleet(store=store)
    stream = fleet.client.stream(PROMPT, session_id="s", max_tokens=400, ignore_eos=True, **GREEDY)
    await anext(stream)
    with pytest.raises(DuplicateRequest, match="session_id"):
        await fleet.client.generate(SECOND, session_id="s", max_tokens=5)
    with pytest.raises(DuplicateRequest, match="session_id"):
        await fleet.client.delete_session("s")
    # another gateway ends a turn meanwhile: of the two, one counts
    async for _ in stream:
        found = await fleet.gateway.sessions._book.find("", "s")
        if found.head is None:
            await fleet.gateway.sessions._book.write(session_of("s"), None)
            break
    with pytest.raises(Fenced, match="another turn"):
        async for _ in stream:
            pass
    await fleet.until_idle()


def session_of(session_id):
    from kvsluice.kvstore.session import Session

    return Session(session_id, "", "f" * 32, "exact", "{}", False, 5, 1, (1, 2), (3,), 1.0, 2.0)


async def test_sessions_are_listed_and_deleted(make_real_fleet, store):
    fleet = await make_real_fleet(store=store)
    for name in ("a", "b"):
        await talk(fleet, (PROMPT, THIRD), session=name, **GREEDY)
    listed = await fleet.client.sessions()
    assert [(one.session_id, one.turns, one.recipe) for one in listed] == [("b", 2, "exact"), ("a", 2, "exact")]
    assert listed[0].tokens == len(PROMPT) + len(THIRD) + 80
    assert listed[0].expires_unix_s == pytest.approx(listed[0].used_unix_s + fleet.config.session_ttl_s)
    assert await fleet.client.delete_session("a")
    assert not await fleet.client.delete_session("a")
    assert [one.session_id for one in await fleet.client.sessions()] == ["b"]
    assert await fleet.client.delete_session("b")
    left = [name for name in await store.scan("") if not name.startswith(("kvsluice:head:", "kvsluice:session:"))]
    assert not left, "only heads are left, which expire"
    again = await fleet.client.generate(SECOND, session_id="a", **LONG, **GREEDY)
    assert again.session.turn == 1


async def test_a_store_that_breaks_in_the_first_turn_says_so(make_real_fleet, store):
    fleet = await make_real_fleet(store=store)
    store.broken = True
    with pytest.raises(StoreUnavailable):
        await talk(fleet, (PROMPT,), **GREEDY)
    store.broken = False
    assert await fleet.client.sessions() == []
    (done,) = await talk(fleet, (PROMPT,), **GREEDY)
    assert done.session.turn == 1
    # in a later one: the session is what it was
    async with asyncio.timeout(30):
        store.broken = True
        with pytest.raises(StoreUnavailable):
            await talk(fleet, (SECOND,), **GREEDY)
        store.broken = False
        (second,) = await talk(fleet, (SECOND,), **GREEDY)
    assert second.session.turn == 2
