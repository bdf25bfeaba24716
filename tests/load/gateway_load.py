"""What the gateway itself costs: many streams held at once, and a token's price and delay beside the workers' stream.

    python -P -m kvsluice.tests.load.gateway_load [--streams 1000] [--json FILE]

The workers have no model: they send tokens at a pace that is set (`paced_workers.py`). Workers, gateway and clients are
processes of their own. The command ends with 1 where a stream was lost or told otherwise than it has to be.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import resource
import statistics
import sys
import time
import uuid
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from kvsluice.evals.report import write_results
from kvsluice.models.tokenizer import load_tokenizer
from kvsluice.services.config import load_config
from kvsluice.services.gateway.membership import Member, MembershipTable
from kvsluice.services.gateway.server import Gateway
from kvsluice.tests.load.clients import Told, asking
from kvsluice.tests.load.paced_workers import serve_workers

MODEL = "smollm2-135m-longctx"
TEXT = "The lighthouse keeper wrote down every ship that passed, its flag, its course and the hour, for thirty years. "
DOORS = ("worker", "grpc", "http")
HELD_TOKENS, HELD_STEP_S = 100, 0.25
COST_STREAMS, COST_TOKENS = 32, 1000
DELAY_STREAMS, DELAY_TOKENS, DELAY_STEP_S = 16, 150, 0.05


async def _serve_gateway(pipe: Connection, workers: Sequence[str], num_streams: int) -> None:
    settings = {"model": "paced", "port": 0, "http_port": 0, "default_recipe": "exact", "max_num_seqs": num_streams}
    members = MembershipTable()
    for role, address in zip(("prefill", "decode"), workers, strict=True):
        await members.register(Member("paced-0", role, address, "first"))  # type: ignore[arg-type]
    gateway = Gateway(load_config(settings | {"max_queue": num_streams}), load_tokenizer(MODEL), members)
    address = await gateway.start()
    while not gateway.ready:
        await gateway.pool.changed.wait()
    pipe.send({"grpc": address, "http": gateway.http_address, "worker": workers[1]})
    while await asyncio.to_thread(pipe.recv) is not None:
        pipe.send((gateway.num_requests, len(asyncio.all_tasks())))
    await gateway.stop()


def serve_gateway(pipe: Connection, workers: Sequence[str], num_streams: int) -> None:
    """Body of the gateway's process: sends its addresses, then counts requests and tasks until it is sent None."""
    asyncio.run(_serve_gateway(pipe, workers, num_streams))


