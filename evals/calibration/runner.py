"""`kvsluice calibrate`: two cuts, then a profile.

    candidates that the budgets allow ──first cut: errors of final hidden rows──> a few, ranked
                                      ──second cut: the retrieval suite, paired, `exact` beside──> one ──> profile

The first cut goes in stages: which rows go on, then, under the best of that, how rows are packed and read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from ...compression.recipe import Recipe, fill, get_recipe
from ...errors import InternalError
from ...kernels.dispatch import REFERENCE, forced
from ...models.checkpoint import locate
from ...models.loader import load_config
from ...models.profiles import Profile, load_profile, read_profile, stored_profile
from ..evaluator import make_plan, read_model
from ..options import EvalOptions
from ..processes import environment_of
from ..progress import progress, say
from ..results import EXACT, check_writable, save_json, save_text
from ..runner import EXIT_INTERRUPTED, run
from ..scoring import CHUNK_TOKENS, CUDA_CHUNK_TOKENS
from ..suites import Case, Unit
from ..workfile import kept
from .candidates import Candidate, Subject, allowed, caches, propagations, require_some
from .choosing import choose, finalists, merged, ranked
from .first_cut import cache_errors, propagation_errors
from .options import FINALISTS, CalibrationOptions, beside
from .overview import print_overview
from .plot import calibration_plot
from .records import Report, make_report, tried

NAME = "calibrate"
Recipes = Mapping[str, Recipe]
Measure = Callable[[Case, Recipes], Mapping[str, float]]
Errors = dict[str, list[float]]
"""Label -> relative error of each prompt."""


@dataclass(frozen=True)
class _Prompts:
    """The prompts of the first cut.

    Attributes:
        identity: all that an error depends on but for the candidates.
    """

    units: tuple[Unit, ...]
    case: Callable[[Unit], Case]
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class _FirstCut:
    """What the first cut has found.

    Attributes:
        selecting, packing: candidates of both stages, those that were refused included.
        of_rows, of_caches: their errors.
    """

    selecting: Sequence[Candidate]
    of_rows: Errors
    packing: Sequence[Candidate]
    of_caches: Errors

    @property
    def best_rows(self) -> list[Candidate]:
        return ranked(allowed(self.selecting), _means(self.of_rows))

    @property
    def best_caches(self) -> list[Candidate]:
        return ranked(allowed(self.packing), _means(self.of_caches))


def calibrate(options: CalibrationOptions) -> Report:
    """Choose, and write the profile, the report and the plot that are asked for.

    Raises:
        KvsluiceError: an option that cannot work, before any work; or a fault of the engines.
    """
    subject, present, prompts = _planned(options)
    for path, option in ((options.out, "--out"), (options.json, "--json"), (options.plot, "--plot")):
        if path is not None:
            check_writable(path, option)
    first = _first_cut(options, subject, prompts)
    final = finalists(subject, first.best_rows, first.best_caches, options.finalists)
    say(f"{len(final)} finalists: {', '.join(one.label for one in final)}", NAME)
    results = run(_second_cut(options, final))
    costs = {one.label: one.costs for one in allowed(final) if one.costs is not None}
    verdict = choose(results.cells, costs, [label for label in results.recipes if label not in costs])
    winner = next(one for one in final if one.label == verdict.chosen)
    profile = _profile(options, present, winner, f"commit {results.environment['commit']}")
    cuts = (tried(first.selecting, first.of_rows), tried(first.packing, first.of_caches))
    report = make_report(results, _settings(options), subject.present(), cuts, final, verdict, profile)
    _write(options, subject, profile, winner, report)
    return report


def _first_cut(options: CalibrationOptions, subject: Subject, prompts: _Prompts) -> _FirstCut:
    """Both stages. The model is let go of with it: the second cut loads it where its processes want it."""
    selecting = propagations(subject, options.grid)
    if selecting:
        say(f"{len(selecting)} ways to select rows, {len(allowed(selecting))} within the budgets", NAME)
        require_some(selecting, "way to select rows")
    say(f"loading {options.evaluation.model}", NAME)
    model = read_model(options.evaluation)
    usual = CHUNK_TOKENS if model.device.type == "cpu" else CUDA_CHUNK_TOKENS
    chunk_tokens = options.evaluation.chunk_tokens or usual
    prompts = replace(prompts, identity={**prompts.identity, "fingerprint": model.fingerprint})

    def of_rows(case: Case, recipes: Recipes) -> Mapping[str, float]:
        return propagation_errors(model, case, recipes, chunk_tokens)

    def of_caches(case: Case, recipes: Recipes) -> Mapping[str, float]:
        return cache_errors(model, subject.shape, case, recipes, chunk_tokens)

    found = _FirstCut(selecting, _stage(options, "propagation", prompts, selecting, of_rows), (), {})
    best = found.best_rows[0].choice if selecting else {}
    packing = caches(subject, options.grid, best)
    if packing:
        say(f"{len(packing)} ways to pack and read them, {len(allowed(packing))} within the budgets", NAME)
        require_some(packing, "way to pack and read rows")
    return replace(found, packing=packing, of_caches=_stage(options, "cache", prompts, packing, of_caches))


def _planned(options: CalibrationOptions) -> tuple[Subject, Profile, _Prompts]:
    """Check the options against the model's shape, and draw the prompts of the first cut."""
    evaluation = options.evaluation
    say("reading texts and the tokenizer", NAME)
    plan = make_plan(evaluation)
    present = (
        stored_profile(locate(evaluation.model).name)
        if evaluation.profile is None
        else read_profile(evaluation.profile)
    )
    subject = Subject(
        load_config(evaluation.model),
        plan.shape,
        load_profile(locate(evaluation.model).name, plan.shape, evaluation.profile),
        options.recipe,
        options.contexts,
        options.max_prefill,
        options.max_shipped,
    )
    fill(options.recipe, plan.shape, subject.profile)  # the model may be none for this recipe at all
    # the next seed's samples: none that a finalist is judged by
    other = make_plan(replace(evaluation, seed=evaluation.seed + 1))
    units = [
        Unit(context, place // len(plan.tasks), plan.tasks[_spread(place, options.prompts, len(plan.tasks))])
        for context in options.contexts
        for place in range(options.prompts)
    ]
    identity = {
        "commit": environment_of(evaluation.device, 1, evaluation.commit)["commit"],
        "model": evaluation.model,
        "dtype": evaluation.dtype,
        "device": evaluation.device,
        "kernels": evaluation.kernels,
        "seed": evaluation.seed,
        "texts": dict(plan.texts),
    }
    return subject, present, _Prompts(tuple(units), other.suite.case, identity)


def _spread(place: int, count: int, num_tasks: int) -> int:
    """Which task a prompt is of: each in turn, or, where there are fewer prompts than tasks, tasks of every kind."""
    return place % num_tasks if count >= num_tasks else place * num_tasks // count


def _stage(
    options: CalibrationOptions, name: str, prompts: _Prompts, candidates: Sequence[Candidate], measure: Measure
) -> Errors:
    """Errors of every candidate that is allowed on every prompt, beyond what an earlier run has done."""
    recipes = {one.label: one.recipe for one in allowed(candidates) if one.recipe is not None}
    if not recipes:
        return {}
    fingerprints = {label: recipe.fingerprint for label, recipe in recipes.items()}
    path = None if options.json is None else beside(options.json, f"{name}.work.jsonl")
    identity = {**prompts.identity, "stage": name, "candidates": fingerprints}
    with kept(path, identity, options.evaluation.fresh) as (done, keep):
        left = [unit for unit in prompts.units if unit not in done]
        with progress(prompts.units, left, f"{NAME}, {name}") as shown:
            for unit in left:
                with forced(REFERENCE) if options.evaluation.kernels == REFERENCE else nullcontext():
                    errors = measure(prompts.case(unit), recipes)
                keep({**asdict(unit), "errors": dict(errors)})
                shown.advance(unit.context)
        return {label: [done[unit]["errors"][label] for unit in prompts.units] for label in recipes}


def _means(errors: Errors) -> dict[str, float]:
    return {label: fmean(own) for label, own in errors.items()}


def _second_cut(options: CalibrationOptions, final: Sequence[Candidate]) -> EvalOptions:
    recipes = {EXACT: get_recipe(EXACT)}
    recipes |= {one.label: one.recipe for one in final if one.recipe is not None}
    json = None if options.json is None else beside(options.json, FINALISTS)
    return replace(options.evaluation, recipes=recipes, json=json)


def _profile(options: CalibrationOptions, present: Profile, winner: Candidate, where: str) -> Profile:
    """What the profile says now, with what was chosen in its place."""
    how = (
        f"kvsluice calibrate --model {locate(options.evaluation.model).name} --recipe {options.recipe.name} "
        f"--max-prefill-flops {options.max_prefill:g} --max-kv-bytes {options.max_shipped:g} "
        f"--context {','.join(map(str, options.contexts))} --samples {options.evaluation.samples}, at {where}"
    )
    try:
        return Profile(**merged(present.stated(), {**winner.choice, "source": how}))  # type: ignore[arg-type]
    except TypeError as exc:
        raise InternalError("a choice that no profile holds") from exc


def _settings(options: CalibrationOptions) -> dict[str, Any]:
    return {
        "recipe": options.recipe.name,
        "max_prefill_flops": options.max_prefill,
        "max_kv_bytes": options.max_shipped,
        "contexts": list(options.contexts),
        "prompts": options.prompts,
        "finalists": options.finalists,
        "grid": dict(vars(options.grid)),
    }


def _write(options: CalibrationOptions, subject: Subject, profile: Profile, winner: Candidate, report: Report) -> None:
    """Profile, report and plot; the profile is read again, and must say what was measured."""
    save_text(options.out, profile.to_json(), "--out")
    again = fill(options.recipe, subject.shape, load_profile("", subject.shape, options.out))
    if winner.recipe is None or again.fingerprint != winner.recipe.fingerprint:
        raise InternalError(f"{options.out.name} does not say what was measured")
    if options.json is not None:
        save_json(options.json, report.to_json())
    if options.plot is not None:
        save_text(options.plot, calibration_plot(report), "--plot")


def run_command(options: CalibrationOptions) -> int:
    """Calibrate and print what came out. Returns the exit status."""
    try:
        report = calibrate(options)
    except KeyboardInterrupt:
        kept = "" if options.json is None else f"; the same command goes on from what lies beside {options.json}"
        print(f"kvsluice calibrate: stopped{kept}", file=sys.stderr)
        return EXIT_INTERRUPTED
    print_overview(report, options.out)
    return 0
