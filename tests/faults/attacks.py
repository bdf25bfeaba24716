"""Streams that are kept run, a worker is killed under them, and at that moment something befalls the store.

    python -P -m kvsluice.tests.faults.attacks --seconds 10 [--json FILE]

The suite does the same for a shorter time. The command prints what came of each attack and ends with 1 where something
was wrong.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from kvsluice.benchmarks.fault_runs import Request
from kvsluice.client import Client
from kvsluice.errors import KvsluiceError
from kvsluice.evals.report import write_results
from kvsluice.tests.faults.rig.fleet import Fleet, running_fleet
from kvsluice.tests.faults.rig.leaks import keys_without_end
from kvsluice.tests.faults.rig.processes import wait_until
from kvsluice.tests.faults.rig.schedule import LANES, Fault

KINDS = ("restart store", "freeze store", "flush store", "fill store", "partition", "lose replies", "corrupt")
PROMPTS = [tuple((i * step) % 40_000 + 100 for i in range(200)) for step in (7, 11, 13)]
OPTIONS: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "seed": 5})
REQUESTS = [
    Request(prompt, OPTIONS[i % 2] | {"durability": "tokens", "max_tokens": 60}) for i, prompt in enumerate(PROMPTS)
]
STRUCK_AT = 20  # tokens that have come
NUMBER = 1000  # bytes that a filled store has left, and the byte that is garbled


def answers(client: Client) -> list[Sequence[int]]:
    """What nothing has disturbed, all at once as under attack."""
    with ThreadPoolExecutor(len(REQUESTS)) as threads:
        return list(threads.map(lambda request: request.ask(client).token_ids, REQUESTS))


def attack(fleet: Fleet, client: Client, kind: str, lasts_s: float, wanted: Sequence[Sequence[int]]) -> list[str]:
    """Strike a whole fleet once. Returns what is not as it has to be, during it and afterwards."""
    begun = threading.Barrier(len(REQUESTS) + 1)

    def run(request: Request) -> Any:
        stream, came = request.stream(client), 0
        for chunk in stream:
            before, came = came, came + len(chunk.token_ids)
            if before < STRUCK_AT <= came:
                begun.wait(120)
        return stream.completion

    wrong = []
    with ThreadPoolExecutor(len(REQUESTS)) as threads:
        running = [threads.submit(run, request) for request in REQUESTS]
        begun.wait(120)
        with LANES["store"][kind](fleet, Fault("store", kind, 0.0, lasts_s, NUMBER)):
            os.kill(fleet.busiest("decode").pid, signal.SIGKILL)
            time.sleep(lasts_s)
        for i, one in enumerate(running):
            try:
                done = one.result()
            except KvsluiceError as exc:
                wrong.append(f"request {i}: {exc.type_name}: {exc}")
            else:
                wrong += [f"request {i}: other tokens"] if done.token_ids != wanted[i] else []
    fleet.await_whole()
    wait_until(lambda: _is_kept(client), "requests are kept again", 60.0)
    return wrong + [f"no end: {key}" for key in keys_without_end(fleet.redis)]


def _is_kept(client: Client) -> bool:
    prompt = list(PROMPTS[0][:50])
    return client.generate(prompt, max_tokens=10, ignore_eos=True, durability="tokens").durability.kept


def main() -> int:
    """The command. Returns 1 where something was wrong."""
    parser = argparse.ArgumentParser(prog="attacks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="how long each lasts")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    console, found = Console(), dict[str, list[str]]()
    with (
        tempfile.TemporaryDirectory() as folder,
        running_fleet(Path(folder), {}) as fleet,
        Client(fleet.address, timeout_s=300.0) as client,
    ):
        wanted = answers(client)
        for kind in KINDS:
            found[kind] = attack(fleet, client, kind, given.seconds, wanted)
            console.print(f"{kind}, {given.seconds:g} s: {found[kind] or 'ok'}")
    if given.json is not None:
        write_results(given.json, {"seconds": given.seconds, "wrong": found})
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
