"""What `kvstore/store.py` promises of every store."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from kvsluice.errors import InternalError, StoreUnavailable
from kvsluice.kvstore.identity import FrameIdent, frame_key, head_key, manifest_key
from kvsluice.kvstore.store import Head, HeadWrite

IDENT = FrameIdent(request_id="r", epoch=1, tenant="t", model_fingerprint="m", recipe_fingerprint="c")
KEY, OTHER = frame_key(IDENT, 0), frame_key(IDENT, 1)
HEAD = head_key(IDENT)
FIRST = Head(1, manifest_key(IDENT))
SECOND = Head(2, manifest_key(replace(IDENT, epoch=2)))
THIRD = Head(3, manifest_key(replace(IDENT, epoch=3)))


async def test_a_value_comes_back_whole(store):
    value = bytes(range(256)) * 64
    await store.put(KEY, value, 60)
    assert await store.get(KEY) == value
    assert await store.exists(KEY)
    assert not await store.exists(OTHER)


async def test_absence_is_none_or_false(store):
    assert await store.get(KEY) is None
    assert await store.exists(KEY) is False
    assert await store.renew(KEY, 60) is False
    assert await store.delete(KEY) is False
    assert await store.read_head(HEAD) is None
    assert await store.scan("") == []


async def test_an_empty_value_is_a_value(store):
    await store.put(KEY, b"", 60)
    assert await store.get(KEY) == b""


async def test_a_value_expires_and_its_key_is_free_again(rig):
    await rig.store.put(KEY, b"old", 10)
    rig.advance(9)
    assert await rig.store.get(KEY) == b"old"
    rig.advance(2)
    assert await rig.store.get(KEY) is None
    assert await rig.store.exists(KEY) is False
    assert await rig.store.renew(KEY, 60) is False
    assert await rig.store.delete(KEY) is False
    await rig.store.put(KEY, b"new", 10)
    assert await rig.store.get(KEY) == b"new"


async def test_renewing_prolongs_and_never_shortens(rig):
    await rig.store.put(KEY, b"v", 10)
    assert await rig.store.renew(KEY, 30)
    assert await rig.store.renew(KEY, 1)
    rig.advance(20)
    assert await rig.store.exists(KEY)
    rig.advance(20)
    assert not await rig.store.exists(KEY)


async def test_a_write_may_be_repeated_and_renews(rig):
    await rig.store.put(KEY, b"v", 10)
    rig.advance(5)
    await rig.store.put(KEY, b"v", 10)
    rig.advance(8)
    assert await rig.store.get(KEY) == b"v"


async def test_a_living_value_never_changes(store):
    await store.put(KEY, b"v", 60)
    with pytest.raises(InternalError):
        await store.put(KEY, b"w", 60)
    assert await store.get(KEY) == b"v"
    assert await store.delete(KEY)
    await store.put(KEY, b"w", 60)
    assert await store.get(KEY) == b"w"


async def test_a_full_store_refuses_and_keeps_what_it_has(rig):
    store, value = rig.store, bytes(rig.value_bytes)
    rig.limit()
    keys = rig.together([frame_key(IDENT, index) for index in range(200)])
    stored = []
    with pytest.raises(StoreUnavailable):
        for key in keys:
            await store.put(key, value, 60)
            stored.append(key)
    assert 5 < len(stored) < 17
    assert [await store.exists(key) for key in stored] == [True] * len(stored)
    assert await store.get(stored[-1]) == value
    await store.delete(stored[0])
    await store.put(keys[-1], value[: rig.value_bytes // 2], 60)


async def test_what_has_expired_makes_room(rig):
    rig.limit()
    keys = rig.together([frame_key(IDENT, index) for index in range(200)])
    for round_number in range(3):
        for key in keys[10 * round_number :][:10]:
            await rig.store.put(key, bytes(rig.value_bytes), 10)
        rig.advance(11)
    assert await rig.store.scan("") == []


async def test_a_value_that_never_fits_is_refused_like_any_other(rig):
    with pytest.raises(StoreUnavailable):
        await rig.store.put(KEY, bytes(6 * 1024 * 1024), 60)
    assert await rig.store.get(KEY) is None


@pytest.mark.parametrize("ttl_s", [0, -1, float("nan"), float("inf")])
async def test_nothing_is_stored_without_an_end(store, ttl_s):
    await store.put(KEY, b"v", 60)
    for write in (
        store.put(OTHER, b"v", ttl_s),
        store.renew(KEY, ttl_s),
        store.compare_and_set_head(HEAD, None, FIRST, ttl_s),
    ):
        with pytest.raises(ValueError, match="ttl_s"):
            await write
    assert await store.scan("") == [KEY]


async def test_a_head_moves_from_what_is_expected(store):
    assert await store.compare_and_set_head(HEAD, None, FIRST, 60) is HeadWrite.WRITTEN
    assert await store.read_head(HEAD) == FIRST
    assert await store.compare_and_set_head(HEAD, FIRST, SECOND, 60) is HeadWrite.WRITTEN
    assert await store.read_head(HEAD) == SECOND


async def test_a_head_does_not_move_from_anything_else(store):
    assert await store.compare_and_set_head(HEAD, FIRST, SECOND, 60) is HeadWrite.CHANGED
    assert await store.read_head(HEAD) is None
    await store.compare_and_set_head(HEAD, None, FIRST, 60)
    assert await store.compare_and_set_head(HEAD, None, SECOND, 60) is HeadWrite.CHANGED
    assert await store.compare_and_set_head(HEAD, SECOND, THIRD, 60) is HeadWrite.CHANGED
    assert await store.read_head(HEAD) == FIRST


async def test_a_replaced_owner_is_fenced(store):
    await store.compare_and_set_head(HEAD, None, SECOND, 60)
    for expected in (None, FIRST, SECOND):
        assert await store.compare_and_set_head(HEAD, expected, FIRST, 60) is HeadWrite.FENCED
    assert await store.read_head(HEAD) == SECOND


async def test_an_owner_moves_its_head_within_its_epoch(store):
    next_turn = Head(1, manifest_key(replace(IDENT, request_id="turn-2")))
    await store.compare_and_set_head(HEAD, None, FIRST, 60)
    assert await store.compare_and_set_head(HEAD, FIRST, next_turn, 60) is HeadWrite.WRITTEN
    assert await store.read_head(HEAD) == next_turn


async def test_a_head_s_write_may_be_repeated_and_renews(rig):
    await rig.store.compare_and_set_head(HEAD, None, FIRST, 10)
    rig.advance(5)
    assert await rig.store.compare_and_set_head(HEAD, None, FIRST, 10) is HeadWrite.WRITTEN
    rig.advance(8)
    assert await rig.store.read_head(HEAD) == FIRST


async def test_an_expired_head_is_an_absent_one(rig):
    await rig.store.compare_and_set_head(HEAD, None, SECOND, 10)
    rig.advance(11)
    assert await rig.store.read_head(HEAD) is None
    assert await rig.store.scan("") == []
    assert await rig.store.compare_and_set_head(HEAD, None, FIRST, 10) is HeadWrite.WRITTEN


async def test_one_of_many_rivals_wins(store):
    rivals = [Head(5, manifest_key(replace(IDENT, epoch=5, request_id=f"r{i}"))) for i in range(8)]
    writes = await asyncio.gather(*(store.compare_and_set_head(HEAD, None, head, 60) for head in rivals))
    assert sorted(write.name for write in writes) == ["CHANGED"] * 7 + ["WRITTEN"]
    assert await store.read_head(HEAD) == rivals[writes.index(HeadWrite.WRITTEN)]


async def test_scan_finds_by_prefix(store):
    await store.put(KEY, b"v", 60)
    await store.put(manifest_key(IDENT), b"v", 60)
    await store.compare_and_set_head(HEAD, None, FIRST, 60)
    assert await store.scan("kvsluice:") == sorted([KEY, manifest_key(IDENT), HEAD])
    assert await store.scan("kvsluice:frame:") == [KEY]
    assert await store.scan("kvsluice:f*") == []


async def test_a_closed_store_is_unavailable(store):
    await store.put(KEY, b"v", 60)
    await store.close()
    await store.close()
    for call in (
        store.put(KEY, b"v", 60),
        store.get(KEY),
        store.exists(KEY),
        store.renew(KEY, 60),
        store.delete(KEY),
        store.read_head(HEAD),
        store.compare_and_set_head(HEAD, None, FIRST, 60),
        store.scan(""),
    ):
        with pytest.raises(StoreUnavailable):
            await call
