"""From what there is to what is wanted: rolled step by step, with a process that comes up or goes after each."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsluice.services.fleet.reconcile import Drain, Existing, Start, Target, plan

PREFILL = Target("prefill", "m", "v1", 2)
DECODE = Target("decode", "m", "v1", 2)


class World:
    """Takes the steps, and lets what they begin end when it is told to."""

    def __init__(self, *targets, room=100):
        self.targets, self.there, self.number, self.room = list(targets), [], 0, room
        self.fewest = {}

    def steps(self):
        steps = plan(self.targets, self.there)
        for step in steps:
            if isinstance(step, Start):
                target = next(t for t in self.targets if t.name == step.group)
                self.there.append(
                    Existing(f"{step.group}-{self.number}", step.group, target.version, "starting", self.number)
                )
                self.number += 1
            else:
                self.become(step.worker_id, "draining")
        return steps

    def become(self, worker_id, state):
        self.there = [replace(one, state=state) if one.worker_id == worker_id else one for one in self.there]

    def serving(self, group, version=None):
        return [
            one
            for one in self.there
            if one.group == group and one.state == "serving" and version in (None, one.version)
        ]

    def pass_time(self):
        """What starts comes up where there is room, what drains ends."""
        self.there = [one for one in self.there if one.state != "draining"]
        for one in [one for one in self.there if one.state == "starting"]:
            if sum(other.state == "serving" for other in self.there) < self.room:
                self.become(one.worker_id, "serving")

    def settle(self):
        for _ in range(100):
            if not self.steps() and all(one.state == "serving" for one in self.there):
                return
            for target in self.targets:
                num = len(self.serving(target.name))
                self.fewest[target.name] = min(num, self.fewest.get(target.name, num))
            self.pass_time()
        raise AssertionError("it never settles")

    def upgrade(self, version, **changes):
        self.targets = [replace(target, version=version, **changes) for target in self.targets]
        self.fewest = {}


def test_everything_wanted_is_started_at_once():
    world = World(PREFILL, DECODE)
    assert world.steps() == [Start("prefill")] * 2 + [Start("decode")] * 2
    assert world.steps() == []


def test_an_upgrade_starts_one_more_and_never_has_fewer_than_wanted():
    world = World(PREFILL, DECODE)
    world.settle()
    world.upgrade("v2")
    assert world.steps() == [Start("prefill"), Start("decode")]
    world.settle()
    assert {one.version for one in world.there} == {"v2"}
    assert world.fewest == {"prefill": 2, "decode": 2}


def test_where_there_is_no_room_for_both_the_old_goes_first():
    world = World(replace(PREFILL, max_surge=0, max_unavailable=1), room=2)
    world.settle()
    world.upgrade("v2")
    assert world.steps() == [Drain("prefill-1")]
    world.settle()
    assert {one.version for one in world.there} == {"v2"}
    assert world.fewest == {"prefill": 1}


def test_no_old_one_goes_before_each_group_of_the_model_has_a_new_one():
    world = World(PREFILL, DECODE)
    world.settle()
    world.upgrade("v2")
    world.steps()
    new_prefill = next(one for one in world.there if one.group == "prefill" and one.version == "v2")
    world.become(new_prefill.worker_id, "serving")
    assert world.steps() == []
    new_decode = next(one for one in world.there if one.group == "decode" and one.version == "v2")
    world.become(new_decode.worker_id, "serving")
    assert {step.worker_id for step in world.steps() if isinstance(step, Drain)} == {"prefill-1", "decode-3"}


def test_a_new_version_that_never_serves_takes_nobody_away():
    world = World(DECODE)
    world.settle()
    world.upgrade("v2")
    world.steps()
    (new,) = [one for one in world.there if one.version == "v2"]
    world.become(new.worker_id, "failed")
    assert world.steps() == []
    assert len(world.serving("decode", "v1")) == 2
    world.upgrade("v1")  # back again: the broken one goes, nobody else is touched
    assert world.steps() == [Drain(new.worker_id)]


def test_of_too_many_those_that_do_not_serve_go_first_then_those_with_the_least_to_do():
    there = [
        Existing("d-0", "decode", "v1", "serving", 0, busy=3.0),
        Existing("d-1", "decode", "v1", "serving", 1, busy=1.0),
        Existing("d-2", "decode", "v1", "serving", 2, busy=2.0),
        Existing("d-3", "decode", "v1", "lost", 3, busy=9.0),
    ]
    assert plan([DECODE], there) == [Drain("d-3"), Drain("d-1")]


def test_a_group_that_is_no_longer_wanted_goes_once_the_others_serve():
    world = World(DECODE, Target("old", "m", "v1", 1))
    world.settle()
    world.targets = [DECODE, Target("new", "m", "v1", 1)]
    assert world.steps() == [Start("new")]
    world.pass_time()
    assert world.steps() == [Drain("old-2")]


def test_an_emptied_group_has_nobody():
    world = World(DECODE)
    world.settle()
    world.upgrade("v1", count=0)
    assert {step.worker_id for step in world.steps()} == {"decode-0", "decode-1"}


@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    surge=st.integers(0, 3),
    unavailable=st.integers(0, 3),
    versions=st.lists(st.sampled_from(["v1", "v2", "v3"]), max_size=3),
)
def test_every_way_leads_there_within_its_bounds(counts, surge, unavailable, versions):
    if surge == unavailable == 0:
        surge = 1
    world = World(*(Target(f"g{i}", "m", "v0", count, surge, unavailable) for i, count in enumerate(counts)))
    world.settle()
    for version in versions:
        world.upgrade(version)
        world.settle()
        assert {one.version for one in world.there} <= {version}
        for i, count in enumerate(counts):
            assert len(world.serving(f"g{i}")) == count
            assert world.fewest.get(f"g{i}", count) >= count - unavailable


@pytest.mark.parametrize("state", ["lost", "starting", "failed"])
def test_one_that_comes_back_by_itself_still_counts(state):
    world = World(DECODE)
    world.settle()
    world.become("decode-0", state)
    assert world.steps() == []
