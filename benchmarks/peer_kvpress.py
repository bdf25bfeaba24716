"""The same samples through kvpress and through our recipes, at equal budgets, in one run.

    python -P -m kvsluice.benchmarks.peer_kvpress --context 8192 --samples 50 --device cuda --json peer.json

kvpress presses the cache of transformers' model; ours runs prefill, frames and decode as they serve. Both see the same
prompt and get the answer's tokens forced; a sample's score is that of `kvsluice eval`. The two agree where the paired
bootstrap 95 % interval of their difference holds 0. What makes them do the same:

- `dense`: no press against `exact`.
- `snapkv`: SnapKVPress as it comes: window 64, average pooling over 5. It takes means where ours sums, which ranks
  alike; that the softmax runs over all keys, that pooling pads with zeros and that the window counts towards the budget
  is the same on both sides.
- `pyramidkv`: PyramidKVPress with window 8. With its own 64 it would give every layer the same: it falls back to that
  while the last layer's rows, a twentieth of the mean, are fewer than the window, so for all prompts below 12,800
  tokens at a tenth. It counts the window within the pyramid, ours (as the authors' code) below it, so its beta is set
  to make the layers equal.
- `streaming`: StreamingLLMPress in KeyRerotationPress, so that positions are those inside the cache, as published.
- `streaming-original`: StreamingLLMPress alone, positions as in the prompt.

Rows that are kept stay in the compute dtype on both sides. The press's ratio is set so that it keeps as many rows as
our recipe, and what it kept is compared in every layer of every sample: the same, but for a pyramid's layer whose
budget lies halfway between two numbers of rows, which either may round. `REASONS` says where they differ all the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InvalidRequest, KvsluiceError
from ..evals.options import MOST_PROCESSES, MOST_SAMPLES, check_results_file
from ..evals.processes import check_device, environment_of, process_pool
from ..evals.progress import progress
from ..evals.results import AVERAGE, EvaluatedModel, EvaluatedRecipe, save_json
from ..evals.statistics import Interval, interval, resampled_means
from ..evals.suites import LEAST_CONTEXT, Unit
from ..evals.tasks import SUITE
from ..evals.texts import DEFAULT_FOLDER, TextMissing, heldout_texts
from ..evals.workfile import Record, WorkFile, check_writable, work_path
from ..models.checkpoint import DEFAULT_MODEL, locate
from ..models.loader import load_model
from .kvpress_match import MOST_SHARE, NAMES, Match, Setup
from .kvpress_side import PeerMissing, kvpress_version, load_press

_RANKING = (
    "In float32 both keep the same rows and say the same. In bfloat16 kvpress rounds attention weights and means, "
    "ours ranks in float32, and the layers before round in other orders: near ties fall differently. Measured over all "
    "layers and heads, 1.0 % of the kept rows differ for snapkv and 1.1 % for pyramidkv at 6K tokens, 0.4 % and 0.9 % "
    "at 1K."
)
_FORGETTING = (
    "Ours forgets old local rows in blocks of 16 while the answer goes on, the press never does; it shows where the "
    "answer is read from the oldest local rows, as in `quote`. With one block as long as the prompt, so without "
    "forgetting, all answer tokens are the same in float32."
)
REASONS: Mapping[str, str] = {
    "snapkv": _RANKING,
    "pyramidkv": _RANKING,
    "streaming": _FORGETTING,
    "streaming-original": _FORGETTING,
}
"""Why the two differ, by comparison, where they do; found by comparing kept rows and forced answers on the CPU."""


@dataclass(frozen=True)
class Cell:
    """All samples of one comparison and task, by the sample's index.

    Attributes:
        ours, kvpress: scores.
        equal_tokens: samples in which both put the same token first at every place of the answer.
        equal_rows: samples in which every layer kept equally many rows on both sides.
    """

    comparison: str
    context: int
    task: str
    ours: tuple[float, ...]
    kvpress: tuple[float, ...]
    equal_tokens: int
    equal_rows: int


def collect(records: Sequence[Record], names: Sequence[str], tasks: Sequence[str]) -> list[Cell]:
    """Records of one context as cells."""
    ordered = sorted(records, key=lambda record: record["sample"])
    cells = []
    for name in names:
        for task in tasks:
            own = [record for record in ordered if record["task"] == task]
            found = [record["comparisons"][name] for record in own]
            cells.append(
                Cell(
                    comparison=name,
                    context=own[0]["context"],
                    task=task,
                    ours=tuple(one["ours"] for one in found),
                    kvpress=tuple(one["kvpress"] for one in found),
                    equal_tokens=sum(one["equal_tokens"] for one in found),
                    equal_rows=sum(one["equal_rows"] for one in found),
                )
            )
    return cells


def difference(cells: Sequence[Cell]) -> Interval:
    """Ours minus kvpress: the mean of the cells' mean paired differences, samples resampled within each cell."""
    paired = [np.array(cell.ours) - np.array(cell.kvpress) for cell in cells]
    resampled = [resampled_means(one, cell.task) for cell, one in zip(cells, paired, strict=True)]
    return interval(np.array([one.mean() for one in paired]), np.mean(resampled, axis=0))


