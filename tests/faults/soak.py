"""A fleet under load and random faults, all drawn from one seed; then everything has to be as it was before.

    make soak SECONDS=600 [SEED=7]

Eight clients ask greedy and seeded requests at every level of durability; some read slowly, some leave. Meanwhile
workers are killed and frozen, and the store is restarted empty, frozen, emptied, filled, cut off, delayed and garbled
(`rig/schedule.py`). Every answer has to be, token for token, what the same request gave before any fault; requests
whose answer depends on their company are set aside as in `benchmarks/fault_runs.py`.

Prints the seed, from which the same faults are drawn again, and ends with 1 where something was wrong. `--json` writes
what was found, with hardware and commit.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from kvsluice.benchmarks.fault_runs import STREAMS, Load, Manner, Outcome, Request, described, requests, undisturbed
from kvsluice.client import Client
from kvsluice.evals.report import write_results
from kvsluice.services.processes import Process
from kvsluice.tests.faults.rig.fleet import Fleet, running_fleet
from kvsluice.tests.faults.rig.leaks import keys_without_end
from kvsluice.tests.faults.rig.processes import wait_until
from kvsluice.tests.faults.rig.schedule import befall, drawn_faults

MANNERS = (*[Manner.READS] * 6, Manner.READS_SLOWLY, Manner.LEAVES)
MIB = 1 << 20

# What a process may have more of after the faults than the one of its role that had most before them.
MORE_DESCRIPTORS = 16  # connections to the store are opened when they are needed, and kept
MORE_THREADS = 8  # as are threads of executors
MORE_TASKS = 2  # one that is just asking or telling
MORE_MEMORY = 1.25, 64 * MIB  # a factor and bytes: allocators keep what they have had at the worst moment


@dataclass(frozen=True)
class Footprint:
    """What one process has open."""

    descriptors: int
    threads: int
    tasks: int
    memory_bytes: int

    def most(self, other: Footprint) -> Footprint:
        """Of each, the larger."""
        return Footprint(*(max(pair) for pair in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def bound(self) -> Footprint:
        """What is no leak where this was there before."""
        factor, more_bytes = MORE_MEMORY
        return Footprint(
            self.descriptors + MORE_DESCRIPTORS,
            self.threads + MORE_THREADS,
            self.tasks + MORE_TASKS,
            int(self.memory_bytes * factor) + more_bytes,
        )


def footprints(fleet: Fleet) -> dict[str, Footprint]:
    """By role, the largest of its processes."""
    roles = ("gateway", *fleet.sizes)
    processes: dict[str, list[Process]] = {role: fleet.actors(role) for role in roles}
    tasks = fleet.points.tasks([process.pid for found in processes.values() for process in found])
    found: dict[str, Footprint] = {}
    for role in roles:
        for process in processes[role]:
            look = psutil.Process(process.pid)
            one = Footprint(
                look.num_fds(), look.num_threads(), tasks[process.pid].total(), look.memory_info().rss
            )  # fmt: skip
            found[role] = one.most(found[role]) if role in found else one
    return found


def grown(before: dict[str, Footprint], now: dict[str, Footprint]) -> list[str]:
    """What is past its bound."""
    return [
        f"{role}: {name} {getattr(now[role], name)}, at most {allowed} were expected"
        for role in before
        for name, allowed in asdict(before[role].bound()).items()
        if getattr(now[role], name) > allowed
    ]


def held(fleet: Fleet) -> list[str]:
    """What workers hold although no request runs."""
    found = []
    for role in fleet.sizes:
        for info in fleet.infos(role):
            if info.capacity_bytes != info.free_bytes or info.running or info.waiting or info.pending_tokens:
                found.append(
                    f"{info.worker_id}: {info.capacity_bytes - info.free_bytes} bytes, {info.running} running, "
                    f"{info.waiting} waiting, {info.pending_tokens} tokens to run"
                )
    return found


def await_none(look: Callable[[], list[str]], what: str) -> list[str]:
    """What is still there after a while of what `look` finds."""
    left: list[str] = []

    def none_left() -> bool:
        nonlocal left
        left = look()
        return not left

    try:
        wait_until(none_left, what)
    except AssertionError:
        return left
    return []


def wrongs(
    fleet: Fleet, outcome: Outcome, asked: Sequence[Request], wanted: list[Any], before: dict[str, Footprint]
) -> list[str]:
    """All that is not as it has to be once the fleet has healed."""
    found = [f"{outcome.wrong} answers with wrong tokens: {outcome.differences}"] if outcome.wrong else []
    late = outcome.errors["DeadlineExceeded"]
    found += [f"{late} requests without an end before their deadline"] if late else []
    found += [f"no end: {key}" for key in keys_without_end(fleet.redis)]
    with Client(fleet.address) as client:
        again = [request.ask(client) for request in asked]
    found += [f"request {i} differs afterwards" for i, w in enumerate(wanted) if again[i].token_ids != w]
    found += [
        f"request {i} is not kept afterwards"
        for i, request in enumerate(asked)
        if request.options["durability"] != "none" and not again[i].durability.kept
    ]
    found += await_none(lambda: held(fleet), "workers hold nothing")
    return found + await_none(lambda: grown(before, footprints(fleet)), "nothing has grown")


def soak(fleet: Fleet, seconds: float, seed: int, console: Console, asked: Sequence[Request]) -> dict[str, Any]:
    """Break a whole fleet for so long.

    Args:
        asked: one of these at a time by each client.

    Returns:
        What came of it; `wrong` is empty where everything is as it has to be.
    """
    asked, wanted, set_aside = undisturbed(fleet.address, asked)
    before = footprints(fleet)
    faults = drawn_faults(seed, seconds)
    console.print(f"{len(faults)} faults in {seconds:g} s at {STREAMS} streams, {len(asked)} requests")
    began_s = time.monotonic()
    load = Load(fleet.address, asked, wanted, seed, MANNERS)
    try:
        done = befall(fleet, faults)
        time.sleep(max(0.0, began_s + seconds - time.monotonic()))
    finally:
        outcome = load.stop()
    took_s = time.monotonic() - began_s
    fleet.await_whole()
    wrong = wrongs(fleet, outcome, asked, wanted, before)
    return {
        "seed": seed,
        "seconds": seconds,
        "took_s": took_s,
        "workers": fleet.sizes,
        "faults": dict(done),
        "set_aside": set_aside,
        "asked": described(asked),
        "load": outcome.results(),
        "before": {role: asdict(one) for role, one in before.items()},
        "after": {role: asdict(one) for role, one in footprints(fleet).items()},
        "wrong": wrong,
        "schedule": [asdict(fault) for fault in faults],
    }


def main() -> int:
    """The command. Returns 1 where something was wrong."""
    parser = argparse.ArgumentParser(prog="soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0, metavar="S")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32), metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    console = Console()
    console.print(f"seed {given.seed}")
    with tempfile.TemporaryDirectory() as folder, running_fleet(Path(folder), {}, decode_workers=2) as fleet:
        found = soak(fleet, given.seconds, given.seed, console, requests(random.Random(given.seed)))
    console.print({name: value for name, value in found.items() if name != "schedule"})
    if given.json is not None:
        write_results(given.json, found)
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
