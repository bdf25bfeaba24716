"""Sequences in a store: whole or not there, taken over, fenced, expiring, and never mixed with others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvsluice.errors import CorruptFrame, Fenced, StoreUnavailable
from kvsluice.kvstore.continuation import ContinuedChoice
from kvsluice.kvstore.frame import DType, Kind, TensorSlice, decode_frame, encode_frame
from kvsluice.kvstore.identity import FrameIdent, frame_key, head_key
from kvsluice.kvstore.manifest import ChoiceState, EmittedToken, Manifest, frame_entry
from kvsluice.kvstore.memory import MemoryStore
from kvsluice.kvstore.sequences import Rows, SequenceWriter, claim_sequence, find_sequence, read_frames

TTL_S = 60.0
OLD = FrameIdent(request_id="req-1", epoch=3, tenant="acme", model_fingerprint="ab" * 16, recipe_fingerprint="cd")
NEW = replace(OLD, epoch=4)
PROMPT = (5, 6, 7)
EMITTED = (ContinuedChoice((1, 2, 3)), ContinuedChoice((4, 5)))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> MemoryStore:
    return MemoryStore(1 << 20, clock)


def frame(ident: FrameIdent, byte: int, tokens: tuple[int, int] = (0, 3)) -> bytes:
    rows = TensorSlice(0, Kind.TAIL, "k", DType.UINT8, (4,), 0, 4, 0, 1, memoryview(bytes([byte] * 4)))
    return encode_frame(ident, tokens, [rows])


def manifest(ident: FrameIdent, frames: list[bytes]) -> Manifest:
    entries = [frame_entry(frame_key(ident, i), decode_frame(data)) for i, data in enumerate(frames)]
    choices = tuple(ChoiceState((EmittedToken(choice.token_ids[0]),)) for choice in EMITTED)
    return Manifest(ident, "{}", PROMPT, choices, 7, tuple(entries))


def rows(ident: FrameIdent, choice: int, begin: int, end: int) -> Rows:
    return Rows(choice, (begin, end), [frame(ident, choice), frame(ident, 100 + end)])


async def committed(store: MemoryStore, ident: FrameIdent = OLD) -> SequenceWriter:
    writer, frames = SequenceWriter(store, ident, TTL_S), [frame(ident, i) for i in range(20)]
    for data in frames:
        await writer.put_frame(data)
    await writer.commit(manifest(ident, frames))
    return writer


async def test_what_was_written_is_found(store):
    writer = await committed(store)
    found = await find_sequence(store, NEW)
    assert found is not None and found.continuation is None and found.manifest.ident == OLD
    read = [data async for data in read_frames(store, found.manifest.frames)]
    assert read == [frame(OLD, i) for i in range(20)]
    await writer.extend([rows(OLD, 0, 3, 5), rows(OLD, 1, 3, 4)], EMITTED)
    await writer.extend([rows(OLD, 0, 5, 6)], EMITTED)
    found = await find_sequence(store, NEW)
    assert found is not None and found.continuation is not None
    assert [entry.tokens for entry in found.rows_of(0)] == [(3, 5), (5, 6)]
    assert [entry.tokens for entry in found.rows_of(1)] == [(3, 4)]
    assert found.continuation.choices == EMITTED
    read = [data async for data in read_frames(store, found.rows_of(0)[1].frames)]
    assert read == [frame(OLD, 0), frame(OLD, 106)]
    assert len(await store.scan("kvsluice:continuation:")) == 1, "only the last one is kept"
    assert writer.stored_bytes <= store.used_bytes + 4096


async def test_a_sequence_without_its_manifest_is_not_there(store):
    writer = SequenceWriter(store, OLD, TTL_S)
    await writer.put_frame(frame(OLD, 0))
    assert await find_sequence(store, NEW) is None
    whole = await committed(store)
    await whole.extend([rows(OLD, 0, 3, 5)], EMITTED)
    found = await find_sequence(store, NEW)
    await store.delete(found.manifest_key)
    assert await find_sequence(store, NEW) is None


@pytest.mark.parametrize("field", ["tenant", "model_fingerprint", "recipe_fingerprint", "request_id"])
async def test_another_identity_finds_nothing(store, field):
    await committed(store)
    assert await find_sequence(store, replace(NEW, **{field: "other"})) is None


@pytest.mark.parametrize("kept", [0, 3, 5, 6])
async def test_who_takes_over_goes_on_where_it_wants(store, kept):
    old = await committed(store)
    await old.extend([rows(OLD, 0, 3, 5)], EMITTED)
    await old.extend([rows(OLD, 0, 5, 6), rows(OLD, 1, 3, 6)], EMITTED)
    assert await claim_sequence(store, NEW, TTL_S)
    found = await find_sequence(store, NEW)
    writer = SequenceWriter(store, NEW, TTL_S)
    assert writer.take_over(found, {0: kept, 1: 6}) == []
    assert SequenceWriter(store, NEW, TTL_S).take_over(found, {0: 4}) == [0], "rows that are of use in part"
    end = {0: 3, 3: 3, 5: 5, 6: 6}[kept]
    await writer.extend([rows(NEW, 0, end, end + 1)], EMITTED)
    after = await find_sequence(store, replace(NEW, epoch=9))
    assert after is not None and after.head.epoch == NEW.epoch
    assert after.rows_of(0)[-1].tokens == (end, end + 1)
    assert [e.tokens[1] for e in after.rows_of(0)[:-1]] == [e for e in (5, 6) if e <= kept]
    everything = [e for entry in after.rows_of(0) + after.rows_of(1) for e in entry.frames]
    assert len([data async for data in read_frames(store, everything)]) == len(everything)


async def test_an_earlier_owner_is_fenced(store):
    old = await committed(store)
    assert await claim_sequence(store, NEW, TTL_S)
    for late in (
        old.extend([rows(OLD, 0, 3, 5)], EMITTED),
        old.renew(),
        SequenceWriter(store, OLD, TTL_S).commit(manifest(OLD, [frame(OLD, i) for i in range(20)])),
        claim_sequence(store, OLD, TTL_S),
    ):
        with pytest.raises(Fenced):
            await late
    found = await find_sequence(store, NEW)
    assert found.head.epoch == NEW.epoch and found.continuation is None


async def test_what_is_claimed_no_longer_changes(store):
    old = await committed(store)
    await old.extend([rows(OLD, 0, 3, 5)], EMITTED)
    assert await claim_sequence(store, NEW, TTL_S)
    with pytest.raises(Fenced):
        await old.extend([rows(OLD, 0, 5, 6)], EMITTED)
    found = await find_sequence(store, NEW)
    assert [entry.tokens for entry in found.rows_of(0)] == [(3, 5)]
    assert not await claim_sequence(store, replace(NEW, tenant="other"), TTL_S)


async def test_a_new_attempt_replaces_an_old_one(store):
    await committed(store)
    await committed(store, NEW)
    found = await find_sequence(store, replace(NEW, epoch=9))
    assert found.manifest.ident == NEW


async def test_everything_expires_unless_it_is_renewed(store, clock):
    writer = await committed(store)
    await writer.extend([rows(OLD, 0, 3, 5)], EMITTED)
    for _ in range(5):
        clock.now += TTL_S * 0.9
        await writer.renew()
    found = await find_sequence(store, NEW)
    assert len([1 async for _ in read_frames(store, found.manifest.frames)]) == 20
    clock.now += TTL_S * 1.01
    assert await find_sequence(store, NEW) is None
    assert await store.scan("kvsluice:frame:"), "frames outlive what names them"
    clock.now += TTL_S
    assert await store.scan("") == []


async def test_a_store_that_was_emptied_keeps_nothing_any_longer(store):
    """What comes behind would name a manifest that is not there."""
    writer = await committed(store)
    store._values.clear()
    store._heads.clear()
    store.used_bytes = 0
    for going_on in (writer.renew, lambda: writer.extend([rows(OLD, 0, 3, 5)], EMITTED)):
        with pytest.raises(StoreUnavailable, match="gone"):
            await going_on()
    assert await find_sequence(store, NEW) is None


async def test_a_head_that_is_gone_comes_back_where_it_leads_somewhere(store, clock):
    writer = await committed(store)
    store.used_bytes -= store._heads.pop(head_key(OLD)).charged_bytes
    await writer.extend([], EMITTED)
    assert await store.read_head(head_key(OLD)) is not None
    clock.now += TTL_S * 1.01
    with pytest.raises(StoreUnavailable, match="gone"):
        await writer.extend([], EMITTED)


async def test_deleting_leaves_only_the_head(store):
    writer = await committed(store)
    await writer.extend([rows(OLD, 0, 3, 5)], EMITTED)
    await writer.delete()
    assert await store.scan("") == [head_key(OLD)]
    assert await find_sequence(store, NEW) is None


async def test_missing_and_changed_frames_are_corrupt(store):
    await committed(store)
    found = await find_sequence(store, NEW)
    entries = found.manifest.frames
    for broken in (4, 19):
        await store.delete(entries[broken].key)
        seen = []
        with pytest.raises(CorruptFrame, match="missing"):
            async for data in read_frames(store, entries):
                seen.append(data)
        assert len(seen) == broken
        await store.put(entries[broken].key, frame(OLD, 77), TTL_S)
        with pytest.raises(CorruptFrame, match="hash"):
            async for _ in read_frames(store, entries):
                pass
        assert not await store.exists(entries[broken].key), "what is broken is deleted"
        await store.put(entries[broken].key, frame(OLD, broken), TTL_S)


@pytest.mark.parametrize("part", ["manifest", "continuation"])
async def test_a_corrupt_name_is_deleted_and_nothing_is_found(store, part):
    writer = await committed(store)
    await writer.extend([rows(OLD, 0, 3, 5)], EMITTED)
    (key,) = await store.scan(f"kvsluice:{part}:")
    data = await store.get(key)
    await store.delete(key)
    await store.put(key, data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], TTL_S)
    assert await find_sequence(store, NEW) is None
    assert await store.scan(f"kvsluice:{part}:") == []


class FailingStore(MemoryStore):
    """Fails from the n-th write on."""

    def __init__(self, after: int) -> None:
        super().__init__(1 << 20)
        self.left = after

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise StoreUnavailable("the store is gone")

    async def put(self, *args) -> None:
        self._count()
        await super().put(*args)

    async def compare_and_set_head(self, *args):
        self._count()
        return await super().compare_and_set_head(*args)


@pytest.mark.parametrize("after", range(31))
async def test_an_owner_that_dies_anywhere_leaves_a_whole_sequence_or_none(after):
    store = FailingStore(after)
    ended = False
    try:
        writer = await committed(store)
        await writer.extend([rows(OLD, 0, 3, 5)], EMITTED)
        await writer.extend([rows(OLD, 0, 5, 6)], EMITTED)
        ended = True
    except StoreUnavailable:
        pass
    assert ended == (after >= 30), "as many writes as it takes"
    found = await find_sequence(store, NEW)
    if found is None:
        assert after < 22
        return
    entries = [*found.manifest.frames, *(e for entry in found.rows_of(0) for e in entry.frames)]
    assert len([data async for data in read_frames(store, entries)]) == len(entries)
