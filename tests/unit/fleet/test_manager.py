"""The controller's logic over a runtime that only notes what it is told, on a simulated clock."""

from __future__ import annotations

import asyncio
import itertools
import json
from dataclasses import replace

import pytest

from kvsluice.errors import ConfigError, InternalError, WorkerLost
from kvsluice.services.config import ServeConfig
from kvsluice.services.fleet import manager
from kvsluice.services.fleet.manager import Manager
from kvsluice.services.fleet.report import GatewaySight, Load, Report

LEASE_S = 30.0
ROLES = {"prefill": ("prefill",), "decode": ("decode",), "gateway": ("gateway",), "both": ("prefill", "decode")}


def cluster(decode=1, prefill=1, seqs=8, **more):
    return json.dumps(
        {
            "settings": {"model": "tiny", "port": 0, "http_port": 0},
            "groups": [
                {"name": "prefill", "role": "prefill", "replicas": prefill},
                {"name": "decode", "role": "decode", "replicas": decode, "settings": {"max_num_seqs": seqs}},
            ],
            "drain_s": 100,
            "lease_s": LEASE_S,
            **more,
        }
    )


class Runtime:
    """Notes what it is told; processes come up when the test has them report."""

    def __init__(self):
        self.started, self.stopped, self.restarted, self.full = {}, [], [], set()

    async def start(self, worker_id, group, fleet):
        self.started[worker_id] = group

    async def stop(self, worker_id, grace_s):
        self.stopped.append((worker_id, grace_s))

    async def restart(self, worker_id):
        self.restarted.append(worker_id)

    async def place(self, worker_id):
        return "no room" if worker_id in self.full else None


class World:
    """A manager, and processes that report what they are said to."""

    def __init__(self, kept=None, runtime=None):
        self.at_s, self.kept, self.runtime = 0.0, kept, runtime or Runtime()
        self.manager = Manager(self.runtime, self.keep, kept, now=lambda: self.at_s, wall_ns=lambda: 10**9)
        self.incarnations, self.loads, self.sights = {}, {}, {}

    async def keep(self, text):
        self.kept = text

    async def report(self, *workers, **changes):
        answers = []
        for worker_id in workers:
            group = self.manager.replicas.get(worker_id, None)
            role = group.role if group else "decode"
            sight = None
            if role == "gateway":
                sight = self.sights.get(worker_id, GatewaySight(self.manager.table.generation, ready=True))
            report = Report(
                worker_id, self.incarnations.get(worker_id, "first"), ROLES[role], f"10.0.0.1:{len(worker_id)}",
                "10.0.0.1", 1, "tiny", 8, "0", self.loads.get(worker_id, Load()), sight,
            )  # fmt: skip
            answers.append(await self.manager.report(replace(report, **changes)))
        return answers

    async def go(self, seconds=1.0, *, silent=()):
        """Time passes; everybody but the silent ones reports, and the manager looks at everything."""
        self.at_s += seconds
        for one in list(self.manager.replicas.values()):
            if one.worker_id not in silent and one.worker_id not in self.runtime.full:
                await self.report(one.worker_id)
        await self.manager.step()
        await asyncio.gather(*self.manager._tasks)
        await self.manager.step()

    async def until_settled(self):
        for _ in range(50):
            if self.manager.status()["converged"]:
                return
            await self.go()
        raise AssertionError(self.manager.status())

    @property
    def members(self):
        return {(m.worker_id, m.draining) for m in self.manager.table.view().members}

    def states(self):
        return {one.worker_id: one.state for one in self.manager.replicas.values()}


@pytest.fixture
async def world():
    one = World()
    await one.manager.apply(cluster())
    await one.until_settled()
    return one


async def test_what_is_applied_is_started_and_belongs_once_it_reports():
    one = World()
    await one.manager.apply(cluster(decode=2))
    assert set(one.runtime.started) == {"prefill-0", "decode-0", "decode-1", "gateway-0"}
    assert one.members == set()
    await one.go()
    assert one.members == {(name, False) for name in one.runtime.started}
    assert one.manager.status()["converged"]


