"""The driver against queues of which everything is known, on a clock that jumps."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from kvsluice.loadtest.arrivals import RateProfile
from kvsluice.loadtest.driver import Driver, Limits
from kvsluice.loadtest.figures import measure
from kvsluice.loadtest.lengths import Fixed, Uniform
from kvsluice.loadtest.outcomes import Recording
from kvsluice.loadtest.vocabulary import Vocabulary
from kvsluice.loadtest.workload import Lengths, Mix, Workload
from kvsluice.tests.unit.loadtest.queues import Queue, Stalling
from kvsluice.tests.unit.loadtest.virtual_time import run

EVENLY, POISSON = math.inf, 1.0


def load(
    rate: float, count: int, burstiness: float = EVENLY, mix: Mix | None = None, *, tokens: int = 4, **more
) -> Workload:
    source = Lengths(RateProfile.constant(rate), burstiness, Fixed(8), Fixed(tokens))
    return Workload(source, mix or Mix(), Vocabulary.of_size(1000), seed=11, count=count, **more)


def drive(door: Queue, workload: Workload, **limits) -> Recording:
    async def main() -> Recording:
        return await Driver(door, Limits(**{"deadline_s": 600.0, **limits})).run(workload)

    return run(main())


def test_a_stall_is_seen_by_every_request_that_was_due_meanwhile():
    """Ten a second, a stall of five seconds: a client that waited for each answer would see one slow request."""
    recording = drive(Stalling(10.05, 15.05), load(10.0, 300))
    ttfts = np.array([one.ttft_s for one in recording.counted()])
    slow = ttfts[ttfts > 0.01]
    assert slow == pytest.approx(np.arange(4.95, 0, -0.1))
    figures = measure(recording, {}, (99.0,))
    assert figures["p99_ttft_ms"] == pytest.approx(np.percentile(1e3 * ttfts, 99))
    assert figures["mean_ttft_ms"] == pytest.approx(1e3 * 50 * 2.5 / 300)


def test_latency_counts_from_when_a_request_was_due_even_where_the_cap_held_it_back():
    door = Queue(1.0, fixed=True)
    recording = drive(door, load(2.0, 10), max_concurrency=1)
    waits = [one.sent_s - one.arrival_s for one in recording.counted()]
    assert door.most_open == 1
    assert waits == pytest.approx([0.5 * place for place in range(10)])
    assert [one.e2el_s for one in recording.counted()] == pytest.approx([1 + wait for wait in waits])
    # the cap is what was asked for: the client was not late
    assert recording.health.complaint() is None


def test_each_latency_is_what_lindleys_recursion_gives():
    """A queue of one server, at nine tenths of its capacity: who comes waits until all before are done."""
    recording = drive(Queue(0.01, seed=9), load(90.0, 500, POISSON, tokens=1, num_warmups=100))
    outcomes = sorted(recording.outcomes, key=lambda one: one.index)
    free_s, expected = 0.0, []
    for one, takes_s in zip(outcomes, np.random.default_rng(9).exponential(0.01, 600), strict=True):
        free_s = max(free_s, one.arrival_s) + takes_s
        expected.append(free_s - one.arrival_s)
    assert [one.e2el_s for one in outcomes] == pytest.approx(expected, abs=1e-9)
    assert [one.index for one in recording.counted()] == list(range(100, 600))


def test_a_closed_loop_holds_just_so_many_open_and_each_is_due_when_its_turn_comes():
    door = Queue(0.1, fixed=True)
    recording = drive(door, load(1.0, 50), closed_loop=True, max_concurrency=5)
    assert door.most_open == recording.most_open == 5
    assert len(recording.outcomes) == 50
    # five in a queue of one server: each takes five services, but for the first ones
    assert [one.e2el_s for one in recording.counted()[5:-5]] == pytest.approx([0.5] * 40)


def test_nothing_new_begins_after_the_duration():
    recording = drive(Queue(0.01, fixed=True), load(10.0, 1000), duration_s=3.0)
    assert len(recording.outcomes) == 30
    assert (
        drive(Queue(0.1, fixed=True), load(9.0, 999), duration_s=3.0, closed_loop=True, max_concurrency=1).most_open
        == 1
    )


def test_shed_late_and_cancelled_requests_are_told_apart():
    shed = drive(Queue(1.0, fixed=True, room=2), load(10.0, 40))
    counts = measure(shed, {})["counts"]
    assert (counts["shed"], counts["served"]) == (34, 6)
    assert measure(shed, {})["errors"] == {"Overloaded": 34}
    assert measure(shed, {})["mean_shed_ms"] == 0.0

    door = Queue(20.0, fixed=True)
    hung = drive(door, load(10.0, 3), deadline_s=1.0)
    assert measure(hung, {})["counts"]["deadline"] == 3
    assert (door.cancelled, door.open) == (3, 0)

    mix = Mix(cancel_rate=0.25, cancel_after_s=Uniform(0.1, 0.2))
    cancelled = drive(Queue(1.0, fixed=True), load(1.0, 400, mix=mix))
    # a binomial share of 400 draws deviates by at most five of its deviations
    assert abs(measure(cancelled, {})["counts"]["cancelled"] - 100) < 5 * math.sqrt(400 * 0.25 * 0.75)


def test_a_conversation_goes_on_when_its_answer_has_come_and_been_thought_about():
    door = Queue(1.0, fixed=True)
    workload = load(0.01, 4, mix=Mix(turns=Fixed(4), think_s=Fixed(3)), run_id="r")
    recording = drive(door, workload)
    assert [one.arrival_s for one in recording.counted()] == pytest.approx([0.0, 4.0, 8.0, 12.0])
    assert [one.turn for one in recording.counted()] == [0, 1, 2, 3]
    assert {request.session_id for request in door.requests} == {"load-r-0"}
    assert {len(request.prompt) for request in door.requests} == {8}


def test_history_is_sent_again_with_the_answers_that_came():
    door = Queue(1.0, fixed=True)
    drive(door, load(0.01, 3, mix=Mix(turns=Fixed(3))), history=True)
    first, second, third = (request.prompt for request in door.requests)
    assert second[:12] == (*first, 7000, 7001, 7002, 7003)
    assert third[: len(second)] == second
    assert {request.session_id for request in door.requests} == {""}


def test_a_client_that_has_too_many_open_says_that_the_run_is_worth_nothing():
    recording = drive(Queue(10.0, fixed=True), load(10.0, 50), max_open=20)
    assert recording.health.dropped == 30
    assert "30 requests were never sent" in (recording.health.complaint() or "")
    assert measure(recording, {})["counts"]["dropped"] == 30


class Blocking(Stalling):
    """Keeps the client's own thread busy, as too much work for it would; the real clock."""

    async def run(self, request, on_tokens):
        time.sleep(0.02)  # noqa: ASYNC251 - blocking is the point
        return await super().run(request, on_tokens)


