"""A short sample of the soak, and what its schedule is drawn from."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

from rich.console import Console

from kvsluice.benchmarks.fault_runs import requests
from kvsluice.tests.faults.rig.schedule import LANES, drawn_faults
from kvsluice.tests.faults.soak import Footprint, grown, soak

SEED = 5


def test_a_schedule_follows_from_its_seed_alone():
    faults = drawn_faults(SEED, 600)
    assert faults == drawn_faults(SEED, 600)
    assert faults != drawn_faults(SEED + 1, 600)
    assert {fault.kind for fault in faults} == {kind for kinds in LANES.values() for kind in kinds}
    for lane, kinds in LANES.items():
        mine = [fault for fault in faults if fault.lane == lane]
        assert all(one.begins_s + one.lasts_s < other.begins_s for one, other in pairwise(mine))
        often = Counter(fault.kind for fault in mine)
        assert max(often.values()) - min(often[kind] for kind in kinds) <= 1


def test_what_has_grown_is_named():
    before = {"decode": Footprint(50, 40, 8, 1 << 30)}
    assert grown(before, {"decode": Footprint(66, 48, 10, 1 << 30)}) == []
    (line,) = grown(before, {"decode": Footprint(67, 48, 10, 1 << 30)})
    assert line == "decode: descriptors 67, at most 66 were expected"


def test_a_short_soak_leaves_nothing_wrong(fleet):
    asked = requests(random.Random(SEED), count=4, prompts=(60, 120), new_tokens=(16, 28))
    found = soak(fleet, 12.0, SEED, Console(stderr=True), asked)
    assert found["wrong"] == []
    assert found["load"]["answers"] > 0