async def test_looks_at_once_start_nobody_twice():
    one = World()
    begin = one.runtime.start

    async def slowly(*given):
        await asyncio.sleep(0)
        await begin(*given)

    one.runtime.start = slowly
    await asyncio.gather(one.manager.apply(cluster(decode=2)), *(one.manager.step() for _ in range(3)))
    assert sorted(one.runtime.started) == ["decode-0", "decode-1", "gateway-0", "prefill-0"]


async def test_one_that_cannot_be_ended_now_is_ended_later(world):
    stop, tries = world.runtime.stop, []

    async def refuse_once(worker_id, grace_s):
        tries.append(worker_id)
        if len(tries) == 1:
            raise WorkerLost("Ray does not answer")
        await stop(worker_id, grace_s)

    world.runtime.stop = refuse_once
    await world.manager.drain(["decode-0"], [])
    await world.go()
    await world.go()
    assert "decode-0" not in world.states() and tries == ["decode-0", "decode-0"]


async def test_all_processes_of_a_fleet_get_one_token_and_a_file_takes_its_place():
    one = World()
    await one.manager.apply(cluster())
    tokens = {ServeConfig.from_json(group.config_json).fleet_tokens for group in one.runtime.started.values()}
    assert len(tokens) == 1 and len(next(iter(tokens))[0]) == 64
    two = World()
    await two.manager.apply(cluster(settings={"model": "tiny", "fleet_token_file": "/run/token"}))
    assert {ServeConfig.from_json(g.config_json).fleet_tokens for g in two.runtime.started.values()} == {()}


async def test_one_that_falls_silent_leaves_the_membership_and_is_started_again(world):
    await world.go(LEASE_S - 1, silent={"decode-0"})
    assert ("decode-0", False) in world.members
    await world.go(2, silent={"decode-0"})
    assert ("decode-0", False) not in world.members
    assert world.runtime.restarted == ["decode-0"]
    world.incarnations["decode-0"] = "second"
    await world.go()
    assert ("decode-0", False) in world.members
    assert world.manager.replicas["decode-0"].restarts == 1


async def test_an_incarnation_that_another_has_followed_has_to_end(world):
    world.incarnations["decode-0"] = "second"
    assert await world.report("decode-0") == [True]
    world.incarnations["decode-0"] = "first"
    assert await world.report("decode-0") == [False]
    assert await world.report("decode-7") == [False]


async def test_one_that_finds_no_room_waits_and_one_that_has_room_and_does_not_come_is_replaced(world):
    world.runtime.full = {"decode-1"}
    await world.manager.apply(cluster(decode=2))
    await world.go(1000)
    assert world.states()["decode-1"] == "starting"
    assert "no room" in str(world.manager.status())
    world.runtime.full = set()
    await world.go(299, silent={"decode-1"})
    assert "decode-1" in world.states()
    await world.go(2, silent={"decode-1"})
    assert "decode-1" not in world.states()
    assert "decode-2" in world.states()


async def test_one_that_cannot_start_is_tried_again_after_longer_and_longer_pauses(world):
    await world.manager.apply(cluster(decode=2))
    tries = []
    for _ in range(200):
        world.at_s += 1.0
        if world.states()["decode-1"] == "starting":
            await world.report("decode-1", error="no weights", error_type="BrokenCheckpoint")
        await world.report("prefill-0", "decode-0", "gateway-0")
        before = len(world.runtime.restarted)
        await world.manager.step()
        tries += [world.at_s] * (len(world.runtime.restarted) - before)
    pauses = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert pauses == sorted(pauses) and pauses[-1] > 2 * pauses[0]
    (shown,) = [w for w in world.manager.status()["workers"] if w["worker"] == "decode-1"]
    assert (shown["error"], shown["error_type"]) == ("no weights", "BrokenCheckpoint")


