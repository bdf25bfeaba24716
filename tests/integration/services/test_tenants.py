"""Nothing of one tenant is found, continued, ended or counted by another."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from kvsluice.client import AsyncClient
from kvsluice.errors import (
    DuplicateRequest,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    RequestCancelled,
    Unauthenticated,
)
from kvsluice.kvstore.identity import FRAMES
from kvsluice.kvstore.memory import MemoryStore
from kvsluice.services.worker import WorkerIdentity

PROMPT = [(37 * i) % 250 + 3 for i in range(120)]
KEYS = {name: f"the-key-of-{name}-0123456789" for name in ("alice", "bob", "chief", "scraper")}
ROLES = {"chief": "admin", "scraper": "monitor"}


@pytest.fixture
def keys_file(tmp_path):
    file = tmp_path / "keys.yaml"
    lines = [
        f"- {{tenant: {name}, sha256: {hashlib.sha256(key.encode()).hexdigest()}, role: {ROLES.get(name, 'client')}}}"
        for name, key in KEYS.items()
    ]
    file.write_text("keys:\n" + "\n".join(lines))
    return str(file)


def add_limits(keys_file, of_tenant):
    Path(keys_file).write_text(f"{Path(keys_file).read_text()}\ntenants:\n  {of_tenant}\n")


@pytest.fixture
async def as_tenant():
    clients = []

    def connect(fleet, name):
        clients.append(AsyncClient(fleet.client._address, timeout_s=60.0, api_key=KEYS[name]))
        return clients[-1]

    yield connect
    for client in clients:
        await client.close()


async def test_request_ids_and_cancel_are_a_tenants_own(make_fleet, keys_file, as_tenant, until):
    fleet = await make_fleet(api_keys_file=keys_file)
    alice, bob = (as_tenant(fleet, name) for name in ("alice", "bob"))
    gate = asyncio.Event()
    fleet.script.gate = gate.wait
    running = {
        name: asyncio.create_task(client.generate("abc", request_id="same"))
        for name, client in (("alice", alice), ("bob", bob))
    }
    await until(lambda: len(fleet.script.prefills) == 2)
    for told in (fleet.script.opens, fleet.script.prefills):
        assert {one.tenant for one in told} == {"alice", "bob"}
        assert len({one.request_id for one in told}) == 2
    with pytest.raises(DuplicateRequest):
        await alice.generate("abc", request_id="same")
    assert not await as_tenant(fleet, "chief").cancel("same")
    assert not await bob.cancel("alice: same")
    assert await bob.cancel("same")
    with pytest.raises(RequestCancelled):
        await running["bob"]
    gate.set()
    done = await running["alice"]
    assert (done.text, done.request_id) == ("Hello, worl", "same")


async def test_what_each_role_is_refused(make_fleet, keys_file, as_tenant):
    fleet = await make_fleet(api_keys_file=keys_file)
    with pytest.raises(Unauthenticated, match="authorization"):
        await fleet.client.generate("abc")
    async with AsyncClient(fleet.address, api_key="not-a-known-key-at-all") as stranger:
        with pytest.raises(Unauthenticated, match="not known"):
            await stranger.model_info()
    with pytest.raises(PermissionDenied, match="monitor"):
        await as_tenant(fleet, "scraper").generate("abc")
    assert fleet.script.opens == []


async def test_sessions_are_a_tenants_own(make_real_fleet, keys_file, as_tenant):
    store = MemoryStore(1 << 30)
    fleet = await make_real_fleet(store=store, api_keys_file=keys_file)
    alice, bob, chief = (as_tenant(fleet, name) for name in ("alice", "bob", "chief"))
    options = {"session_id": "tea", "max_tokens": 8, "ignore_eos": True, "temperature": 0.0}
    first = await alice.generate(PROMPT, **options)
    # the same words under the same id: nothing of another's conversation is used or told
    other = await bob.generate(PROMPT, **options)
    assert [done.session.turn for done in (first, other)] == [1, 1]
    assert [done.usage.cached_tokens for done in (first, other)] == [0, 0]
    assert (await alice.generate([7, 8, 9], **options)).session.turn == 2
    assert [(one.session_id, one.turns) for one in await bob.sessions()] == [("tea", 1)]
    assert [(one.session_id, one.turns) for one in await chief.sessions("alice")] == [("tea", 2)]
    assert await chief.sessions() == []
    for refused in (bob.sessions("alice"), bob.delete_session("tea", "alice")):
        with pytest.raises(PermissionDenied, match="tenant"):
            await refused
    assert await bob.delete_session("tea")
    assert not await bob.delete_session("tea")
    assert (await alice.generate([7, 8, 9], **options)).session.turn == 3
    assert await chief.delete_session("tea", "alice")
    assert await store.scan(FRAMES) == [], "with all that was stored of them"


async def test_a_tenants_sessions_take_up_what_they_may(make_real_fleet, keys_file, as_tenant):
    add_limits(keys_file, "alice: {stored_bytes: 10000}")
    store = MemoryStore(1 << 30)
    fleet = await make_real_fleet(store=store, api_keys_file=keys_file)
    alice, bob = (as_tenant(fleet, name) for name in ("alice", "bob"))
    options = {"max_tokens": 8, "ignore_eos": True, "temperature": 0.0}
    for client in (alice, bob):
        await client.generate(PROMPT, session_id="tea", **options)
    (kept,) = await alice.sessions()
    # what is stored besides are a record and heads
    assert 10_000 < kept.stored_bytes < store.used_bytes / 2 + 20_000
    for session_id in ("tea", "milk"):
        with pytest.raises(Overloaded, match=f"1 sessions of the key's tenant take up {kept.stored_bytes} bytes"):
            await alice.generate([7, 8, 9], session_id=session_id, **options)
    assert (await bob.generate([7, 8, 9], session_id="tea", **options)).session.turn == 2
    assert (await bob.sessions())[0].stored_bytes > kept.stored_bytes, "a turn adds to it"
    await alice.generate(PROMPT, durability="tokens", **options)  # it leaves nothing
    assert await alice.delete_session("tea")
    assert (await alice.generate([7, 8, 9], session_id="milk", **options)).session.turn == 1


@pytest.mark.parametrize("forged", ["a:b", "a\nb", "x" * 10_000, "a b", "é", "\0"])
async def test_odd_ids_are_refused_before_the_store(make_real_fleet, forged):
    store = MemoryStore(1 << 30)
    fleet = await make_real_fleet(store=store)
    for field in ("session_id", "request_id"):
        try:
            await fleet.client.generate(PROMPT, **{field: forged}, max_tokens=2)
            assert forged == "a:b", "printable, and hashed before it is a name"
        except InvalidRequest as exc:
            assert exc.field == field
    assert all("a:b" not in key for key in await store.scan(""))
    assert (await fleet.client.generate(PROMPT, max_tokens=2)).text


async def test_frames_that_say_to_be_another_tenants_are_refused(make_real_fleet, keys_file, as_tenant, monkeypatch):
    fleet = await make_real_fleet(api_keys_file=keys_file, max_migrations=0)
    alice = as_tenant(fleet, "alice")
    (prefill,) = fleet.hosts["prefill"]._services

    class Forging(WorkerIdentity):
        def frame_ident(self, message, recipe):
            return replace(super().frame_ident(message, recipe), tenant="bob")

    own = prefill._identity
    monkeypatch.setattr(prefill, "_identity", Forging(**vars(own)))
    with pytest.raises(PermissionDenied, match="tenant"):
        await alice.generate(PROMPT, max_tokens=8, ignore_eos=True)
    monkeypatch.undo()
    assert (await alice.generate(PROMPT, max_tokens=8, ignore_eos=True)).text
