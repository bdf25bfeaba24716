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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from itertools import cycle, islice
from typing import Any

from rich.console import Console

from ..client import Client, Completion, Stream
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
DEADLINE_S = 300.0
SLOW_S = (0.0, 0.3)  # between two reads of a client that reads slowly
LEASE_S = 3.0
QUIET_S = (0.5, 4.0)  # between a worker's return and the next fault


@dataclass(frozen=True)
class Request:
    """One that is asked again and again."""

    prompt: tuple[int, ...]
    options: dict[str, Any]

    def stream(self, client: Client) -> Stream:
        return client.stream(list(self.prompt), ignore_eos=True, timeout_s=DEADLINE_S, **self.options)

    def ask(self, client: Client) -> Completion:
        stream = self.stream(client)
        for _ in stream:
            pass
        return stream.completion


class Manner(Enum):
    """How a client reads."""

    READS = "reads"
    READS_SLOWLY = "reads slowly"  # the workers run ahead as far as they may, and wait
    LEAVES = "leaves"  # cancels in the middle


@dataclass
class Outcome:
    """What came of all answers; shared by the clients' threads.

    Attributes:
        answers: that came; wrong: with other tokens; moved: that other workers went on with.
        left: requests that their client has cancelled.
        differences: of wrong answers, which request it was, how many tokens were right, and what came after them.
        errors: requests that ended with an error, by its type.
    """

    answers: int = 0
    wrong: int = 0
    left: int = 0
    moved: int = 0
    migrations: int = 0
    recomputed_tokens: int = 0
    recomputed_prompt_tokens: int = 0
    differences: list[dict[str, Any]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def compare(self, index: int, token_ids: Sequence[int], wanted: Sequence[int]) -> None:
        """Note whether a request was told what it should be, or its first part."""
        right = next((i for i, (one, other) in enumerate(zip(token_ids, wanted, strict=False)) if one != other), None)
        if right is not None or len(token_ids) > len(wanted):
            self.wrong += 1
            here = len(wanted) if right is None else right
            self.differences.append(
                {
                    "request": index,
                    "right_tokens": here,
                    "of_tokens": len(wanted),
                    "came": list(token_ids[here : here + 4]),
                    "wanted": list(wanted[here : here + 4]),
                }
            )

    def leave(self, index: int, token_ids: Sequence[int], wanted: Sequence[int]) -> None:
        with self.lock:
            self.left += 1
            self.compare(index, token_ids, wanted)

    def count(self, index: int, done: Completion, wanted: Sequence[int]) -> None:
        with self.lock:
            self.answers += 1
            self.compare(index, done.token_ids, wanted)
            self.wrong += len(done.token_ids) < len(wanted)
            self.moved += done.durability.migrations > 0
            self.migrations += done.durability.migrations
            self.recomputed_tokens += done.durability.recomputed_tokens
            self.recomputed_prompt_tokens += done.durability.recomputed_prompt_tokens

    def fail(self, error: KvsluiceError) -> None:
        with self.lock:
            self.errors[error.type_name] += 1

    def results(self) -> dict[str, Any]:
        asked = self.answers + self.left + sum(self.errors.values())
        kept = {name: value for name, value in vars(self).items() if name not in ("lock", "errors")}
        return kept | {"errors": dict(self.errors), "success_rate": (self.answers + self.left) / max(1, asked)}


def requests(
    draw: random.Random,
    count: int = len(LEVELS) * len(SAMPLINGS),
    prompts: Sequence[int] = PROMPTS,
    new_tokens: tuple[int, int] = NEW_TOKENS,
) -> list[Request]:
    """So many, of every level and sampling.

    Args:
        prompts: lengths to draw from; new_tokens: the least and the most of an answer.
    """
    made = []
    for number, level in enumerate(islice(cycle(LEVELS), count)):
        prompt = tuple(draw.randrange(100, 40_000) for _ in range(draw.choice(prompts)))
        options = SAMPLINGS[number % len(SAMPLINGS)] | {"durability": level, "max_tokens": draw.randint(*new_tokens)}
        made.append(Request(prompt, options))
    return made


class Load:
    """Clients that ask until they are told to stop.

    Args:
        asked, wanted: requests, and what they are to be answered.
        manners: of clients, one of which is drawn for each request.
    """

    def __init__(
        self,
        address: str,
        asked: Sequence[Request],
        wanted: Sequence[Sequence[int]],
        seed: int,
        manners: Sequence[Manner] = (Manner.READS,),
    ) -> None:
        self.outcome = Outcome()
        self._address, self._asked, self._wanted, self._seed, self._manners = address, asked, wanted, seed, manners
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
                index, manner = draw.randrange(len(self._asked)), draw.choice(self._manners)
                try:
                    self._read(index, manner, client, draw)
                except KvsluiceError as exc:
                    self.outcome.fail(exc)

    def _read(self, index: int, manner: Manner, client: Client, draw: random.Random) -> None:
        wanted, stream = self._wanted[index], self._asked[index].stream(client)
        ids: list[int] = []
        leave_at = draw.randrange(len(wanted)) if manner is Manner.LEAVES else None
        for chunk in stream:
            ids += chunk.token_ids
            if leave_at is not None and len(ids) >= leave_at:
                stream.cancel()
                self.outcome.leave(index, ids, wanted)
                return
            if manner is Manner.READS_SLOWLY:
                time.sleep(draw.uniform(*SLOW_S))
        self.outcome.count(index, stream.completion, wanted)


def undisturbed(address: str, asked: Sequence[Request]) -> tuple[list[Request], list[Any], int]:
    """The requests whose answers do not depend on their company, those answers, and how many were set aside."""
    with Client(address) as client, ThreadPoolExecutor(STREAMS) as threads:
        alone = [request.ask(client).token_ids for request in asked]
        beside = [list(threads.map(lambda request: request.ask(client).token_ids, asked)) for _ in range(2)]
    firm = [i for i, ids in enumerate(alone) if all(run[i] == ids for run in beside)]
    return [asked[i] for i in firm], [alone[i] for i in firm], len(asked) - len(firm)


def described(asked: Sequence[Request]) -> list[dict[str, Any]]:
    """What was asked, for results; a difference names one by its place."""
    return [{"prompt_tokens": len(request.prompt), **request.options} for request in asked]


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
        found["asked"] = described(asked)
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
