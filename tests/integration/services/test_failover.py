"""A stream goes on, token for token, when the workers that made it are lost."""

from __future__ import annotations

import asyncio

import pytest

from kvsluice.errors import InternalError, InvalidRequest, WorkerLost
from kvsluice.protos import worker_pb2 as wpb

TEXT = "What is told once is not told again."


class Killer:
    """Counts tokens as decode makes them, and kills its worker at one of them, once `may_kill` is set."""

    def __init__(self, fleet, at: int, worker_id: str | None = None) -> None:
        self.fleet, self.left, self.worker_id = fleet, at, worker_id
        self.may_kill = asyncio.Event()
        self.may_kill.set()

    async def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            busy = self.worker_id or next(iter(self.fleet.script.opens_at))
            await self.may_kill.wait()
            self.fleet.killing = asyncio.create_task(self.fleet.kill_worker(busy))
            await asyncio.Event().wait()


@pytest.fixture
async def pair(make_fleet):
    """A gateway over one prefill and two decode workers."""
    fleet = await make_fleet(worker_wait_s=2.0, worker_lease_s=0.4)
    fleet.script.text = TEXT
    await fleet.add_worker("decode-1", "decode")
    async with asyncio.timeout(5):
        while len(fleet.gateway.pool._decodes()) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return fleet


def told(opening: wpb.Open) -> list[str]:
    return ["".join(map(chr, one.token_ids)) for one in opening.sent]


@pytest.mark.parametrize("at", [1, 2, 7, 30])
async def test_another_decode_worker_goes_on_by_replay(pair, at):
    killer = pair.script.gate = Killer(pair, at, "decode-0")
    killer.may_kill.clear()
    stream = pair.client.stream("abc", max_tokens=60)
    async for _ in stream:
        killer.may_kill.set()  # the first token comes from prefill, and may be told later than decode is lost
    done = stream.completion
    assert done.text == TEXT[:-1]
    first, second = pair.script.opens
    assert not first.sent
    assert second.epoch > first.epoch
    assert not second.from_store
    (sent,) = told(second)
    assert TEXT.startswith(sent)
    assert at <= len(sent)
    assert [request.resumed for request in pair.script.prefills] == [False, True]
    assert done.durability.level == "none"
    assert (done.durability.migrations, done.durability.recomputed_prompt_tokens) == (1, 7)
    assert done.durability.stalled_s > 0


async def test_what_was_kept_is_gone_on_with_without_prefill(pair):
    pair.script.has_store = True
    await until_stores(pair)
    pair.script.gate = Killer(pair, 9, "decode-0")
    done = await pair.client.generate("abc", max_tokens=60, durability="tokens")
    assert done.text == TEXT[:-1]
    first, second = pair.script.opens
    assert first.keeping.keep_every == second.keeping.keep_every == pair.config.store_keep_every
    assert second.from_store
    assert len(pair.script.prefills) == 1
    assert (done.durability.recomputed_tokens, done.durability.recomputed_prompt_tokens) == (3, 0)


@pytest.mark.parametrize("error_type", ["SequenceLost", "StoreUnavailable", "CorruptFrame"])
async def test_what_the_store_has_lost_is_replayed(pair, error_type):
    pair.script.has_store = True
    await until_stores(pair)
    pair.script.store_refusal = wpb.Failed(error_type=error_type, message="not there")
    pair.script.gate = Killer(pair, 9, "decode-0")
    done = await pair.client.generate("abc", max_tokens=60, durability="handoff")
    assert done.text == TEXT[:-1]
    assert [opening.from_store for opening in pair.script.opens] == [False, True, False]
    assert pair.script.opens[0].keeping.keep_every == 0
    assert done.durability.migrations == 1, "two ways of one migration"


