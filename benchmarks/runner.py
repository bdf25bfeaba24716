"""`kvsluice bench`: measures speed and memory, and says what the device would allow.

    kvsluice bench prefill --model llama-3.1-8b --random-weights --context 8192,32768 --recipe exact,sluice \\
        --baseline transformers --json prefill.json
    python -P -m kvsluice.benchmarks.runner prefill …       the same, without the command line's libraries

Everything that is compared is measured in one run on one device. See docs/benchmarks.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..errors import KvsluiceError
from ..evals.results import check_writable
from . import (
    bench_decode,
    bench_failover,
    bench_handoff,
    bench_kernels,
    bench_prefill,
    bench_service,
    bench_store,
    bench_tiers,
)
from .bench_results import BenchResults, Row, save
from .options import BenchOptions, argument_parser, parse_options
from .progress import Progress
from .subject import (
    Bench,
    choose_device,
    choose_dtype,
    measured_environment,
    measured_recipes,
    read_subject,
)
from .tables import print_results
from .timing import measure_limits

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130

MEASURES: Mapping[str, Callable[[Bench], list[Row]]] = {
    "prefill": bench_prefill.measure,
    "decode": bench_decode.measure,
    "handoff": bench_handoff.measure,
    "kernels": bench_kernels.measure,
    "tiers": bench_tiers.measure,
    "service": bench_service.measure,
    "failover": bench_failover.measure,
    "store": bench_store.measure,
}


# whole caches come and go: with segments of fixed size a sixth of the memory can end up between them; it is read when
# the device is first used
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def run(options: BenchOptions, progress: Progress | None = None) -> BenchResults:
    """Measure what the options ask for and write the results, each as soon as it is there; ratios come last.

    Raises:
        KvsluiceError: an option that cannot work, before any weights are made; or a fault of the engines.
    """
    if options.json is not None:
        check_writable(options.json)
    if options.against is not None:
        bench_service.check_against(options.against)
    device = choose_device(options)
    dtype = choose_dtype(options, device)
    subjects = tuple(read_subject(name, options) for name in options.models)
    progress = progress or Progress()
    progress.say("measuring what the device can do")
    kept: list[Row] = []

    def keep(row: Row) -> None:
        """A run that is ended before its time leaves what it has measured."""
        kept.append(row)
        if options.json is not None:
            save(options.json, _results(bench, kept))

    # a service's GPU is its own, and a store needs none
    elsewhere = options.part in ("service", "failover", "store")
    limits = measure_limits(torch.device("cpu") if elsewhere else device, dtype)
    bench = Bench(options, subjects, device, dtype, limits, progress, keep)
    results = _results(bench, MEASURES[options.part](bench))
    if options.json is not None:
        save(options.json, results)
    return results


def _results(bench: Bench, rows: Sequence[Row]) -> BenchResults:
    options = bench.options
    return BenchResults(
        environment=measured_environment(options, bench.device),
        part=options.part,
        models=bench.bench_models(),
        settings=_settings(options, bench),
        limits=bench.limits,
        recipes={} if options.part in ("kernels", "store") else measured_recipes(bench.subject),
        rows=tuple(rows),
    )


def _settings(options: BenchOptions, bench: Bench) -> dict[str, Any]:
    """The options as they were taken, but for what has a place of its own in the results."""
    elsewhere = ("part", "models", "random_weights", "recipes", "json", "commit")
    found: dict[str, Any] = {}
    for one in fields(options):
        value = getattr(options, one.name)
        if one.name not in elsewhere:
            found[one.name] = value
            if isinstance(value, tuple):
                found[one.name] = list(value)
            elif isinstance(value, Path):
                found[one.name] = value.name  # where it lay on the machine is nobody's business
    return found | {
        "device": str(bench.device),
        "dtype": str(bench.dtype).removeprefix("torch."),
        "chunk_tokens": bench.chunk_tokens,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command, for machines without the command line's library. Returns the exit status."""
    given = vars(argument_parser().parse_args(arguments))
    try:
        return run_command(parse_options(given.pop("part"), given))
    except KvsluiceError as exc:
        print(f"kvsluice bench: {exc.message}", file=sys.stderr)
        return EXIT_FAILED


def run_command(options: BenchOptions) -> int:
    """Run and print the closing tables. Returns the exit status."""
    try:
        results = run(options)
    except KeyboardInterrupt:
        print("kvsluice bench: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    print_results(results)
    if options.json is not None:
        print(f"written to {Path(options.json)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