async def test_a_client_that_cannot_keep_up_is_found_out():
    workload = load(1000.0, 30)
    recording = await Driver(Blocking(0, 0), Limits(deadline_s=60.0, late_after_s=0.05)).run(workload)
    # 30 requests were due within 30 ms, and each blocked the client for 20
    assert "were sent more than 50 ms late" in (recording.health.complaint() or "")
    assert recording.health.most_late_s > 0.3
    # their latency tells it, too
    assert max(one.ttft_s for one in recording.counted()) > 0.3


def test_an_interrupted_run_keeps_what_it_has():
    import asyncio

    async def main() -> Recording:
        door = Queue(1.0, fixed=True)
        task = asyncio.create_task(Driver(door, Limits(deadline_s=600.0)).run(load(1.0, 1000)))
        await asyncio.sleep(10.5)
        task.cancel()
        recording = await task
        assert door.open == 0
        return recording

    recording = run(main())
    assert recording.interrupted
    assert len(recording.outcomes) == 10


def test_the_same_seed_sends_the_same_requests_whatever_the_service_does():
    mix = Mix(recipes={"exact": 1, "fast": 3}, turns=Fixed(2))
    quick, slow = Queue(0.01), Queue(3.0)
    workload = load(5.0, 60, POISSON, mix, run_id="r")
    drive(quick, workload)
    drive(slow, workload)

    def key(request):
        return request.session_id, request.prompt

    assert sorted(map(key, quick.requests)) == sorted(map(key, slow.requests))
    shares = [request.recipe for request in quick.requests]
    assert set(shares) == {"exact", "fast"}
    assert shares.count("fast") > shares.count("exact")
