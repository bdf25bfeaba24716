"""Goodput under overload: what is served in time while ten times as much is asked as can be served.

    python -P -m kvsluice.benchmarks.overload --out benchmarks/results/overload.json

First the gateway's admission before a simulated engine, then a gateway in a process of its own over workers that only
take their time, asked over gRPC at rates that do not wait for answers. Loopback alone, and for a bounded time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..client import AsyncClient
from ..errors import KvsluiceError, Overloaded
from ..evals.report import environment
from .overload_simulated import Engine, Shape, Tenant, capacity, measure

LOADS = [0.5, 0.8, 1.0, 2.0, 5.0, 10.0]
SLO_S, MAX_TTFT_S = 2.0, 1.5
SHED_WITHIN_S = 0.05
LEAST_OF_PEAK = 0.9
ONE = [Tenant("all", 1.0)]
REAL = Engine(prompt_tokens_per_s=4000.0, step_s=0.03, max_num_seqs=8)
REAL_SHAPE = Shape(prompt_tokens=120.0, answer_tokens=20.0)
DEADLINE_S = 30.0


def simulated(measured_s: float, seed: int) -> list[dict[str, Any]]:
    """The scenarios of the simulated engine."""
    prefill, decode = Engine(3000.0, 0.03, 64), Engine(30_000.0, 0.03, 16)
    heavy = [Tenant("flood", 0.9), Tenant("modest", 0.1)]
    cases = (
        ("prompts are the bottleneck", prefill, ONE),
        ("decode is the bottleneck", decode, ONE),
        ("decode, one tenant asks nine times as much as the other", decode, heavy),
    )
    return [
        measure(name, engine, Shape(), tenants, LOADS, SLO_S, MAX_TTFT_S, measured_s, seed)
        for name, engine, tenants in cases
    ]


@asynccontextmanager
async def running_gateway() -> AsyncIterator[str]:
    """The gateway's process for the length of the block. Yields where it listens."""
    given = {
        "--prompt-tokens-per-s": REAL.prompt_tokens_per_s,
        "--step-s": REAL.step_s,
        "--max-num-seqs": REAL.max_num_seqs,
        "--max-ttft-s": MAX_TTFT_S,
    }
    arguments = [str(part) for pair in given.items() for part in pair]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "kvsluice.benchmarks.overload_service", *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 60.0)
        yield line.decode().strip()
    finally:
        process.terminate()
        await process.wait()


@dataclass
class _Seen:
    """What a client saw of the requests after the warm-up."""

    offered: int = 0
    good: int = 0
    late: int = 0
    shed: Counter[str] = field(default_factory=Counter)
    shed_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    late_starts_s: list[float] = field(default_factory=list)


async def _ask(client: AsyncClient, prompt: list[int], answer: int, due_s: float, seen: _Seen | None) -> None:
    begin_s, first_s = time.monotonic(), None
    try:
        options: Any = {"max_tokens": answer, "ignore_eos": True, "timeout_s": DEADLINE_S}
        async for _ in client.stream(prompt, **options):
            first_s = first_s or time.monotonic()
    except Overloaded:
        if seen is not None:
            seen.shed["overloaded"] += 1
            seen.shed_s.append(time.monotonic() - begin_s)
        return
    except KvsluiceError as exc:
        if seen is not None:
            seen.shed[exc.type_name] += 1
        return
    if seen is not None and first_s is not None:
        # from when it was due, not from when this process came to it
        seen.ttft_s.append(first_s - due_s)
        good = first_s - due_s <= SLO_S
        seen.good += good
        seen.late += not good


async def _offer(address: str, rate: float, warm_up_s: float, measured_s: float, seed: int) -> _Seen:
    source, seen = random.Random(seed), _Seen()
    async with AsyncClient(address) as client, asyncio.TaskGroup() as tasks:
        begin_s = due_s = time.monotonic()
        while (due_s := due_s + source.expovariate(rate)) < begin_s + warm_up_s + measured_s:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            counts = due_s >= begin_s + warm_up_s
            if counts:
                seen.offered += 1
                seen.late_starts_s.append(time.monotonic() - due_s)
            prompt, answer = REAL_SHAPE.draw(source)
            ids = [97] * min(prompt, 2000)
            tasks.create_task(_ask(client, ids, max(2, answer), due_s, seen if counts else None))
    return seen


def _quantile(values: list[float], share: float) -> float | None:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else None


async def real(warm_up_s: float, measured_s: float, seed: int) -> dict[str, Any]:
    """The gateway's process at each load."""
    most, rows = capacity(REAL, REAL_SHAPE), list[dict[str, Any]]()
    async with running_gateway() as address:
        await _offer(address, most * 0.8, 0.0, warm_up_s, seed)  # it learns how long things take
        for load in LOADS:
            seen = await _offer(address, load * most, warm_up_s, measured_s, seed)
            within = sum(1 for seconds in seen.shed_s if seconds <= SHED_WITHIN_S)
            rows.append(
                {
                    "load": load,
                    "offered_per_s": seen.offered / measured_s,
                    "goodput_per_s": seen.good / measured_s,
                    "late": seen.late,
                    "shed": dict(seen.shed),
                    "shed_p50_s": _quantile(seen.shed_s, 0.5),
                    "shed_p99_s": _quantile(seen.shed_s, 0.99),
                    "shed_within_50_ms": within / len(seen.shed_s) if seen.shed_s else None,
                    "ttft_p50_s": _quantile(seen.ttft_s, 0.5),
                    "ttft_p99_s": _quantile(seen.ttft_s, 0.99),
                    "client_late_p99_s": _quantile(seen.late_starts_s, 0.99),
                }
            )
            print(f"load {load:g}: {rows[-1]}", file=sys.stderr, flush=True)
    peak = max(row["goodput_per_s"] for row in rows)
    for row in rows:
        row["of_peak"] = row["goodput_per_s"] / peak
    return {
        "name": "gateway over gRPC",
        "capacity_per_s": most,
        "slo_ttft_s": SLO_S,
        "max_ttft_s": MAX_TTFT_S,
        "rows": rows,
    }


def main() -> int:
    """The command. Exit status 0 where goodput at the highest load is what it has to be, everywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--simulated-s", type=float, default=600.0, help="simulated seconds at each load")
    parser.add_argument("--seconds", type=float, default=30.0, help="seconds at each load of the gateway's process")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    scenarios = [*simulated(given.simulated_s, given.seed), asyncio.run(real(10.0, given.seconds, given.seed))]
    met = all(scenario["rows"][-1]["of_peak"] >= LEAST_OF_PEAK for scenario in scenarios)
    result = {
        "command": f"python -P -m kvsluice.benchmarks.overload --simulated-s {given.simulated_s:g} "
        f"--seconds {given.seconds:g} --seed {given.seed}",
        "environment": environment(),
        "least_of_peak": LEAST_OF_PEAK,
        "met": met,
        "scenarios": scenarios,
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    for scenario in scenarios:
        shares = ", ".join(f"{row['load']:g}×: {row['of_peak']:.2f}" for row in scenario["rows"])
        print(f"{scenario['name']}: goodput of its peak {shares}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
