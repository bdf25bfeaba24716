"""Workers die at named points of a request's life, in their own processes; the answer is the undisturbed one."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvsluice.client import Client
from kvsluice.tests.faults.rig.leaks import keys_without_end

PROMPT = [(11 * i) % 40_000 + 100 for i in range(400)]
SAMPLING = ({"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "seed": 7})


@pytest.fixture
def points(fleet):
    yield fleet.points
    fleet.points.withdraw()


@pytest.fixture(scope="module")
def client(shared_fleet):
    with Client(shared_fleet.address, timeout_s=120.0) as client:
        yield client


def ask(client, which: int):
    return client.generate(PROMPT, max_tokens=40, durability="tokens", ignore_eos=True, **SAMPLING[which])


@pytest.fixture(scope="module")
def whole(shared_fleet, client):
    """What nothing has disturbed."""
    shared_fleet.await_whole()
    return [ask(client, which).token_ids for which in range(len(SAMPLING))]


@pytest.mark.parametrize(
    "losses",
    [
        # each worker that takes the request's place dies a little later in its life; a number: passings before
        [("frame-acknowledged", 1), ("frame-stored", 2)],
        [("manifest-unnamed", 1), ("started", 1)],
        [("token-unsent", 1), ("token-sent", 12)],
        [("rows-unkept", 2), ("rows-unnamed", 2), ("ended", 1)],
        [("manifest-kept", 1), ("claimed", 1), ("prompt-restored", 1), ("taken-over", 1)],
        [("frame-sent", 2), ("manifest-unsent", 1)],
    ],
    ids=["frames", "manifest", "tokens", "rows", "restore", "prefill"],
)
def test_whoever_dies_wherever_no_token_is_lost(client, whole, points, losses):
    which = len(losses) % 2
    orders = [points.order(name, passing=passing) for name, passing in losses]
    done = ask(client, which)
    for order in orders:
        points.await_passed(order)
    assert done.token_ids == whole[which]


def test_a_value_that_goes_while_it_is_looked_for_is_computed_again(client, whole, points, fleet):
    """What a restoring worker has found named is deleted before it is read."""
    lost, frozen = points.order("rows-kept", passing=2), points.order("found", "SIGSTOP")
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(ask, client, 0)
        points.await_passed(lost)
        pid = points.await_passed(frozen)
        with fleet.redis.admin() as admin:
            admin.delete(*admin.keys("kvsluice:frame:*"))
        os.kill(pid, signal.SIGCONT)
        done = asked.result(120)
    assert done.token_ids == whole[0]
    assert done.durability.recomputed_prompt_tokens == len(PROMPT)


def test_who_freezes_in_the_middle_of_a_write_ends_it_in_vain(client, whole, points, fleet):
    """Rows of generated tokens are stored and not named yet; meanwhile another worker goes on, and ends."""
    frozen = points.order("rows-unnamed", "SIGSTOP", passing=2)
    done = ask(client, 1)
    pid = points.await_passed(frozen)
    assert done.token_ids == whole[1]
    assert done.durability.migrations == 1
    os.kill(pid, signal.SIGCONT)
    assert ask(client, 1).token_ids == whole[1]
    assert keys_without_end(fleet.redis) == []
