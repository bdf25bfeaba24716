"""What a gateway makes of a fleet that changes: drained workers, other gateways, models that are not its own."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from kvsluice.client import AsyncClient
from kvsluice.errors import InvalidRequest, RequestCancelled, StoreUnavailable
from kvsluice.services.gateway.membership import Member
from kvsluice.services.gateway.server import Gateway
from kvsluice.tests.integration.services.conftest import CharTokenizer

ANSWER = "Hello, worl"  # the script's last token ends it


def decodes(fleet):
    """Workers of the requests that were opened, by what gateways count as under way."""
    return {worker for worker, uses in fleet.gateway.pool.uses.items() if uses and worker.startswith("decode")}


async def test_a_draining_worker_keeps_what_it_has_and_gets_nothing_new(make_fleet, until):
    fleet = await make_fleet()
    gate = asyncio.Event()
    fleet.script.gate = gate.wait
    running = asyncio.create_task(fleet.client.generate("a", max_tokens=12))
    await until(lambda: decodes(fleet) == {"decode-0"})
    await fleet.members.drain("decode-0")
    generation = fleet.members.generation
    await until(lambda: fleet.gateway.pool.generation == generation)
    assert not fleet.gateway.ready  # it alone can take requests

    await fleet.add_worker("decode-1", "decode")
    await fleet.until_ready()
    later = asyncio.create_task(fleet.client.generate("b", max_tokens=12))
    await until(lambda: decodes(fleet) == {"decode-0", "decode-1"})
    gate.set()
    assert (await running).text == (await later).text == ANSWER
    assert (await running).durability.migrations == 0
    assert not +fleet.gateway.pool.uses
    await fleet.members.remove("decode-0")
    assert (await fleet.client.generate("c", max_tokens=12)).text == ANSWER


async def test_a_prefill_worker_is_free_to_go_once_its_prompt_is_decoded(make_fleet, until):
    fleet = await make_fleet()
    decode_gate, prefill_gate = asyncio.Event(), asyncio.Event()
    fleet.script.gate = decode_gate.wait
    fleet.script.prefill = lambda request: prefill_gate.wait()
    running = asyncio.create_task(fleet.client.generate("a", max_tokens=12))
    await until(lambda: fleet.gateway.pool.uses["prefill-0"] == 1)
    prefill_gate.set()
    await until(lambda: fleet.gateway.pool.uses["prefill-0"] == 0)
    assert fleet.gateway.pool.uses["decode-0"] == 1
    decode_gate.set()
    assert (await running).text == ANSWER


async def test_a_worker_that_is_taken_away_in_the_middle_hands_its_streams_on(make_fleet, until):
    fleet = await make_fleet()
    gate = asyncio.Event()
    fleet.script.gate = gate.wait
    running = asyncio.create_task(fleet.client.generate("a", max_tokens=12))
    await until(lambda: fleet.gateway.pool.uses["decode-0"] == 1)
    await fleet.add_worker("decode-1", "decode")
    await fleet.members.drain("decode-0")
    await fleet.members.remove("decode-0")  # the time it was given is over
    await until(lambda: fleet.gateway.pool.uses["decode-1"] == 1)
    gate.set()
    done = await running
    assert (done.text, done.durability.migrations) == (ANSWER, 1)


@pytest.mark.parametrize("says_so", [False, True])
async def test_a_prefill_worker_that_goes_before_it_takes_a_prompt_hands_it_on(make_fleet, until, says_so):
    """Its connection is closed, or it ends the call as cancelled; nobody has cancelled the request."""
    fleet = await make_fleet()
    await fleet.add_worker("prefill-1", "prefill")
    generation = fleet.members.generation
    await until(lambda: fleet.gateway.pool.generation == generation)
    asked, goes = asyncio.Event(), asyncio.Event()

    async def accept(request) -> None:
        if not asked.is_set():
            asked.set()
            await goes.wait()
            raise RequestCancelled("the server stops")

    fleet.script.accept = accept
    running = asyncio.create_task(fleet.client.generate("a", max_tokens=12))
    await asked.wait()
    (worker,) = [name for name, uses in fleet.gateway.pool.uses.items() if uses and name.startswith("prefill")]
    if says_so:
        goes.set()
    else:
        await fleet.members.remove(worker)
    done = await running
    goes.set()
    assert (done.text, done.durability.migrations) == (ANSWER, 1)


async def test_a_store_that_is_away_is_no_fault_of_the_request(make_fleet):
    """Workers that have started while it was away have none yet: requests go on, and are not kept."""
    fleet = await make_fleet(store_url="redis://127.0.0.1:1")
    done = await fleet.client.generate("a", max_tokens=12, durability="tokens")
    assert (done.text, done.durability.kept) == (ANSWER, False)
    with pytest.raises(StoreUnavailable, match="cannot be reached now"):
        await fleet.client.generate("a", max_tokens=12, session_id="tea")


async def test_what_is_kept_needs_a_store(make_fleet):
    fleet = await make_fleet()
    for options in ({"durability": "tokens"}, {"session_id": "tea"}):
        with pytest.raises(InvalidRequest, match=next(iter(options))):
            await fleet.client.generate("a", max_tokens=12, **options)


async def test_a_change_that_cannot_be_taken_is_taken_again(make_fleet, until, monkeypatch):
    fleet = await make_fleet()
    monkeypatch.setattr("kvsluice.services.gateway.pool.RETRY_S", 0.01)
    connect, failures = fleet.gateway.pool._connect, iter((OSError("no descriptors"), RuntimeError("once more")))

    def failing(member):
        for error in failures:
            raise error
        return connect(member)

    monkeypatch.setattr(fleet.gateway.pool, "_connect", failing)
    await fleet.add_worker("decode-1", "decode")
    generation = fleet.members.generation
    await until(lambda: fleet.gateway.pool.generation == generation)
    await fleet.members.remove("decode-0")
    assert (await fleet.client.generate("c", max_tokens=12)).text == ANSWER
    assert next(failures, None) is None


async def test_workers_of_another_model_are_none_of_a_gateways(make_fleet, until):
    fleet = await make_fleet()
    for role in ("prefill", "decode"):
        member = Member(f"{role}-9", role, "127.0.0.1:1", "first", model="another")
        await fleet.members.register(member)
        await fleet.members.register(replace(member, worker_id=f"{role}-8", model="chars", max_num_seqs=3))
    await until(lambda: fleet.gateway.pool.generation == fleet.members.generation)
    assert {"prefill-8", "decode-8"} <= set(fleet.gateway.pool.wait_s)
    assert not {"prefill-9", "decode-9"} & set(fleet.gateway.pool.wait_s)


async def test_more_requests_are_let_in_where_there_are_more_workers(make_fleet, until):
    fleet = await make_fleet(workers=False, max_num_seqs=1, max_queue=0)
    gate = asyncio.Event()
    fleet.script.gate = gate.wait
    await fleet.add_worker("prefill-0", "prefill")
    for name in ("decode-0", "decode-1"):
        await fleet.add_worker(name, "decode")
        member = next(m for m in fleet.members.view().members if m.worker_id == name)
        await fleet.members.register(replace(member, max_num_seqs=1))
    await until(lambda: fleet.gateway.pool.max_num_seqs == 2)
    running = [asyncio.create_task(fleet.client.generate(text, max_tokens=12)) for text in "ab"]
    await until(lambda: decodes(fleet) == {"decode-0", "decode-1"})
    gate.set()
    assert [(await one).text for one in running] == [ANSWER] * 2


@pytest.fixture
async def pair(make_fleet):
    """Two gateways over the same workers."""
    fleet = await make_fleet()
    other = Gateway(fleet.config, CharTokenizer(), fleet.members, number=1)
    address = await other.start()
    client = AsyncClient(address, timeout_s=20.0)
    while not other.ready:
        await other.pool.changed.wait()
    yield fleet, client
    await client.close()
    await other.stop()


async def test_two_gateways_use_the_same_request_id_and_get_their_own_answers(pair):
    fleet, other = pair
    answers = await asyncio.gather(
        *(client.generate("a", max_tokens=12, request_id="same") for client in (fleet.client, other))
    )
    assert {answer.text for answer in answers} == {ANSWER}
    epochs = [one.epoch for one in fleet.script.opens]
    assert len(set(epochs)) == 2
    assert sorted(epoch % 1024 for epoch in epochs) == [0, 1]
