"""Decode workers of a running service are killed and frozen, over and over, while clients compare every answer.

    python -P -m kvsluice.benchmarks.fault_runs --kills 50 --stalls 50

Writes benchmarks/results/faults.json. A service with two decode workers over a redis-server
of its own, eight clients at once: greedy and seeded answers at every level of durability. Each answer has to be, token
for token, what the same request gave before any fault. A request that says different things alone and beside others is
set aside: a matrix product's rounding depends on the batch, and a draw from a flat distribution can lie on an edge. The
seed draws requests, victims and moments.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from ..client import Client
from ..errors import KvsluiceError
from ..evals.report import RESULTS, write_results
from ..evals.service_process import running_redis, running_service
from .bench_failover import Service

STREAMS = 8
PROMPTS = (60, 200, 450)
NEW_TOKENS = (40, 90)
LEVELS = ("none", "handoff", "tokens", "tokens")
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9, "seed": 11},
    {"temperature": 1.0, "seed": 12, "presence_penalty": 0.4},
)
LEASE_S = 3.0
QUIET_S = (0.5, 4.0)  # between a worker's return and the next fault


@dataclass(frozen=True)
class Request:
    """One that is asked again and again."""

    prompt: tuple[int, ...]
    options: dict[str, Any]

    def ask(self, client: Client) -> Any:
        return client.generate(list(self.prompt), ignore_eos=True, timeout_s=300.0, **self.options)


@dataclass
class Outcome:
    """What came of all answers; shared by the clients' threads.

    Attributes:
        answers: that came; wrong: with other tokens; moved: that other workers went on with.
        errors: requests that ended with an error, by its type.
    """

    answers: int = 0
    wrong: int = 0
    moved: int = 0
    migrations: int = 0
    recomputed_tokens: int = 0
    recomputed_prompt_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, done: Any, wanted: Any) -> None:
        with self.lock:
            self.answers += 1
            self.wrong += done.token_ids != wanted
            self.moved += done.durability.migrations > 0
            self.migrations += done.durability.migrations
            self.recomputed_tokens += done.durability.recomputed_tokens
            self.recomputed_prompt_tokens += done.durability.recomputed_prompt_tokens

    def fail(self, error: KvsluiceError) -> None:
        with self.lock:
            self.errors[error.type_name] += 1

    def results(self) -> dict[str, Any]:
        asked = self.answers + sum(self.errors.values())
        kept = {name: value for name, value in vars(self).items() if name not in ("lock", "errors")}
        return kept | {"errors": dict(self.errors), "success_rate": self.answers / max(1, asked)}


def requests(draw: random.Random) -> list[Request]:
    """Of every level and sampling."""
    made = []
    for number, level in enumerate(LEVELS * len(SAMPLINGS)):
        prompt = tuple(draw.randrange(100, 40_000) for _ in range(draw.choice(PROMPTS)))
        options = SAMPLINGS[number % len(SAMPLINGS)] | {"durability": level, "max_tokens": draw.randint(*NEW_TOKENS)}
        made.append(Request(prompt, options))
    return made


class Load:
    """Clients that ask until they are told to stop."""

    def __init__(self, address: str, asked: list[Request], wanted: list[Any], seed: int) -> None:
        self.outcome = Outcome()
        self._address, self._asked, self._wanted, self._seed = address, asked, wanted, seed
        self._stopped = threading.Event()
        self._threads = ThreadPoolExecutor(STREAMS)
        self._running = [self._threads.submit(self._ask, number) for number in range(STREAMS)]

    def stop(self) -> Outcome:
        """Let what runs end."""
        self._stopped.set()
        for one in self._running:
            one.result()
        self._threads.shutdown()
        return self.outcome

    def _ask(self, number: int) -> None:
        draw = random.Random(self._seed * 1000 + number)
        with Client(self._address) as client:
            while not self._stopped.is_set():
                index = draw.randrange(len(self._asked))
                try:
                    self.outcome.count(self._asked[index].ask(client), self._wanted[index])
                except KvsluiceError as exc:
                    self.outcome.fail(exc)


def undisturbed(address: str, asked: list[Request]) -> tuple[list[Request], list[Any], int]:
    """The requests whose answers do not depend on their company, those answers, and how many were set aside."""
    with Client(address) as client, ThreadPoolExecutor(STREAMS) as threads:
        alone = [request.ask(client).token_ids for request in asked]
        beside = [list(threads.map(lambda request: request.ask(client).token_ids, asked)) for _ in range(2)]
    firm = [i for i, ids in enumerate(alone) if all(run[i] == ids for run in beside)]
    return [asked[i] for i in firm], [alone[i] for i in firm], len(asked) - len(firm)


def kill(service: Service, draw: random.Random, number: int) -> None:
    """Kill a decode worker and wait for its successor."""
    os.kill(draw.choice(service.workers()), signal.SIGKILL)
    service.await_successor(number + 1)


def stall(service: Service, draw: random.Random, number: int) -> None:
    """Freeze a decode worker until it has lost its lease, and let it go on."""
    victim = draw.choice(service.workers())
    os.kill(victim, signal.SIGSTOP)
    time.sleep(LEASE_S * 1.5 + 1)
    os.kill(victim, signal.SIGCONT)
    time.sleep(1.0)


def run(kills: int, stalls: int, seed: int, console: Console) -> dict[str, Any]:
    """Both kinds of faults, one after the other. Returns what came of each."""
    draw, found = random.Random(seed), dict[str, Any]()
    arguments = ["--model", "smollm2-135m", "--decode-workers", "2", "--torch-threads", "1"]
    arguments += ["--worker-lease-s", str(LEASE_S), "--default-recipe", "sluice-full", "--max-migrations", "16"]
    with running_redis() as redis, running_service(*arguments, "--store-url", f"redis://{redis}") as process:
        service, asked = Service(process), requests(draw)
        asked, wanted, found["set_aside"] = undisturbed(process.address, asked)
        for name, fault, count in (("kills", kill, kills), ("stalls", stall, stalls)):
            load = Load(process.address, asked, wanted, seed)
            with console.status(f"{count} {name} at {STREAMS} streams") as status:
                for number in range(count):
                    time.sleep(draw.uniform(*QUIET_S))
                    fault(service, draw, number)
                    status.update(f"{number + 1} of {count} {name}: {load.outcome.answers} answers")
                found[name] = {"faults": count} | load.stop().results()
            console.print(name, found[name])
        with Client(process.address) as client:
            found["after"] = {"equal": all(r.ask(client).token_ids == w for r, w in zip(asked, wanted, strict=True))}
    return found


def main() -> int:
    """The command. Returns 1 where an answer was wrong or a request failed."""
    parser = argparse.ArgumentParser(prog="fault_runs", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, metavar="N")
    parser.add_argument("--stalls", type=int, default=50, metavar="N")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32), metavar="N")
    given = parser.parse_args()
    console = Console()
    console.print(f"seed {given.seed}")
    found = run(given.kills, given.stalls, given.seed, console)
    write_results(RESULTS / "faults.json", {"seed": given.seed, **found})
    clean = all(not one["wrong"] and not one["errors"] for one in (found["kills"], found["stalls"]))
    return 0 if clean and found["after"]["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