class TestDrain:
    async def test_nothing_new_at_once_and_the_end_when_no_gateway_and_no_load_is_left(self, world):
        before = world.manager.table.generation
        world.loads["decode-0"] = Load(running=1)
        assert await world.manager.drain(["decode-0"], []) == ["decode-0"]
        assert ("decode-0", True) in world.members
        # the gateway does not know it yet
        world.sights["gateway-0"] = GatewaySight(before, {}, ready=True)
        world.loads["decode-0"] = Load()
        await world.go()
        assert world.states()["decode-0"] == "draining"
        # it knows it, and something is on its way there
        now = world.manager.table.generation
        world.sights["gateway-0"] = GatewaySight(now, {"decode-0": 1}, ready=True)
        await world.go()
        assert world.states()["decode-0"] == "draining"
        # the worker has something that no gateway waits for any more
        world.sights["gateway-0"] = GatewaySight(now, {}, ready=True)
        world.loads["decode-0"] = Load(waiting=1)
        await world.go()
        assert world.states()["decode-0"] == "draining"
        world.loads["decode-0"] = Load()
        await world.go()
        assert "decode-0" not in world.states()
        assert ("decode-0", 0.0) in world.runtime.stopped
        assert "decode-1" in world.runtime.started  # the group's size holds

    async def test_the_time_ends_what_does_not_end_by_itself(self, world):
        world.loads["decode-0"] = Load(running=1)
        await world.manager.drain(["decode-0"], [], 50.0)
        await world.go(49)
        assert "decode-0" in world.states()
        await world.go(2)
        assert "decode-0" not in world.states()

    async def test_one_that_is_lost_meanwhile_is_not_waited_for(self, world):
        world.loads["decode-0"] = Load(running=1)
        await world.report("decode-0")
        await world.manager.drain(["decode-0"], [])
        await world.go(LEASE_S + 1, silent={"decode-0"})
        assert "decode-0" not in world.states()

    async def test_an_emptied_group_stays_empty_until_a_fleet_is_applied(self, world):
        await world.manager.drain([], ["decode"])
        await world.go(10)
        await world.go(10)
        assert not [name for name in world.states() if name.startswith("decode")]
        await world.manager.apply(cluster())
        assert "decode-1" in world.states()

    async def test_a_gateway_is_given_its_time(self, world):
        await world.manager.drain(["gateway-0"], [])
        await world.go()
        assert ("gateway-0", 100) in world.runtime.stopped

    async def test_whom_there_is_not(self, world):
        with pytest.raises(ConfigError, match=r"worker: there is no decode-9; allowed: decode-0, gateway-0, prefill-0"):
            await world.manager.drain(["decode-9"], [])
        with pytest.raises(ConfigError, match=r"group: there is no x; allowed: decode, gateway, prefill"):
            await world.manager.drain([], ["x"])


async def test_an_upgrade_keeps_serving_and_ends_with_the_new_version(world):
    await world.manager.apply(cluster(seqs=4))
    fewest = 1
    while not world.manager.status()["converged"]:
        await world.go()
        fewest = min(fewest, sum(not draining for name, draining in world.members if name.startswith("decode")))
    assert fewest == 1
    assert set(world.states()) == {"prefill-0", "decode-1", "gateway-0"}  # nobody else was touched
    assert world.manager.fleet.group("decode").max_num_seqs == 4


async def test_a_later_manager_goes_on_with_what_an_earlier_one_kept(world):
    world.loads["decode-0"] = Load(running=1)
    await world.go()
    generation = world.manager.table.generation
    later = World(world.kept, world.runtime)
    later.manager.table._generation = generation + 100  # the wall clock's work
    started = dict(world.runtime.started)
    await later.manager.step()
    assert (await later.manager.watch(generation, 0.0)).generation == generation  # hidden: nobody loses a worker
    await later.report("decode-0", "gateway-0")
    await later.manager.step()
    assert (await later.manager.watch(generation, 0.0)).generation == generation
    await later.report("prefill-0")
    await later.manager.step()
    view = await later.manager.watch(generation, 0.0)
    assert {member.worker_id for member in view.members} == {"decode-0", "gateway-0", "prefill-0"}
    assert world.runtime.started == started and world.runtime.restarted == []
    assert later.manager.status()["converged"]


