"""Routing, membership: the gateway's decisions without a network."""

from __future__ import annotations

import asyncio

import pytest

from kvsluice.services.gateway.job import GATEWAYS, Epochs
from kvsluice.services.gateway.membership import Member, MembershipTable
from kvsluice.services.gateway.routing import DecodeLoad, PrefillLoad, pick_decode, pick_prefill
from kvsluice.services.gateway.waits import REACH, Speed, Throughput, Waits, mean_speed, work


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


def test_a_worker_that_knows_a_prompts_beginning_is_taken_as_long_as_that_saves_more_than_its_queue_is_longer():
    def picked(queue: int, saved: float = 500.0) -> str | None:
        return pick_prefill([PrefillLoad("a", 40), PrefillLoad("b", queue, saved)])

    assert picked(0) == picked(40) == picked(539) == "b"
    assert picked(540) == "a", "none is better, and ties go to the smaller id"
    assert picked(541) == picked(10_000) == "a"
    assert picked(41, saved=0.0) == "a"
    assert pick_prefill([PrefillLoad("a", 0, 512), PrefillLoad("b", 100, 1024)]) == "b", "the longer beginning"


def test_epochs_of_two_gateways_grow_and_are_never_the_same():
    one, other = Epochs(0), Epochs(1)
    ours, theirs = [one.next() for _ in range(500)], [other.next() for _ in range(500)]
    assert ours == sorted(set(ours)) and not set(ours) & set(theirs)
    # whoever goes on with a sequence is above whoever had it, whatever their clocks say
    ahead = theirs[-1] + 10**9 * GATEWAYS
    first, second = one.next(above=ahead), other.next(above=ahead)
    assert ahead < first < one.next() < 2**63 and ahead < second
    assert (first % GATEWAYS, second % GATEWAYS) == (0, 1)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_waits_are_those_that_ended_lately_or_go_on():
    clock = Clock()
    waits = Waits(clock)
    assert waits.seconds() == 0.0
    waits.begin(("a", 1))
    waits.begin(("b", 1))
    clock.now = 2.0
    waits.end(("a", 1))
    waits.drop(("b", 1))
    assert waits.seconds() == 2.0
    waits.begin(("c", 1))
    clock.now = 7.0
    assert waits.seconds() == 5.0
    waits.clear()
    clock.now = 100.0
    assert waits.seconds() == 0.0


def test_throughput_leaves_idle_time_out():
    clock = Clock()
    throughput = Throughput(clock)
    assert throughput.speed == Speed()
    throughput.begin(idle=True)
    clock.now = 1.0
    throughput.end(100)
    assert throughput.speed.seconds_per_token == pytest.approx(1 / work(100))
    clock.now = 500.0
    throughput.begin(idle=True)
    throughput.begin(idle=False)
    clock.now = 501.0
    throughput.end(None)  # what does not count takes its time with it
    clock.now = 502.0
    throughput.end(100)
    assert throughput.speed.seconds_per_token == pytest.approx(1 / work(100))


def test_short_prompts_say_little_of_long_ones():
    clock = Clock()
    throughput = Throughput(clock)

    def run(num_tokens: int, seconds: float) -> None:
        throughput.begin(idle=True)
        clock.now += seconds
        throughput.end(num_tokens)

    run(4096, 8.0)
    long_s = throughput.speed.seconds_per_token
    for _ in range(20):
        run(1, 0.1)  # a hundred times as long a token
    assert long_s < throughput.speed.seconds_per_token < 1.3 * long_s
    for _ in range(20):
        run(4096, 1.0)
    assert throughput.speed.seconds_per_token < long_s / 7, "what was long ago is forgotten"


def test_nothing_is_foretold_of_prompts_much_longer_than_any_that_ran():
    clock = Clock()
    throughput = Throughput(clock)
    throughput.begin(idle=True)
    clock.now = 2.0  # something else was going on
    throughput.end(5)
    assert throughput.speed.seconds(5) == 2.0
    assert throughput.speed.seconds(100_000) == throughput.speed.seconds(50_000) == 2.0 * REACH
    assert mean_speed([throughput.speed, Speed()]) == throughput.speed, "of the others nothing is known"
    assert mean_speed([]) == Speed() and Speed().seconds(1000) == 0.0


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


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
