"""`kvsluice eval`: runs a suite under several recipes, keeps what is done, and says what the scores are worth.

    kvsluice eval --suite ruler --recipe exact,sluice --context 4096,8192 --samples 20 --json results.json
    python -P -m kvsluice.evals.runner …       the same, without the command line's libraries

One sample runs under all recipes before the next one does, so that every score has its partner. See
docs/evaluation.md.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from statistics import fmean
from typing import Any

from ..errors import KvsluiceError
from ..models.checkpoint import locate
from .against import agreement, check_reference
from .evaluator import Evaluator, Plan, make_plan, read_model
from .options import EvalOptions, argument_parser, parse_options
from .overview import print_overview
from .processes import environment_of
from .progress import progress, say
from .results import TRANSFORMERS, Cell, EvalResults, EvaluatedModel, EvaluatedRecipe, FoundPrefix, save
from .statistics import summarize
from .suites import Unit
from .turn_tasks import NUM_TURNS
from .work_processes import evaluate_in_processes
from .workfile import Record, check_writable, kept, work_path

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


def run(options: EvalOptions) -> EvalResults:
    """Run what the options ask for, beyond what an earlier run has done, and write the results.

    Raises:
        KvsluiceError: an option that cannot work, before any work; or a fault of the engines.
    """
    if options.against:
        check_reference(options.model)
    say("reading texts and the tokenizer")
    plan = make_plan(options)
    if options.json is not None:
        check_writable(options.json)
    say(f"loading {options.model}")
    evaluator = Evaluator(options, plan) if options.processes == 1 else None
    model = _evaluated_model(options, evaluator)
    where = environment_of(options.device, options.processes, options.commit)
    path = None if options.json is None else work_path(options.json)
    with kept(path, _identity(options, plan, model, where), options.fresh) as (done, keep):
        left = [unit for unit in plan.units if unit not in done]
        if others := len(done.keys() - set(plan.units)):
            say(f"{others} samples that are done are not among those asked for: they are kept, and left out of results")
        with progress(plan.units, left) as shown:
            for record in _evaluate(options, plan, evaluator, left):
                keep(record)
                shown.advance(record["context"])
        records = [done[unit] for unit in plan.units]
    results = _results(options, plan, model, where, records)
    if options.json is not None:
        save(options.json, results)
    return results


def _evaluate(options: EvalOptions, plan: Plan, evaluator: Evaluator | None, units: Sequence[Unit]) -> Iterator[Record]:
    groups = list(_batches(units, options.batch))
    if evaluator is None:
        yield from evaluate_in_processes(options, groups)
        return
    for group in groups:
        yield from evaluator.evaluate(group)


def _batches(units: Iterable[Unit], size: int) -> Iterator[list[Unit]]:
    """Neighbours of one context together, at most `size` of them."""
    for _, same in groupby(units, key=lambda unit: unit.context):
        own = list(same)
        yield from (own[begin : begin + size] for begin in range(0, len(own), size))


def _evaluated_model(options: EvalOptions, evaluator: Evaluator | None) -> EvaluatedModel:
    # other processes load it on the device; here only its identity is wanted
    model = read_model(options, "cpu") if evaluator is None else evaluator.model
    adapter = locate(options.model).adapter
    digest = None
    if adapter is not None:
        digest = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    dtype = str(model.dtype).removeprefix("torch.")
    return EvaluatedModel(options.model, model.fingerprint, digest, dtype)


def _identity(options: EvalOptions, plan: Plan, model: EvaluatedModel, where: Mapping[str, Any]) -> dict[str, Any]:
    """All that the record of a unit depends on."""
    hardware = where["hardware"]
    return {
        "commit": where["commit"],
        "device": hardware.get("gpu", hardware["cpu"]),
        "torch": where["libraries"]["torch"],
        "model": model.fingerprint,
        "adapter": model.adapter,
        "dtype": model.dtype,
        "suite": options.suite,
        "seed": options.seed,
        "texts": dict(plan.texts),
        "scored_tokens": options.scored_tokens if options.suite == "ppl" else None,
        "recipes": {label: recipe.fingerprint for label, recipe in plan.recipes.items()},
        "against": TRANSFORMERS if options.against else None,
        "kernels": options.kernels,
    }


def _results(
    options: EvalOptions, plan: Plan, model: EvaluatedModel, where: Mapping[str, Any], records: Sequence[Record]
) -> EvalResults:
    settings: dict[str, Any] = {
        "contexts": list(options.contexts),
        "samples": options.samples,
        "seed": options.seed,
        "tasks": list(plan.tasks),
        "texts": dict(plan.texts),
        "answer": "teacher-forced",
        "kernels": options.kernels,
    }
    if options.suite == "niah":
        settings["depths"] = list(options.depths)
    if options.suite == "ppl":
        settings["scored_tokens"] = options.scored_tokens
    if options.suite == "multiturn":
        settings |= {"turns": NUM_TURNS, "between_turns": "right answers"}
    if options.suite == "prefix":
        settings |= {"turns": NUM_TURNS}
    recipes = {}
    for label, recipe in plan.recipes.items():
        slots = json.loads(recipe.to_json())
        recipes[label] = EvaluatedRecipe(slots.pop("name"), recipe.fingerprint, slots)
    cells = collect_cells(records, list(plan.recipes), with_reference=options.against)
    against = agreement(records, model.dtype, in_nats=options.suite == "ppl") if options.against else None
    return EvalResults(where, options.suite, model, settings, recipes, cells, summarize(cells), against)


def collect_cells(records: Sequence[Record], labels: Sequence[str], *, with_reference: bool) -> tuple[Cell, ...]:
    """Records by context, task and depth, and by turn where there are several, for every recipe and then transformers;
    scores by the sample's index."""
    places: dict[tuple[int, str, float | None], list[Record]] = {}
    for record in sorted(records, key=lambda record: record["sample"]):  # stable: tasks stay in their order
        places.setdefault((record["context"], record["task"], record["depth"]), []).append(record)
    cells = [cell for label in labels for place, own in places.items() for cell in _cells(label, *place, own)]
    if with_reference:
        nothing: dict[str, Any] = {
            "payload_bytes": 0,
            "resident_bytes": 0,
            "prefill_flops": 0.0,
            "fallback": None,
            "hits": [],
        }
        for (context, task, depth), own in places.items():
            judged = [
                record | {"outcomes": {TRANSFORMERS: nothing | {"turns": record["reference"]["turns"]}}}
                for record in own
            ]
            cells += _cells(TRANSFORMERS, context, task, depth, judged)
    return tuple(cells)


