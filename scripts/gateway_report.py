"""Puts what the gateway itself costs into docs/http.md, from benchmarks/results/gateway_load.json, which
`python -P -m kvsluice.tests.load.gateway_load --json benchmarks/results/gateway_load.json` writes. With --check it only
says whether the page holds all that."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvsluice.evals.pages import filled, make_or_check, table

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path("docs") / "http.md"
RESULTS = Path("benchmarks") / "results"
DOORS = {"worker": "the worker's own stream", "grpc": "gRPC", "http": "HTTP"}
MIB = 1 << 20


def wanted(root: Path) -> dict[Path, str]:
    """The page as it should be. Raises `ValueError` where it lacks the block."""
    path = root / RESULTS / "gateway_load.json"
    text = measured(json.loads(path.read_text())) if path.exists() else "Not measured yet."
    return {PAGE: filled((root / PAGE).read_text(), {"gateway load": text}, str(PAGE))}


def measured(results: Mapping[str, Any]) -> str:
    """What the file says, as text and tables."""
    made = results["environment"]
    hardware = made["hardware"]
    origin = (
        f"Measured by `python -P -m kvsluice.tests.load.gateway_load` on {hardware['cores']} cores of "
        f"{hardware['cpu']}, which workers, gateway and clients share, at commit {made['commit']}; medians of the "
        f"rounds. The workers have no model: they send tokens at a pace that is set."
    )
    return "\n\n".join([origin, _prices(results["cost"], results["delay"]), *_held(results["held"])])


def _prices(cost: Sequence[Mapping[str, Any]], delay: Sequence[Mapping[str, Any]]) -> str:
    """What a token costs on its way."""
    delays = {one["door"]: one["delay_ms"] for one in delay}
    rows = []
    for door, name in DOORS.items():
        rounds = [one for one in cost if one["door"] == door]
        price = statistics.median(one["gateway_cpu_us_per_token"] for one in rounds)
        rows.append(
            (
                name,
                f"{statistics.median(one['tokens_per_s'] for one in rounds):,.0f}",
                "–" if door == "worker" else f"{price:.0f} µs",
                f"{delays[door]['p50']:.1f} ms",
                f"{delays[door]['p99']:.1f} ms",
            )
        )
    header = ("", "tokens/s, as fast as they go", "CPU of the gateway a token", "a token comes after, p50", "p99")
    shape = f"{cost[0]['streams']} streams of {cost[0]['tokens_each']} tokens as fast as they go, one token a message; "
    paced = f"{delay[0]['streams']} streams at a steady pace for the delay."
    return f"{table(header, rows)}\n\n{shape}{paced}"


def _held(held: Sequence[Mapping[str, Any]]) -> list[str]:
    """What many streams at once cost."""
    rows = [
        (
            f"{DOORS[one['door']]}, round {one['round'] + 1}",
            f"{one['at_once']:,}",
            str(one["wrong"]),
            f"{one['gateway_rss_before_bytes'] / MIB:.0f} MiB",
            f"{one['gateway_rss_peak_bytes'] / MIB:.0f} MiB",
            f"{one['gateway_rss_after_bytes'] / MIB:.0f} MiB",
        )
        for one in held
    ]
    header = ("", "streams at once", "lost or wrong", "gateway's memory before", "at most", "after")
    each = held[0]["tokens_each"]
    text = f"{held[0]['streams']:,} clients stream {each} tokens each, all at once, through one gateway:"
    return [text, table(header, rows)]


if __name__ == "__main__":
    sys.exit(make_or_check(ROOT, wanted, sys.argv[1:]))
