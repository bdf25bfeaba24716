"""What only the memory store promises: exact accounts and a stated bound."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from kvsluice.errors import StoreUnavailable
from kvsluice.kvstore.identity import FrameIdent, frame_key, head_key, manifest_key
from kvsluice.kvstore.memory import MemoryStore
from kvsluice.kvstore.store import Head, HeadWrite

IDENT = FrameIdent(request_id="r", epoch=1, tenant="t", model_fingerprint="m", recipe_fingerprint="c")
KEY = frame_key(IDENT, 0)


async def test_keys_and_contents_are_charged():
    store = MemoryStore(capacity_bytes=len(KEY) + 10)
    with pytest.raises(StoreUnavailable, match="full"):
        await store.put(KEY, bytes(11), 1)
    await store.put(KEY, bytes(10), 1)
    assert store.used_bytes == len(KEY) + 10
    with pytest.raises(StoreUnavailable, match="full"):
        await store.compare_and_set_head(head_key(IDENT), None, Head(1, manifest_key(IDENT)), 1)
    await store.delete(KEY)
    assert store.used_bytes == 0


async def test_a_head_is_charged_once_however_often_it_moves():
    name, manifests = head_key(IDENT), [manifest_key(IDENT), manifest_key(IDENT) + "x"]
    store = MemoryStore(capacity_bytes=len(name) + len(manifests[1]))
    heads = [None] + [Head(epoch, manifests[epoch % 2]) for epoch in range(1, 6)]
    for expected, new in pairwise(heads):
        assert await store.compare_and_set_head(name, expected, new, 1) is HeadWrite.WRITTEN
    assert store.used_bytes == len(name) + len(heads[-1].manifest)


async def test_a_value_is_the_store_s_own_copy():
    store = MemoryStore(1024)
    value = bytearray(b"abc")
    await store.put(KEY, value, 1)
    value[0] = 0
    assert await store.get(KEY) == b"abc"


async def test_accounts_hold_through_any_history():
    rng = random.Random(0)
    now = [0.0]
    store = MemoryStore(capacity_bytes=2000, clock=lambda: now[0])
    refused = 0
    for step in range(2000):
        key = frame_key(IDENT, rng.randrange(20))
        try:
            match rng.randrange(5):
                case 0 | 1:
                    await store.delete(key)
                    await store.put(key, bytes(rng.randrange(300)), rng.uniform(1, 20))
                case 2:
                    await store.renew(key, rng.uniform(1, 20))
                case 3:
                    head = await store.read_head(head_key(IDENT))
                    new = Head(step, manifest_key(IDENT))
                    await store.compare_and_set_head(head_key(IDENT), head, new, rng.uniform(1, 20))
                case _:
                    now[0] += rng.uniform(0, 5)
        except StoreUnavailable:
            refused += 1
        store.check_integrity()
    assert refused > 0, "the history never filled the store"
    now[0] += 1000
    assert await store.scan("") == []
    assert store.used_bytes == 0


@pytest.mark.parametrize("capacity_bytes", [0, -1])
def test_a_store_has_room(capacity_bytes):
    with pytest.raises(ValueError, match="capacity_bytes"):
        MemoryStore(capacity_bytes)


async def test_check_integrity_sees_a_broken_account():
    store = MemoryStore(1024)
    await store.put(KEY, b"v", 1)
    store.used_bytes += 1
    with pytest.raises(AssertionError):
        store.check_integrity()
