"""Routing, admission, membership: the gateway's decisions without a network."""

from __future__ import annotations

import asyncio

import pytest

from kvsluice.errors import Overloaded
from kvsluice.services.gateway.admission import Admission
from kvsluice.services.gateway.membership import Member, MembershipTable
from kvsluice.services.gateway.routing import DecodeLoad, PrefillLoad, pick_decode, pick_prefill


def decode(worker_id="a", free=1000, waiting=0, running=0, ours=0):
    return DecodeLoad(worker_id, free, 1000, running, waiting, ours)


def test_decode_is_picked_by_queue_then_free_cache_then_running():
    assert pick_decode([]) is None
    assert pick_decode([decode("a", waiting=1), decode("b", free=100)]) == "b"
    assert pick_decode([decode("a", free=300), decode("b", free=900)]) == "b"
    assert pick_decode([decode("a", free=990, running=3), decode("b", free=980)]) == "b"
    assert pick_decode([decode("a", ours=2), decode("b", ours=1)]) == "b"
    assert pick_decode([decode("b"), decode("a")]) == "a"


def test_a_worker_that_has_it_in_memory_is_taken_while_it_has_room():
    loads = [decode("a", free=900), decode("b", free=300, running=4)]
    assert pick_decode(loads, near="b") == "b"
    assert pick_decode(loads, near="gone") == "a"
    assert pick_decode([decode("a"), decode("b", waiting=1)], near="b") == "a"
    assert pick_decode([decode("a"), decode("b", free=10)], near="b") == "a"


def test_prefill_is_picked_by_pending_tokens():
    assert pick_prefill([]) is None
    assert pick_prefill([PrefillLoad("a", 10), PrefillLoad("b", 9)]) == "b"
    assert pick_prefill([PrefillLoad("b", 1), PrefillLoad("a", 1)]) == "a"


async def hold(admission, size, entered, release):
    async with admission.slot(size):
        entered.append(size)
        await release.wait()


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_admission_is_first_come_first_served_and_bounded():
    admission, entered, release = Admission(4, 2), [], asyncio.Event()
    tasks = [asyncio.create_task(hold(admission, size, entered, release)) for size in (3, 2, 1)]
    await settle()
    # the last would fit, but not before the one that came first
    assert (entered, admission.num_waiting, admission.num_running) == ([3], 2, 1)
    with pytest.raises(Overloaded, match="2"):
        async with admission.slot(1):
            pass
    release.set()
    await asyncio.gather(*tasks)
    assert entered == [3, 2, 1]
    assert (admission.num_waiting, admission.num_running) == (0, 0)


async def test_who_would_wait_past_its_deadline_is_sent_away_at_once():
    now = [0.0]
    admission, release = Admission(2, 50, lambda: now[0]), [asyncio.Event() for _ in range(20)]
    tasks = [asyncio.create_task(hold(admission, 1, [], event)) for event in release]
    await settle()
    assert admission.wait_s(1) == 0, "nothing has ended yet"
    for number in range(10):  # one every two seconds
        now[0] += 2
        release[number].set()
        await settle()
    # 8 wait, and 9 with this one: 10 ends in 18 s
    assert admission.num_waiting == 8
    assert admission.wait_s(1) == pytest.approx(9 * 18 / 10)
    with pytest.raises(Overloaded, match="the deadline is in 10 s") as caught:
        async with admission.slot(1, 10):
            pass
    assert caught.value.retry_after_s == pytest.approx(16.2)
    assert admission.num_waiting == 8
    for event in release:
        event.set()
    async with admission.slot(1, 17):
        await asyncio.gather(*tasks)


async def test_admission_lets_a_request_larger_than_all_run_alone():
    admission = Admission(4, 0)
    async with admission.slot(100):
        with pytest.raises(Overloaded):
            async with admission.slot(1):
                pass
    async with admission.slot(4):
        pass


@pytest.mark.parametrize("cancel_first", [True, False])
async def test_admission_gives_back_what_a_cancelled_waiter_had(cancel_first):
    admission, entered, release = Admission(1, 5), [], asyncio.Event()
    first = asyncio.create_task(hold(admission, 1, entered, release))
    await settle()
    second = asyncio.create_task(hold(admission, 1, entered, asyncio.Event()))
    third = asyncio.create_task(hold(admission, 1, entered, release))
    await settle()
    # the waiter is cancelled before, or in the same turn of the loop in which its turn comes
    if cancel_first:
        second.cancel()
        await settle()
    release.set()
    first.add_done_callback(lambda _: second.cancel())
    await asyncio.gather(first, second, third, return_exceptions=True)
    assert third.exception() is None
    assert (admission.num_running, admission.num_waiting) == (0, 0)
    async with admission.slot(1):
        pass


async def test_membership_wakes_its_watchers():
    table = MembershipTable()
    view = await table.watch(0, 5.0)
    assert view.members == ()
    waiting = asyncio.create_task(table.watch(view.generation, 5.0))
    await settle()
    first = Member("w", "decode", "a:1", "x")
    await table.register(first)
    view = await waiting
    assert view.members == (first,)
    # a restarted worker takes the place of its earlier incarnation
    second = Member("w", "decode", "a:2", "y")
    await table.register(second)
    later = await table.watch(view.generation, 5.0)
    assert later.members == (second,)
    assert later.generation > view.generation
    await table.remove("w")
    assert table.view().members == ()


async def test_an_unchanged_membership_is_returned_after_the_timeout():
    table = MembershipTable()
    generation = table.view().generation
    assert (await table.watch(generation, 0.01)).generation == generation
