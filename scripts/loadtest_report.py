"""Puts what load tests measured into docs/loadtest.md, and with --measure measures it first.

    python scripts/loadtest_report.py --measure cpu                        this machine's processor, about ten minutes
    python scripts/loadtest_report.py --measure h200 --serve "--model llama-3.1-8b --random-weights --device cuda
        --max-model-len 40960" --input-len 32768 --output-len 256 --rates 0.25,0.5,1,2 --slo ttft_p99=4s,tpot_p99=50ms

Prefill and decode apart (half of the workers each) are measured against as many workers of both roles, under every
recipe, at rising rates, each service started for the purpose. The numbers lie in benchmarks/results/loadtest_NAME.json.
With --check it only says whether page and images hold what these files say.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvsluice.errors import InvalidRequest, KvsluiceError
from kvsluice.evals.pages import filled, make_or_check, table
from kvsluice.evals.report import environment
from kvsluice.evals.service_process import ServiceFailed, running_service
from kvsluice.evals.svg import as_text, drawing
from kvsluice.loadtest.options import parse_options
from kvsluice.loadtest.results import write_whole
from kvsluice.loadtest.runner import run

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path("docs") / "loadtest.md"
RESULTS = Path("benchmarks") / "results"
IMAGES = Path("docs") / "images"
APART, TOGETHER = "apart", "together"
LAYOUTS = {APART: "prefill and decode apart", TOGETHER: "both roles in each worker"}
COLOURS = {APART: "#0072B2", TOGETHER: "#D55E00"}
NOT_MEASURED = "Not measured yet."
WARM_UP_REQUESTS = 4


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--measure", metavar="NAME", help="measure, and write loadtest_NAME.json")
    parser.add_argument("--serve", default="--max-model-len 2048", help="further options of `kvsluice serve`")
    parser.add_argument("--workers", type=int, default=2, help="of each service, an even number")
    parser.add_argument("--recipes", default="exact,balanced")
    parser.add_argument("--rates", default="0.1,0.2,0.4", help="requests a second, rising")
    parser.add_argument("--duration-s", type=float, default=45.0, help="of the arrivals of a run")
    parser.add_argument("--input-len", default="uniform:1150..1400", help="long enough for every recipe to run")
    parser.add_argument("--output-len", default="16")
    parser.add_argument("--slo", default="ttft_p99=10s,tpot_p99=500ms")
    found = parser.parse_args(given)
    if found.workers < 2 or found.workers % 2:
        raise InvalidRequest("--workers", f"got {found.workers}", "an even number from 2")
    return found


def layout_flags(layout: str, workers: int) -> list[str]:
    """How `kvsluice serve` is told a layout."""
    if layout == TOGETHER:
        return ["--role", "both", "--prefill-workers", str(workers), "--decode-workers", str(workers)]
    return ["--prefill-workers", str(workers // 2), "--decode-workers", str(workers // 2)]


def measure(given: argparse.Namespace, path: Path) -> None:
    """Run every cell and write the file after each, so that a run that is ended leaves what it has.

    Raises:
        KvsluiceError: an option is at fault, or the service refuses the requests.
        ServiceFailed: it does not start.
    """
    names = ("serve", "workers", "recipes", "rates", "duration_s", "input_len", "output_len", "slo")
    kept: dict[str, Any] = {
        "environment": environment(),
        "settings": {name: getattr(given, name) for name in names},
        "cells": [],
    }
    for layout in LAYOUTS:
        flags = [*shlex.split(given.serve), *layout_flags(layout, given.workers)]
        with running_service(*flags) as service:
            for cell in _cells(given, layout, service.address):
                kept["cells"].append(cell)
                write_whole(path, json.dumps(kept, indent=1, allow_nan=False) + "\n", "--measure")


def _cells(given: argparse.Namespace, layout: str, address: str) -> Iterator[dict[str, Any]]:
    for recipe in given.recipes.split(","):
        for place, rate in enumerate(given.rates.split(",")):
            options = {
                "address": address,
                "recipes": recipe,
                "request_rate": rate,
                "num_prompts": str(max(1, round(float(rate) * given.duration_s))),
                # what is compiled or allocated on first use is no part of any figure
                "num_warmups": str(WARM_UP_REQUESTS if place == 0 else 1),
                "input_len": given.input_len,
                "output_len": given.output_len,
                "slo": given.slo,
                "metric_percentiles": "50,90,99",
                "requests": True,  # a switch turns its default around: without every request
                "seed": str(place),  # the same arrivals for every layout and recipe
            }
            found = asyncio.run(run(parse_options(options), [], {})).last
            print(f"{layout}, {recipe}, {rate} requests/s: {found.figures['completed']} served", flush=True)
            busy = os.getloadavg()[0]
            own = {"layout": layout, "recipe": recipe, "rate": float(rate), "load_average": busy}
            cell = asdict(found) | own
            yield {name: value for name, value in cell.items() if value not in ({}, [])}


def load_table(results: Mapping[str, Any]) -> str:
    """Every cell of a file in a row."""
    header = ("recipe", "layout", "offered/s", "served/s", "goodput/s", "tokens/s", "TTFT p50", "TTFT p99", "TPOT p50",
              "TPOT p99", "came to rest")  # fmt: skip
    cells = sorted(results["cells"], key=lambda c: (c["recipe"], c["rate"], c["layout"]))
    text: str = table(header, [_row(cell) for cell in cells], numbers_from=2)
    return text


def _row(cell: Mapping[str, Any]) -> tuple[str, ...]:
    figures = cell["figures"]

    def seconds(key: str) -> str:
        return f"{figures[key] / 1e3:.2f} s" if key in figures else "–"

    def milliseconds(key: str) -> str:
        return f"{figures[key]:.0f} ms" if key in figures else "–"

    rest = {True: "yes", False: "no", None: "too few to say"}[cell["stationary"]]
    return (
        f"`{cell['recipe']}`",
        LAYOUTS[cell["layout"]],
        f"{cell['rate']:g}",
        f"{figures['request_throughput']:.2f}",
        f"{figures['request_goodput']:.2f}",
        f"{figures['output_throughput']:.1f}",
        seconds("p50_ttft_ms"),
        seconds("p99_ttft_ms"),
        milliseconds("p50_tpot_ms"),
        milliseconds("p99_tpot_ms"),
        rest if cell["invalid"] is None else f"invalid: {cell['invalid']}",
    )


def origin(name: str, results: Mapping[str, Any]) -> str:
    """Where the numbers of a file come from, and what they were asked for."""
    made, asked = results["environment"], results["settings"]
    hardware = made["hardware"]
    machine = f"{hardware['cores']} cores of {hardware['cpu']}" + (f", {hardware['gpu']}" if "gpu" in hardware else "")
    effective = {name for cell in results["cells"] for name in cell["figures"].get("effective_recipes", {})}
    return (
        f"Measured by `python scripts/loadtest_report.py --measure {name}` on {machine}, at commit {made['commit']}: "
        f"`kvsluice serve {asked['serve']}` with {asked['workers']} workers, prompts of {asked['input_len']} tokens, "
        f"answers of {asked['output_len']}, Poisson arrivals for {asked['duration_s']:g} s a row, the same ones for "
        f"both layouts and all recipes. Goodput counts requests that keep the bounds of `{asked['slo']}`. "
        f"Recipes that ran: {', '.join(f'`{one}`' for one in sorted(effective))}."
    )


def plot(results: Mapping[str, Any]) -> str:
    """SVG: time to first token and time per token against the rate, one line a layout, one column a recipe."""
    recipes = list(dict.fromkeys(cell["recipe"] for cell in results["cells"]))
    with drawing():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.0, 4.4), layout="constrained")
        grid: Any = figure.subplots(2, len(recipes), sharex=True, sharey="row", squeeze=False)
        for column, recipe in enumerate(recipes):
            for row, (metric, unit) in enumerate((("ttft", 1e3), ("tpot", 1.0))):
                axes = grid[row, column]
                for layout, name in LAYOUTS.items():
                    own = [c for c in results["cells"] if (c["recipe"], c["layout"]) == (recipe, layout)]
                    own = sorted((c for c in own if f"p50_{metric}_ms" in c["figures"]), key=lambda c: c["rate"])
                    for statistic, style in (("p50", "-"), ("p99", "--")):
                        axes.plot(
                            [cell["rate"] for cell in own],
                            [cell["figures"][f"{statistic}_{metric}_ms"] / unit for cell in own],
                            style,
                            marker="o",
                            markersize=3,
                            color=COLOURS[layout],
                            label=f"{name}, {statistic}",
                        )
                axes.set_ylim(bottom=0)
                axes.grid(color="#dddddd", linewidth=0.6)
            grid[0, column].set_title(recipe, loc="left", fontsize=9)
            grid[1, column].set_xlabel("requests a second that are due")
        grid[0, 0].set_ylabel("first token, s")
        grid[1, 0].set_ylabel("further token, ms")
        grid[0, 0].legend(frameon=False, fontsize=7)
        text: str = as_text(figure)
        return text


def wanted(root: Path) -> dict[Path, str]:
    """Page and images as they should be, by path.

    Raises:
        InvalidRequest: a file of results is none.
        ValueError: the page lacks a block.
    """
    # images of results that are gone go as well
    made = {IMAGES / path.name: "" for path in (root / IMAGES).glob("loadtest_*.svg")}
    parts = []
    for path in sorted((root / RESULTS).glob("loadtest_*.json")):
        name = path.stem.removeprefix("loadtest_")
        try:
            results = json.loads(path.read_text())
            image = IMAGES / f"{path.stem}.svg"
            made[image] = plot(results)
            link = f"![latency against the rate]({image.relative_to(PAGE.parent)})"
            parts += [link, load_table(results), origin(name, results)]
        except (ValueError, KeyError, TypeError) as exc:
            raise InvalidRequest("results", f"{path} holds something else", "what --measure wrote") from exc
    block = "\n\n".join(parts) or NOT_MEASURED
    return made | {PAGE: filled((root / PAGE).read_text(), {"loads": block}, str(PAGE))}


def main(given: Sequence[str] | None = None, root: Path = ROOT) -> int:
    try:
        asked = arguments(given)
        if asked.measure is not None:
            measure(asked, root / RESULTS / f"loadtest_{asked.measure}.json")
        status: int = make_or_check(root, wanted, ["--check"] if asked.check else [])
    except (KvsluiceError, ServiceFailed) as exc:
        print(f"loadtest_report: {exc}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
