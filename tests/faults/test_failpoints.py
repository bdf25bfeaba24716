"""Workers die at named points of a request's life, in the product's own processes; the answer is the undisturbed one.

The tests share one service over a real redis-server and run in order.
"""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvsluice.client import Client
from kvsluice.evals.service_process import running_service
from kvsluice.tests.faults.conftest import Victim
from kvsluice.tests.faults.rig.failpoints import Point, failpoints
from kvsluice.tests.faults.rig.leaks import keys_without_end
from kvsluice.tests.faults.rig.redis_server import RedisServer, running

DECODE, SEQUENCES = "kvsluice.services.decode", "kvsluice.kvstore.sequences"
PREFILL = "kvsluice.services.prefill.publisher"

POINTS = {
    # the prompt arrives at decode
    "frame-came": Point(f"{DECODE}.receiver", "Receiver._take_frame", "before"),
    "frame-acknowledged": Point(f"{DECODE}.receiver", "Receiver._take_frame", "after"),
    "frame-unstored": Point(SEQUENCES, "SequenceWriter.put_frame", "before"),
    "frame-stored": Point(SEQUENCES, "SequenceWriter.put_frame", "after"),
    "manifest-unstored": Point(SEQUENCES, "SequenceWriter.commit", "before"),
    "manifest-unnamed": Point(SEQUENCES, "SequenceWriter._point_to", "before"),
    "manifest-kept": Point(SEQUENCES, "SequenceWriter.commit", "after"),
    "started": Point(f"{DECODE}.server", "_EngineTarget.commit", "after"),
    # tokens are made
    "token-unsent": Point(f"{DECODE}.requests", "GatewayStream.add", "after"),
    "token-sent": Point(f"{DECODE}.requests", "GatewayStream.flush", "after"),
    "rows-unkept": Point(f"{DECODE}.keeper", "Keeper._keep_rows", "before"),
    "rows-unnamed": Point(SEQUENCES, "encode_continuation", "before"),
    "rows-kept": Point(f"{DECODE}.keeper", "Keeper._keep_rows", "after"),
    "ended": Point(f"{DECODE}.server", "DecodeService._end_keeping", "before"),
    # another worker goes on
    "unclaimed": Point(f"{DECODE}.restore", "claim_sequence", "before"),
    "claimed": Point(f"{DECODE}.restore", "claim_sequence", "after"),
    "found": Point(f"{DECODE}.restore", "find_sequence", "after"),
    "prompt-restored": Point(f"{DECODE}.restore", "_restore_prompt", "after"),
    "taken-over": Point(f"{DECODE}.keeper", "Keeper.take_over", "after"),
    "restored": Point(f"{DECODE}.keeping", "KeptRequests.restore", "after"),
    # the prompt leaves prefill
    "frame-sent": Point(PREFILL, "Publisher._put", "after"),
    "manifest-unsent": Point(PREFILL, "Publisher._manifest", "before"),
}
LEASE_S = 3.0
PROMPT = [(11 * i) % 40_000 + 100 for i in range(400)]
SAMPLING = ({"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "seed": 7})


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    with running(RedisServer(tmp_path_factory.mktemp("redis"))) as server:
        yield server


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    with failpoints(tmp_path_factory.mktemp("points"), POINTS) as points:
        yield points


@pytest.fixture(scope="module")
def victim(redis, points):
    arguments = ["--model", "smollm2-135m", "--decode-workers", "3", "--torch-threads", "1", "--store-keep-every", "8"]
    arguments += ["--store-url", f"redis://127.0.0.1:{redis.port}", "--default-recipe", "sluice-full"]
    arguments += ["--worker-lease-s", str(LEASE_S), "--max-migrations", "16"]
    with running_service(*arguments, "--log-level", "info") as service:
        yield Victim(service)


@pytest.fixture(scope="module")
def client(victim):
    with Client(victim.address, timeout_s=120.0) as client:
        yield client


def ask(client, which: int):
    return client.generate(PROMPT, max_tokens=40, durability="tokens", ignore_eos=True, **SAMPLING[which])


@pytest.fixture(scope="module")
def whole(client):
    """What nothing has disturbed."""
    return [ask(client, which).token_ids for which in range(len(SAMPLING))]


@pytest.mark.parametrize(
    "losses",
    [
        # each worker that takes the request's place dies a little later in its life; a number: passings before
        [("frame-came", 1), ("frame-acknowledged", 1), ("frame-unstored", 2), ("frame-stored", 2)],
        [("manifest-unstored", 1), ("manifest-unnamed", 1), ("started", 1)],
        [("token-unsent", 1), ("token-sent", 12), ("ended", 1)],
        [("rows-unkept", 2), ("rows-unnamed", 2), ("rows-kept", 1)],
        [("manifest-kept", 1), ("unclaimed", 1), ("claimed", 1)],
        [("rows-kept", 2), ("found", 1), ("prompt-restored", 1), ("taken-over", 1), ("restored", 1)],
        [("frame-sent", 2), ("manifest-unsent", 1)],
    ],
    ids=["frames", "manifest", "tokens", "rows", "claim", "restore", "prefill"],
)
def test_whoever_dies_wherever_no_token_is_lost(client, whole, points, losses):
    which = len(losses) % 2
    orders = [points.order(name, passing=passing) for name, passing in losses]
    done = ask(client, which)
    for order in orders:
        points.await_passed(order)
    assert done.token_ids == whole[which]


def test_a_value_that_goes_while_it_is_looked_for_is_computed_again(client, whole, points, redis):
    """What a restoring worker has found named is deleted before it is read."""
    lost, frozen = points.order("rows-kept", passing=2), points.order("found", "SIGSTOP")
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(ask, client, 0)
        points.await_passed(lost)
        pid = points.await_passed(frozen)
        with redis.admin() as admin:
            admin.delete(*admin.keys("kvsluice:frame:*"))
        os.kill(pid, signal.SIGCONT)
        done = asked.result(120)
    assert done.token_ids == whole[0]
    assert done.durability.recomputed_prompt_tokens == len(PROMPT)


def test_who_freezes_in_the_middle_of_a_write_ends_it_in_vain(victim, client, whole, points, redis):
    """Rows of generated tokens are stored and not named yet; meanwhile another worker goes on, and ends."""
    frozen = points.order("rows-unnamed", "SIGSTOP", passing=2)
    done = ask(client, 1)
    pid = points.await_passed(frozen)
    assert done.token_ids == whole[1]
    assert done.durability.migrations == 1
    os.kill(pid, signal.SIGCONT)
    assert ask(client, 1).token_ids == whole[1]
    assert keys_without_end(redis) == []