async def test_what_did_not_outlive_the_earlier_manager_is_given_up_after_a_lease(world):
    later = World(world.kept, world.runtime)
    await later.report("gateway-0", "prefill-0")
    later.at_s = LEASE_S + 1
    await later.report("gateway-0", "prefill-0")
    await later.manager.step()
    assert {m.worker_id for m in (await later.manager.watch(0, 0.0)).members} == {"gateway-0", "prefill-0"}
    await later.go(301, silent={"decode-0"})
    assert "decode-1" in later.states() and "decode-0" not in later.states()


async def test_load_makes_a_group_grow_between_its_bounds_and_shrink_again():
    scaling = {"up_after_s": 2, "down_after_s": 10, "cooldown_s": 2}
    groups = [
        {"name": "prefill", "role": "prefill"},
        {"name": "decode", "role": "decode", "replicas": {"min": 1, "max": 2}, "scaling": scaling},
    ]
    one = World()
    await one.manager.apply(cluster(groups=groups))
    await one.until_settled()
    one.loads["decode-0"] = Load(running=8, waiting=4, capacity_bytes=100, free_bytes=10)
    for _ in range(6):
        await one.go()
    assert one.states().keys() >= {"decode-0", "decode-1"}
    one.loads["decode-0"] = Load(running=1)  # the idle one goes, whichever it is
    for _ in range(20):
        await one.go()
    assert {name for name in one.states() if name.startswith("decode")} == {"decode-0"}


class Stubborn(Runtime):
    """Starts slowly; does not end whom it is told to the first few times."""

    def __init__(self, failures):
        super().__init__()
        self.failures, self.asked, self.held = failures, asyncio.Event(), asyncio.Event()

    async def start(self, worker_id, group, fleet):
        self.asked.set()
        await self.held.wait()
        await super().start(worker_id, group, fleet)

    async def stop(self, worker_id, grace_s):
        if self.failures:
            self.failures -= 1
            raise WorkerLost("Ray does not do what it is told")
        assert worker_id in self.started, "it is being started: nobody would end it any more"
        await super().stop(worker_id, grace_s)


async def test_who_cannot_be_ended_at_first_is_not_left_behind(monkeypatch):
    monkeypatch.setattr(manager, "AGAIN_S", 0.0)
    runtime = Stubborn(failures=3)
    world = World(runtime=runtime)
    applied = asyncio.create_task(world.manager.apply(cluster()))
    await runtime.asked.wait()
    down = asyncio.create_task(world.manager.shutdown(7.0))
    await asyncio.sleep(0)
    runtime.held.set()  # the processes come while the fleet is taken down
    await asyncio.gather(applied, down)
    assert world.states() == {}
    assert {worker for worker, _ in runtime.stopped} == set(runtime.started)


async def test_who_cannot_be_ended_at_all_is_named_and_can_be_ended_later(world, monkeypatch):
    monkeypatch.setattr(manager, "AGAIN_S", 0.0)
    monkeypatch.setattr(world.manager, "_runtime", broken := Stubborn(failures=100))
    with pytest.raises(InternalError, match="decode-0, gateway-0, prefill-0"):
        await world.manager.shutdown(0.0)
    broken.failures, broken.started = 0, world.runtime.started
    await world.manager.shutdown(0.0)
    assert world.states() == {}


async def test_nothing_is_left_when_it_is_taken_down(world):
    await world.manager.shutdown(7.0)
    assert world.states() == {} and world.members == set()
    assert world.runtime.stopped[0] == ("gateway-0", 7.0)  # first those that take requests
    with pytest.raises(ConfigError, match="is being taken down"):
        await world.manager.apply(cluster())
