"""`kvsluice bench failover`: from the loss of a decode worker to the next token of the streams that it made.

A service of its own with two decode workers, over a redis-server of its own where no other store is named. In the
middle of an answer the worker that makes it is killed (SIGKILL); what is timed ends with the next token at the client.
One side goes on from the store, the other one has its prompt run again; they take turns, and each answer is compared
with one that nothing has disturbed.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compression.recipe import Recipe
from ..errors import InternalError
from .bench_results import Row
from .bench_service import DEADLINE_S, request_options
from .rows import measured
from .subject import Bench
from .timing import summarize

if TYPE_CHECKING:
    from ..client import Client, Completion
    from ..evals.service_process import ServiceProcess

NEXT_TOKEN = "next token behind a lost decode worker"  # noqa: S105 - not a secret
FROM_STORE, AGAIN = "from the store", "prompt again"
LEVELS = {FROM_STORE: "tokens", AGAIN: "none"}
ACTOR = "ray::DecodeWorker"
LOST_AT = 24  # tokens that have come
NEW_TOKENS = 96
LOOK_S = 0.25  # for how long workers are watched to tell which one computes
RESTART_S = 300.0
SETTLE_S = 1.0  # from a new worker's word that it serves until requests are given to it


@dataclass
class _Answers:
    """What the repetitions of a side have given.

    Attributes:
        next_token_s: from the kill to the next token.
        migrations, recomputed_tokens, recomputed_prompt_tokens: of all answers.
        differing: answers with other tokens than the undisturbed one.
    """

    next_token_s: list[float] = field(default_factory=list)
    migrations: int = 0
    recomputed_tokens: int = 0
    recomputed_prompt_tokens: int = 0
    differing: int = 0


class Service:
    """The service under test.

    Args:
        process: with two decode workers.
    """

    def __init__(self, process: ServiceProcess) -> None:
        self.address = process.address
        self._process = process

    def workers(self) -> list[int]:
        """Process ids of the decode workers."""
        from ..services.processes import descendants

        return [one.pid for one in descendants(self._process.process.pid) if ACTOR in _command_line(one.pid)]

    def busiest(self) -> int:
        """The decode worker that computes most."""
        before = {pid: _cpu_ticks(pid) for pid in self.workers()}
        time.sleep(LOOK_S)
        return max(before, key=lambda pid: _cpu_ticks(pid) - before[pid])

    def kill_busiest(self) -> float:
        """Returns when, by the performance counter."""
        victim = self.busiest()
        killed_s = time.perf_counter()
        os.kill(victim, signal.SIGKILL)
        return killed_s

    def await_successor(self, number: int) -> None:
        """Wait until so many decode workers have taken another's place.

        Raises:
            InternalError: they do not come.
        """
        deadline_s = time.monotonic() + RESTART_S
        while self._process.log.read_text(errors="replace").count("the new decode-") < number:
            if time.monotonic() > deadline_s:
                raise InternalError(f"no new decode worker: {self._process.log_tail()}")
            time.sleep(0.1)
        time.sleep(SETTLE_S)


def measure(bench: Bench) -> list[Row]:
    """Two rows for every recipe and context."""
    rows: list[Row] = []
    bench.progress.expect(len(bench.options.contexts) * len(bench.subject.recipes))
    with _running(bench) as service:
        num_killed = 0
        for context in bench.options.contexts:
            for label, recipe in bench.subject.recipes.items():
                bench.progress.begin(f"a decode worker is lost behind {context} tokens, {label}")
                for side in LEVELS:
                    empty = Row(
                        what=NEXT_TOKEN,
                        side=side,
                        model=bench.subject.name,
                        recipe_fingerprint=recipe.fingerprint,
                        context=context,
                        batch=1,
                        conditions={"recipe": label, "durability": LEVELS[side]},
                    )
                    rows.append(measured(bench, empty, partial(_time_side, bench, service, recipe, num_killed)))
                    num_killed += bench.options.warmup + bench.options.repeats
    return _compared(rows)


def _time_side(bench: Bench, service: Service, recipe: Recipe, num_killed: int, empty: Row) -> Row:
    from ..client import Client

    assert empty.context is not None
    prompt = list(bench.prompt(empty.context, 0))
    asked = request_options(bench.options.recipes[empty.conditions["recipe"]]) | {
        "max_tokens": NEW_TOKENS,
        "temperature": 0.0,
        "ignore_eos": True,
        "durability": empty.conditions["durability"],
    }
    answers = _Answers()
    with Client(service.address, timeout_s=DEADLINE_S) as client:
        whole = client.generate(prompt, **asked).token_ids
        for repeat in range(bench.options.warmup + bench.options.repeats):
            counted = answers if repeat >= bench.options.warmup else _Answers()
            counted.differing += _lose_one(client, service, prompt, asked, counted) != whole
            service.await_successor(num_killed + repeat + 1)
    figures = {
        "migrations": float(answers.migrations),
        "recomputed_tokens": answers.recomputed_tokens / bench.options.repeats,
        "recomputed_prompt_tokens": answers.recomputed_prompt_tokens / bench.options.repeats,
        "answers_that_differ": float(answers.differing),
    }
    return replace(empty, time=summarize(answers.next_token_s), figures=figures)


def _lose_one(client: Client, service: Service, prompt: list[int], asked: dict[str, Any], answers: _Answers) -> Any:
    """Ids of an answer in whose middle the worker that makes it is killed."""
    stream = client.stream(prompt, **asked)
    arrivals: list[float] = []
    reached, seen = threading.Event(), 0

    def read() -> Completion:
        nonlocal seen
        try:
            for chunk in stream:
                arrivals.append(time.perf_counter())
                seen += len(chunk.token_ids)
                if seen >= LOST_AT:
                    reached.set()
            return stream.completion
        finally:
            reached.set()

    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(read)
        reached.wait()
        killed_s = service.kill_busiest()
        done = reading.result()
    if done.durability.migrations != 1:
        raise InternalError(f"{done.durability.migrations} migrations behind one loss")
    # what was on its way still arrives: the wait for the next worker is the longest there is
    _, resumed_s = max((late - early, late) for early, late in pairwise(arrivals) if late > killed_s)
    answers.next_token_s.append(resumed_s - killed_s)
    answers.migrations += 1
    answers.recomputed_tokens += done.durability.recomputed_tokens
    answers.recomputed_prompt_tokens += done.durability.recomputed_prompt_tokens
    return done.token_ids


def _compared(rows: Sequence[Row]) -> list[Row]:
    """The rows, each with how many times as soon it is as the other side."""
    out = []
    for row in rows:
        other = next(
            one for one in rows
            if one.side != row.side and (one.context, one.recipe_fingerprint) == (row.context, row.recipe_fingerprint)
        )  # fmt: skip
        ratios = {}
        if row.side == FROM_STORE and row.time is not None and other.time is not None:
            ratios = {AGAIN: other.time.median_s / row.time.median_s}
        out.append(replace(row, ratios=ratios))
    return out


@contextmanager
def _running(bench: Bench) -> Iterator[Service]:
    from ..evals.service_process import running_redis, running_service

    options, subject = bench.options, bench.subject
    arguments = ["--model", subject.source, "--decode-workers", "2", "--device", str(bench.device)]
    arguments += ["--dtype", str(bench.dtype).removeprefix("torch.")]
    arguments += ["--kv-cache-bytes", str(int(options.cache_gib * (1 << 30)))] if options.cache_gib else []
    arguments += ["--random-weights", "--seed", str(options.seed)] if options.random_weights else []
    with running_redis() as address, running_service(*arguments, "--store-url", f"redis://{address}") as process:
        yield Service(process)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _cpu_ticks(pid: int) -> int:
    """Clock ticks that a process has computed; 0 where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])