def summarize(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row for the average and for every task of each comparison."""
    rows = []
    for name in dict.fromkeys(cell.comparison for cell in cells):
        own = [cell for cell in cells if cell.comparison == name]
        for task, group in [(AVERAGE, own), *((cell.task, [cell]) for cell in own)]:
            between = difference(group)
            agrees = between.low <= 0.0 <= between.high
            rows.append(
                {
                    "comparison": name,
                    "task": task,
                    "ours": float(np.mean([np.mean(cell.ours) for cell in group])),
                    "kvpress": float(np.mean([np.mean(cell.kvpress) for cell in group])),
                    "difference": between.mean,
                    "low": between.low,
                    "high": between.high,
                    "agrees": agrees,
                    "samples": sum(len(cell.ours) for cell in group),
                    "equal_tokens": sum(cell.equal_tokens for cell in group),
                    "equal_rows": sum(cell.equal_rows for cell in group),
                    "reason": None if agrees else REASONS.get(name),
                }
            )
    return rows


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what `summarize` found; plain text, so that a bare machine can."""
    print(
        f"{'comparison':<19}{'task':<17}{'ours':>6}{'kvpress':>9}   {'difference (95 %)':<28}agree  same answers, rows"
    )
    for row in rows:
        between = f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
        print(
            f"{row['comparison']:<19}{row['task']:<17}{row['ours']:>6.3f}{row['kvpress']:>9.3f}   {between:<28}"
            f"{'yes' if row['agrees'] else 'no':<7}{row['equal_tokens']}, {row['equal_rows']} of {row['samples']}"
        )


_matches: list[Match] = []
"""The one match of a process that `_start` has begun."""


def _start(setup: Setup) -> None:
    _matches.append(Match(setup))


def _run(unit: Unit) -> Record:
    try:
        return _matches[0].run(unit)
    except KvsluiceError as exc:
        raise RuntimeError(exc.message) from None  # errors of the tree cannot be sent to another process


def run_units(setup: Setup, units: Sequence[Unit], num_processes: int) -> Iterator[Record]:
    """Records as they come, in no order. Several processes, each with both models, keep a GPU busy."""
    if num_processes == 1:
        _start(setup)
        yield from map(_run, units)
        return
    pool = process_pool(num_processes, setup.device, _start, setup)
    try:
        for future in as_completed([pool.submit(_run, unit) for unit in units]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def described(setup: Setup) -> dict[str, Any]:
    """Peer, model, recipes and texts of a run."""
    adapter = locate(DEFAULT_MODEL).adapter
    assert adapter is not None
    weights = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    fingerprint = load_model(DEFAULT_MODEL, dtype=getattr(torch, setup.dtype)).fingerprint
    recipes = {}
    for name, recipe in setup.filled().items():
        slots = json.loads(recipe.to_json())
        recipes[name] = asdict(EvaluatedRecipe(slots.pop("name"), recipe.fingerprint, slots))
    texts = heldout_texts(setup.texts)
    return {
        "peer": {"name": "kvpress", "version": kvpress_version(), "transformers": version("transformers")},
        "model": asdict(EvaluatedModel(DEFAULT_MODEL, fingerprint, weights, setup.dtype)),
        "recipes": recipes,
        "texts": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()},
    }


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run what the options ask for, beyond what an earlier run has done; returns the results.

    Raises:
        KvsluiceError: a prompt is too short for a recipe, or an earlier run's file is another run's.
    """
    check(options)
    load_press("base_press", "BasePress")  # says at once that it is missing
    names = ("share", "seed", "texts", "device", "dtype")
    setup = Setup(tuple(options.comparison), **{name: getattr(options, name) for name in names})
    about, where = described(setup), environment_of(options.device, options.processes, options.commit)
    tasks = options.task
    units = [Unit(options.context, index, task) for index in range(options.samples) for task in tasks]
    identity = about | {"environment": where, "share": setup.share, "seed": setup.seed}
    work = WorkFile(work_path(options.json), identity, options.fresh) if options.json else None
    with closing(work) if work is not None else nullcontext():
        done: dict[Unit, Record] = {} if work is None else work.done
        left = [unit for unit in units if unit not in done]
        with progress(units, left) as shown:
            for record in run_units(setup, left, options.processes) if left else ():
                if work is not None:
                    work.add(record)
                done[Unit(record["context"], record["sample"], record["task"])] = record
                shown.advance(record["context"])
    cells = collect([done[unit] for unit in units], setup.names, tasks)
    settings = {"context": options.context, "samples": options.samples, "seed": setup.seed, "share": setup.share}
    settings |= {"tasks": list(tasks), "texts": about.pop("texts"), "answer": "teacher-forced"}
    rows = summarize(cells)
    return {"environment": where, **about, "settings": settings, "cells": list(map(asdict, cells)), "summary": rows}


def check(options: argparse.Namespace) -> None:
    """Refuse what cannot be, before a model is read.

    Raises:
        InvalidRequest: names the option.
    """
    for name in ("comparison", "task"):
        given = getattr(options, name)
        if len(set(given)) < len(given):
            raise InvalidRequest(f"--{name}", " ".join(given), "values that differ")
    check_device(options.device)
    if options.json is not None:
        check_results_file(options.json)
        check_writable(options.json)


def whole(low: int, high: int) -> Callable[[str], int]:
    """What reads a whole number from `low` to `high`."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text[:64]!r}; allowed: a whole number from {low} to {high}")
        return int(text)

    return read