async def test_where_no_store_is_left_the_prompt_is_run_again_and_no_longer_kept(pair):
    pair.script.has_store = True
    await until_stores(pair)
    pair.script.gate = Killer(pair, 9, "decode-0")
    pair.script.stores = {"decode-0"}
    async with asyncio.timeout(10):
        while sum(link.info.has_store for link in pair.gateway.pool._decodes()) != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    done = await pair.client.generate("abc", max_tokens=60, durability="tokens")
    assert done.text == TEXT[:-1]
    assert [opening.from_store for opening in pair.script.opens] == [False, False]


async def test_choices_that_have_ended_stay_as_they_are(pair):
    pair.script.eos = False
    gate = Killer(pair, 12, "decode-0")
    pair.script.gate = gate
    stream = pair.client.stream("abc", max_tokens=20, n=3, stop=["on"])
    async for _ in stream:
        pass
    texts = [choice.text for choice in stream.completion.choices]
    assert texts == ["What is told "] * 3
    assert all(told(pair.script.opens[1]))


async def test_a_stalled_worker_loses_its_lease(pair, until):
    waiting = asyncio.Event()

    async def stall() -> None:
        if pair.script.sent_tokens == 6 and not pair.script.stalled:
            pair.script.stalled.add("decode-0")
            waiting.set()
            await asyncio.Event().wait()

    pair.script.gate = stall
    done = await pair.client.generate("abc", max_tokens=60)
    assert waiting.is_set()
    assert done.text == TEXT[:-1]
    assert done.durability.migrations == 1
    pair.script.stalled.clear()
    await until(lambda: len(pair.gateway.pool._decodes()) == 2)


async def test_a_prefill_worker_that_is_lost_is_tried_elsewhere(pair, until):
    await pair.add_worker("prefill-1", "prefill")
    busy = asyncio.Event()

    async def hang(request):
        if not busy.is_set():
            busy.set()
            await asyncio.Event().wait()

    pair.script.prefill = hang
    running = asyncio.create_task(pair.client.generate("abc", max_tokens=60))
    await busy.wait()
    await pair.kill_worker("prefill-0")
    done = await running
    assert done.text == TEXT[:-1]
    assert [request.resumed for request in pair.script.prefills] == [False, False]
    assert len({request.epoch for request in pair.script.prefills}) == 2


async def test_migrations_have_a_limit(make_fleet):
    fleet = await make_fleet(max_migrations=2, worker_wait_s=2.0)
    fleet.script.text = TEXT
    fleet.script.refusal = wpb.Failed(error_type="WorkerLost", message="gone")
    with pytest.raises(WorkerLost, match="gone; given up after 3 attempts"):
        await fleet.client.generate("abc")
    assert len(fleet.script.opens) == 3


async def test_retries_of_all_requests_have_a_budget(make_fleet):
    fleet = await make_fleet(retries_per_minute=2, worker_wait_s=2.0)
    fleet.script.refusal = wpb.Failed(error_type="WorkerLost", message="gone")
    with pytest.raises(WorkerLost, match="too many requests are tried again"):
        await fleet.client.generate("abc")
    assert len(fleet.script.opens) == 3


async def test_an_error_that_others_would_repeat_ends_the_request(pair):
    pair.script.refusal = wpb.Failed(error_type="InternalError", message="broken")
    with pytest.raises(InternalError, match="broken"):
        await pair.client.generate("abc")
    assert len(pair.script.opens) == 1


async def test_durability_is_checked_before_any_work(pair):
    with pytest.raises(InvalidRequest, match="none, handoff, tokens") as caught:
        await pair.client.generate("abc", durability="forever")
    assert caught.value.field == "durability"
    with pytest.raises(InvalidRequest, match="needs a store") as caught:
        await pair.client.generate("abc", durability="tokens")
    assert caught.value.allowed == "none"
    assert not pair.script.opens


async def until_stores(fleet) -> None:
    async with asyncio.timeout(10):
        while not all(link.info.has_store for link in fleet.gateway.pool._decodes()):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