def _cells(label: str, context: int, task: str, depth: float | None, records: Sequence[Record]) -> Iterator[Cell]:
    outcomes = [record["outcomes"][label] for record in records]
    cell = Cell(
        recipe=label,
        context=context,
        task=task,
        depth=depth,
        scores=(),
        prompt_tokens=fmean(record["prompt_tokens"] for record in records),
        payload_bytes=fmean(outcome["payload_bytes"] for outcome in outcomes),
        resident_bytes=fmean(outcome["resident_bytes"] for outcome in outcomes),
        bf16_bytes=fmean(record["bf16_bytes"] for record in records),
        fallbacks=sum(outcome["fallback"] is not None for outcome in outcomes),
        fallback_reason=next((reason for outcome in outcomes if (reason := outcome["fallback"])), None),
        prefill_flops=fmean(outcome["prefill_flops"] for outcome in outcomes),
    )
    turns = zip(*(outcome["turns"] for outcome in outcomes), strict=True)
    by_turn = dict(enumerate(turns, 1))
    for turn, scores in by_turn.items():
        hits = [outcome["hits"][turn - 2] for outcome in outcomes if turn > 1 and outcome["hits"]]
        yield replace(cell, scores=scores, turn=turn if len(by_turn) > 1 else None, hit=_found(hits))


def _found(hits: Sequence[Mapping[str, Any]]) -> FoundPrefix | None:
    if not hits:
        return None
    return FoundPrefix(
        sum(hit["cached_tokens"] for hit in hits) / sum(hit["prompt_tokens"] for hit in hits),
        sum(hit["flops"] for hit in hits) / sum(hit["miss_flops"] for hit in hits),
        sum(not hit["same"] for hit in hits),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command, for machines without the command line's library. Returns the exit status."""
    given = vars(argument_parser().parse_args(arguments))
    try:
        return run_command(parse_options(given))
    except KvsluiceError as exc:
        print(f"kvsluice eval: {exc.message}", file=sys.stderr)
        return EXIT_FAILED


def run_command(options: EvalOptions) -> int:
    """Run and print the closing table. Returns the exit status."""
    try:
        results = run(options)
    except KeyboardInterrupt:
        where = "" if options.json is None else f"; the same command goes on from {work_path(options.json)}"
        print(f"kvsluice eval: stopped{where}", file=sys.stderr)
        return EXIT_INTERRUPTED
    print_overview(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