def share_of_rows(text: str) -> float:
    """A share that all comparisons can keep."""
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0.0 < share <= MOST_SHARE:  # NaN is in no range
        raise argparse.ArgumentTypeError(f"{text[:64]!r}; allowed: above 0 and at most {MOST_SHARE}")
    return share


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--comparison", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--task", nargs="+", default=tuple(SUITE), choices=tuple(SUITE))
    parser.add_argument(
        "--context", type=whole(LEAST_CONTEXT, 1 << 15), default=8192, help="tokens of a prompt and its answer, about"
    )
    parser.add_argument("--share", type=share_of_rows, default=0.1, help="of the rows that is kept")
    parser.add_argument("--samples", type=whole(1, MOST_SAMPLES), default=50, help="samples a task")
    parser.add_argument(
        "--seed", type=whole(0, 1 << 32), default=0, help="samples are those of `kvsluice eval` with this seed"
    )
    parser.add_argument("--texts", type=Path, default=DEFAULT_FOLDER, help="what scripts/fetch_texts.sh filled")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--processes", type=whole(1, MOST_PROCESSES), default=1, help="processes that share the work and the device"
    )
    parser.add_argument("--json", type=Path, help="results; FILE.work.jsonl beside it lets a cut-off run go on")
    parser.add_argument("--fresh", action="store_true", help="begin anew, whatever is done already")
    parser.add_argument("--commit", help="the commit to record where the checkout cannot say")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run, write the file, print the table. Returns the exit status."""
    options = argument_parser().parse_args(argv)
    try:
        results = compare(options)
        if options.json:
            save_json(options.json, results)
    except (KvsluiceError, PeerMissing, TextMissing, RuntimeError) as exc:
        print(exc, file=sys.stderr)
        return 1
    print_table(results["summary"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
