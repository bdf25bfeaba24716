"""Records of sessions: what is encoded comes back, nothing else is taken for one, and one of two turns counts."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsluice.errors import CorruptFrame, Fenced
from kvsluice.kvstore.envelope import Fault, seal
from kvsluice.kvstore.identity import TenantId, session_key
from kvsluice.kvstore.manifest import ManifestLimits
from kvsluice.kvstore.memory import MemoryStore
from kvsluice.kvstore.session import MAGIC, Session, SessionBook, decode_session, encode_session
from kvsluice.protos import frame_pb2

TENANT = TenantId("acme")
SESSION = Session(
    session_id="tea",
    tenant=TENANT,
    model_fingerprint="ab" * 16,
    recipe_name="balanced",
    recipe_json='{"name": "exact"}',
    is_chat=True,
    epoch=7,
    num_turns=2,
    prompt_ids=(5, 0, 50_000),
    history_ids=(9, 2**32 - 1),
    begun_unix_s=1.5,
    used_unix_s=2.25,
)
TTL_S = 100.0


def message_of(session: Session) -> frame_pb2.Session:
    data = encode_session(session)
    (length,) = struct.unpack_from("<I", data, 8)
    return frame_pb2.Session.FromString(data[12 : 12 + length])


def refused(data: bytes, **limits: int) -> str:
    with pytest.raises(CorruptFrame) as raised:
        decode_session(data, ManifestLimits(**limits))
    return raised.value.message.removeprefix("corrupt session: ")


U32 = st.lists(st.integers(0, 2**32 - 1), max_size=5).map(tuple)


@settings(max_examples=50)
@given(prompt=U32.filter(len), history=U32, is_chat=st.booleans(), turns=st.integers(1, 2**32 - 1))
def test_what_is_encoded_comes_back(prompt, history, is_chat, turns):
    session = replace(SESSION, prompt_ids=prompt, history_ids=history, is_chat=is_chat, num_turns=turns)
    assert decode_session(encode_session(session)) == session
    assert session.num_tokens == len(prompt) + len(history)


def test_no_other_bytes_are_taken_for_one():
    whole = encode_session(SESSION)
    for i in range(len(whole)):
        flipped = bytearray(whole)
        flipped[i] ^= 1 << (i % 8)
        with pytest.raises(CorruptFrame):
            decode_session(bytes(flipped))
        with pytest.raises(CorruptFrame):
            decode_session(whole[:i])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"format_version": 99}, Fault.VERSION),
        ({"session_id": ""}, Fault.IDENTITY),
        ({"model_fingerprint": "x" * 5000}, Fault.IDENTITY),
        ({"recipe_json": "x" * 200_000}, Fault.RECIPE),
        ({"prompt_ids": []}, Fault.PROMPT),
        ({"num_turns": 0}, Fault.EMITTED),
    ],
)
def test_a_sound_envelope_around_what_is_none_is_refused(change, fault):
    message = message_of(SESSION)
    for name, value in change.items():
        message.ClearField(name)
        if isinstance(value, list):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    assert refused(seal(MAGIC, message.SerializeToString())) == fault.value


def test_lengths_are_bounded():
    data = encode_session(SESSION)
    assert refused(data, max_prompt_ids=2) == Fault.PROMPT.value
    assert refused(data, max_emitted=1) == Fault.EMITTED.value


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock) -> MemoryStore:
    return MemoryStore(1 << 20, clock)


@pytest.fixture
def book(store) -> SessionBook:
    return SessionBook(store, TTL_S)


async def test_of_two_turns_at_once_one_counts(book, store):
    first = replace(SESSION, num_turns=1, epoch=5)
    await book.write(first, None)
    head = (await book.find(TENANT, "tea")).head
    one, other = replace(SESSION, epoch=7), replace(SESSION, epoch=6, history_ids=(1,))
    await book.write(one, head)
    with pytest.raises(Fenced):
        await book.write(other, head)
    assert (await book.find(TENANT, "tea")).session == one
    records = await store.scan("kvsluice:record:")
    assert len(records) == 1, "what was replaced, and what did not count, is gone"


async def test_a_session_that_expired_while_its_turn_ran_is_there_again(book, clock):
    await book.write(replace(SESSION, num_turns=1, epoch=5), None)
    head = (await book.find(TENANT, "tea")).head
    clock.now += TTL_S + 1
    assert (await book.find(TENANT, "tea")).session is None
    await book.write(SESSION, head)
    assert (await book.find(TENANT, "tea")).session == SESSION


async def test_a_turn_prolongs_a_session_and_nothing_else_does(book, clock):
    await book.write(SESSION, None)
    clock.now += TTL_S - 1
    await book.find(TENANT, "tea")
    assert [one.session_id for one in await book.sessions(TENANT)] == ["tea"]
    clock.now += 2
    assert await book.sessions(TENANT) == []


async def test_tenants_do_not_see_each_other(book):
    await book.write(SESSION, None)
    await book.write(replace(SESSION, tenant=TenantId("other"), history_ids=()), None)
    assert await book.sessions(TENANT) == [SESSION]
    assert (await book.delete(TENANT, "tea")) == SESSION
    assert await book.sessions(TENANT) == []
    assert len(await book.sessions(TenantId("other"))) == 1
    assert await book.delete(TENANT, "tea") is None


async def test_a_deleted_session_begins_anew(book):
    await book.write(SESSION, None)
    await book.delete(TENANT, "tea")
    found = await book.find(TENANT, "tea")
    assert found.session is None and found.head is not None
    again = replace(SESSION, num_turns=1, epoch=found.head.epoch + 1)
    await book.write(again, found.head)
    assert (await book.find(TENANT, "tea")).session == again


async def test_a_broken_record_is_deleted_and_the_others_are_listed(book, store):
    await book.write(SESSION, None)
    await book.write(replace(SESSION, session_id="coffee"), None)
    head = await store.read_head(session_key(TENANT, "tea"))
    await store.delete(head.manifest)
    await store.put(head.manifest, b"garbled", TTL_S)
    assert [one.session_id for one in await book.sessions(TENANT)] == ["coffee"]
    assert (await book.find(TENANT, "tea")).session is None

    await store.put(head.manifest, b"garbled", TTL_S)
    with pytest.raises(CorruptFrame):
        await book.find(TENANT, "tea")
    assert (await book.find(TENANT, "tea")).session is None