class Rig:
    """The three processes, of which this is the clients'."""

    def __init__(self, num_streams: int) -> None:
        tokenizer = load_tokenizer(MODEL)
        self._ids = tokenizer.encode(TEXT)
        self._decode = tokenizer.decode
        context = multiprocessing.get_context("spawn")
        self._worker_pipe, far = context.Pipe()
        self._workers = context.Process(target=serve_workers, args=(far, self._ids, tokenizer.vocab_size), daemon=True)
        self._workers.start()
        addresses = self._worker_pipe.recv()
        self._gateway_pipe, far = context.Pipe()
        self._gateway = context.Process(target=serve_gateway, args=(far, addresses, num_streams), daemon=True)
        self._gateway.start()
        self.addresses: dict[str, str] = self._gateway_pipe.recv()
        assert self._gateway.pid is not None
        self.gateway = psutil.Process(self._gateway.pid)

    def pace(self, step_s: float, keeps: bool = False) -> dict[str, list[float]] | None:
        """Set the workers' pace. Returns the times that they have kept so far."""
        self._worker_pipe.send((step_s, keeps))
        found: dict[str, list[float]] | None = self._worker_pipe.recv()
        return found

    def running(self) -> tuple[int, int]:
        """Requests and tasks of the gateway."""
        self._gateway_pipe.send(True)
        found: tuple[int, int] = self._gateway_pipe.recv()
        return found

    def close(self) -> None:
        """End both."""
        for pipe, process in ((self._gateway_pipe, self._gateway), (self._worker_pipe, self._workers)):
            pipe.send(None)
            process.join(30)
            if process.is_alive():
                process.kill()

    def wrong(self, door: str, num_tokens: int, told: Sequence[Told]) -> int:
        """How many streams are not what they have to be."""
        ids = (self._ids * (num_tokens // len(self._ids) + 1))[:num_tokens]
        # the first token of a worker's stream is prefill's, and it has no text
        wanted = (num_tokens - 1, "") if door == "worker" else (num_tokens, self._decode(ids))
        return sum((one.tokens, one.text) != wanted or not one.whole for one in told)

    def cpu_s(self) -> float:
        """CPU time of the gateway so far."""
        times = self.gateway.cpu_times()
        return float(times.user + times.system)


async def run_streams(rig: Rig, door: str, num_streams: int, num_tokens: int) -> tuple[list[Told], dict[str, Any]]:
    """Ask for streams, all at once.

    Returns:
        (what came of each, how long it took and what it cost the gateway).
    """
    begun = peak_bytes = most = 0

    def begin() -> None:
        nonlocal begun
        begun += 1

    async def watch() -> None:
        nonlocal peak_bytes, most
        while True:
            peak_bytes = max(peak_bytes, rig.gateway.memory_info().rss)
            most = max(most, begun - sum(task.done() for task in asking_tasks))
            await asyncio.sleep(0.25)

    async with asking(door, rig.addresses, num_streams) as ask:
        cpu_s, start_s = rig.cpu_s(), time.monotonic()
        asking_tasks = [asyncio.create_task(ask(uuid.uuid4().hex, num_tokens, begin)) for _ in range(num_streams)]
        watching = asyncio.create_task(watch())
        told = await asyncio.gather(*asking_tasks)
        seconds, cpu_s = time.monotonic() - start_s, rig.cpu_s() - cpu_s
        watching.cancel()
    tokens = sum(one.tokens for one in told)
    return told, {
        "door": door,
        "streams": num_streams,
        "tokens_each": num_tokens,
        "wrong": rig.wrong(door, num_tokens, told),
        "at_once": most,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "gateway_cpu_us_per_token": cpu_s * 1e6 / tokens,
        "gateway_rss_peak_bytes": peak_bytes,
    }


async def hold(rig: Rig, num_streams: int, rounds: int, console: Console) -> list[dict[str, Any]]:
    """Hold many streams at once, again and again: none may be lost, and memory has to come back."""
    found = []
    for door in ("http", "grpc"):
        for number in range(rounds):
            rig.pace(HELD_STEP_S)
            before = rig.gateway.memory_info().rss
            _, figures = await run_streams(rig, door, num_streams, HELD_TOKENS)
            left = rig.running()
            figures |= {"round": number, "gateway_rss_before_bytes": before, "requests_left": left[0]}
            figures |= {"tasks_left": left[1], "gateway_fds_left": rig.gateway.num_fds()}
            figures["gateway_rss_after_bytes"] = rig.gateway.memory_info().rss
            found.append(figures)
            console.print(
                f"{num_streams} streams over {door}, round {number}: {figures['wrong']} wrong, {figures['at_once']} at "
                f"once, gateway {before >> 20} → {figures['gateway_rss_peak_bytes'] >> 20} MiB"
            )
    return found


async def cost(rig: Rig, rounds: int, console: Console) -> list[dict[str, Any]]:
    """As many tokens as go through: what each costs the gateway."""
    found = []
    for number in range(rounds):
        for door in DOORS:
            rig.pace(0.0)
            _, figures = await run_streams(rig, door, COST_STREAMS, COST_TOKENS)
            found.append(figures | {"round": number})
            console.print(
                f"{door}: {figures['tokens_per_s']:,.0f} tokens/s, "
                f"{figures['gateway_cpu_us_per_token']:.1f} µs of the gateway's CPU a token, {figures['wrong']} wrong"
            )
    return found


async def delay(rig: Rig, console: Console) -> list[dict[str, Any]]:
    """How much later than it was sent a token comes, at a pace that leaves everybody idle in between."""
    found = []
    for door in DOORS:
        rig.pace(DELAY_STEP_S, keeps=True)
        told, figures = await run_streams(rig, door, DELAY_STREAMS, DELAY_TOKENS)
        sent = rig.pace(0.0) or {}
        # what came before the first batch is prefill's
        delays = [
            came - at
            for one in told
            for at, came in zip(reversed(sent[one.request_id]), reversed(one.times), strict=False)
        ]
        cuts = statistics.quantiles(delays, n=100)
        figures |= {"delay_ms": {"p50": cuts[49] * 1e3, "p90": cuts[89] * 1e3, "p99": cuts[98] * 1e3}}
        found.append(figures)
        console.print(f"{door}: tokens come {cuts[49] * 1e3:.2f} ms after they were sent (p99 {cuts[98] * 1e3:.2f} ms)")
    return found


def main() -> int:
    """The command. Returns 1 where something was wrong."""
    parser = argparse.ArgumentParser(prog="gateway_load", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, default=1000, metavar="N", help="that are held at once")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--part", choices=("all", "hold", "cost", "delay"), default="all")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    console, found = Console(), dict[str, Any]()
    rig = Rig(given.streams)
    try:
        if given.part in ("all", "cost"):
            found["cost"] = asyncio.run(cost(rig, given.rounds, console))
        if given.part in ("all", "delay"):
            found["delay"] = asyncio.run(delay(rig, console))
        if given.part in ("all", "hold"):
            found["held"] = asyncio.run(hold(rig, given.streams, given.rounds, console))
    finally:
        rig.close()
    if given.json is not None:
        write_results(given.json, {"command": "kvsluice.tests.load.gateway_load", **found})
    return 1 if any(one["wrong"] for part in found.values() for one in part) else 0


if __name__ == "__main__":
    sys.exit(main())
