"""Tables and plots of what recipes cost and lose, from the files that evaluations wrote."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import recipe_slots
from .pages import table
from .plots import Point, accuracy_against_bytes, needle_maps
from .recorded import Run
from .results import AVERAGE, TRANSFORMERS, Summary
from .simulation import VARIANTS
from .statistics import beside
from .tasks import SUITE
from .turn_tasks import TURN_SUITE

TASKS = {"ruler": tuple(SUITE), "multiturn": tuple(TURN_SUITE), "prefix": tuple(TURN_SUITE)}
NOT_MEASURED = "Not measured yet."
FINGERPRINT_DIGITS = 8
READ_ALL, READ_CHUNKS, LEFT_OUT, DROPPED = FAMILIES = (
    "every row kept and read",
    "every row kept, chunks read",
    "rows left out of deep layers",
    "rows dropped",
)


def origin(run: Run) -> str:
    """Where numbers come from: command, hardware, dtype, commit, samples, fingerprints."""
    results = run.results
    hardware, settings, model = results.environment["hardware"], results.settings, results.model
    place = "context and depth" if "depths" in settings else "task and context"
    adapter = f", adapter `{model.adapter[:FINGERPRINT_DIGITS]}`" if model.adapter else ""
    return (
        f"Measured by `{_command(run)}` on {_machine(hardware)}, in {model.dtype}, at commit "
        f"{results.environment['commit']}: {settings['samples']} samples a {place}, the same for all recipes. "
        f"Model {model.name}, fingerprint `{model.fingerprint[:FINGERPRINT_DIGITS]}`{adapter}. "
        f"`benchmarks/results/{run.name}.json` holds every sample's score."
    )


def _changed(run: Run) -> str:
    """Which recipes are no longer those that ran, as a sentence; "" where all are."""
    changed = recipe_slots.changed_since(run.results)
    if not changed:
        return ""
    return f"Changed since this was measured: {', '.join(f'`{label}`' for label in changed)}."


def _machine(hardware: Mapping[str, Any]) -> str:
    if "gpu" in hardware:
        count = hardware.get("gpus", 1)
        return f"one {hardware['gpu']}" if count == 1 else f"{count} {hardware['gpu']}"
    return f"{hardware['cores']} cores of {hardware['cpu']}, without a GPU"


def _command(run: Run) -> str:
    results, settings = run.results, run.results.settings
    named = [label for label, recipe in results.recipes.items() if label == recipe.name]
    parts = [f"kvsluice eval --suite {results.suite} --model {results.model.name} --recipe {','.join(named)}"]
    for label, recipe in results.recipes.items():
        if label not in named:
            parts.append(f"--variant '{label}={VARIANTS.get(label) or recipe.name.removesuffix('-custom') + ':{…}'}'")
    contexts = ",".join(map(str, settings["contexts"]))
    parts.append(f"--context {contexts} --samples {settings['samples']} --seed {settings['seed']}")
    if results.suite in TASKS and set(settings["tasks"]) != set(TASKS[results.suite]):
        parts.append(f"--task {','.join(settings['tasks'])}")
    if "depths" in settings:
        parts.append(f"--depth {','.join(f'{depth:g}' for depth in settings['depths'])}")
    if "scored_tokens" in settings:
        parts.append(f"--scored-tokens {settings['scored_tokens']}")
    if results.against is not None:
        parts.append(f"--against {TRANSFORMERS}")
    if run.is_reference:
        parts.append("--kernels reference")
    device = "cuda" if "gpu" in results.environment["hardware"] else "cpu"
    return " ".join([*parts, f"--device {device} --dtype {results.model.dtype}"])


def averages(run: Run) -> str:
    """A table for each context: average, difference to `exact`, bytes, operations of prefill, fingerprint."""
    unit = "nats a token" if run.results.suite == "ppl" else "average"
    header = ("recipe", f"{unit} [95 %]", "difference to `exact` [95 %]", "shipped", "held", "prefill", "fingerprint")
    parts = []
    for context in run.contexts:
        rows = []
        for row in run.by_average(context):
            shipped, held = run.costs(row.recipe, context)
            print_of = run.results.recipes[row.recipe].fingerprint[:FINGERPRINT_DIGITS]
            costs = (f"{shipped:.3f}", f"{held:.3f}", run.prefill(row.recipe, context))
            rows.append((f"`{row.recipe}`", mean(row), difference(row), *costs, f"`{print_of}`"))
        parts += [f"**{context:,} tokens**", table(header, rows), run.fallbacks(context)]
    return _paragraphs(*parts, recipe_slots.variants_table(run.results), _agreement(run), _changed(run), origin(run))


def _agreement(run: Run) -> str:
    against = run.results.against
    if against is None:
        return ""
    tokens = "" if against.equal_tokens is None else f", and the same tokens on {against.equal_tokens}"
    equal = f"{against.equal_scores} of {against.samples}"
    return f"`exact` scores as transformers' own model does on {equal} samples{tokens}."


def beside_reference(run: Run, reference: Run) -> str:
    """How the scores of compiled kernels differ from those of plain torch, over the samples that both runs have."""
    lines = []
    for context in reference.contexts:
        for label in reference.results.recipes:
            own, other = run.cells(label, context), reference.cells(label, context)
            if own and other:
                found = beside(own, other)
                shown = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]".replace("-", "−")
                lines.append((f"`{label}`", f"{context:,}", str(sum(len(cell.scores) for cell in other)), shown))
    header = ("recipe", "tokens", "samples", "compiled − plain torch [95 %]")
    return _paragraphs(table(header, lines, numbers_from=1), origin(reference))


def task_scores(run: Run) -> str:
    """A table for each context: recipe by task (and the average)."""
    parts = []
    for context in run.contexts:
        tasks = list(dict.fromkeys(cell.task for cell in run.results.cells if cell.context == context))
        rows = []
        for row in run.by_average(context):
            found = [run.summary(row.recipe, context, task) for task in tasks]
            scores = ["" if one is None else f"{one.mean:.2f}" for one in found]
            rows.append((f"`{row.recipe}`", f"{row.mean:.2f}", *scores))
        shown = [task.replace("_", " ").removeprefix("niah ") for task in tasks]
        parts += [f"**{context:,} tokens**", table(("recipe", "average", *shown), rows)]
    return _paragraphs(*parts)


def overview(run: Run) -> str:
    """One short table: bytes and the average at every context, in the order of the first context's averages."""
    contexts = run.contexts
    header = (
        "recipe",
        f"shipped ÷ bf16 at {contexts[0]:,} tokens",
        "held ÷ bf16",
        "prefill FLOPs ÷ `exact`",
        *(f"average at {context:,} tokens [95 %]" for context in contexts),
    )
    rows = []
    for first in run.by_average(contexts[0]):
        found = [run.summary(first.recipe, context) for context in contexts]
        means = ["" if one is None else mean(one) for one in found]
        shipped, held = run.costs(first.recipe, contexts[0])
        costs = (f"{shipped:.3f}", f"{held:.3f}", run.prefill(first.recipe, contexts[0]))
        rows.append((f"`{first.recipe}`", *costs, *means))
    return _paragraphs(table(header, rows), *map(run.fallbacks, contexts), _changed(run), origin(run))


def perplexity(run: Run) -> str:
    """A table for each context: nats a token, average and by text."""
    return _paragraphs(averages(run), "By text, nats a token:", task_scores(run))


def found_needles(run: Run) -> str:
    """The share of needles found over all depths, recipe by context."""
    contexts = run.contexts
    rows = []
    for first in run.by_average(contexts[-1]):
        found = [run.summary(first.recipe, context) for context in contexts]
        rows.append((f"`{first.recipe}`", *("" if one is None else mean(one) for one in found)))
    header = ("recipe", *(f"{context:,} tokens [95 %]" for context in contexts))
    return _paragraphs(
        table(header, rows), *(run.fallbacks(context) for context in contexts), _changed(run), origin(run)
    )


def measured(recipe: str, runs: Sequence[Run]) -> str:
    """All that was measured of one recipe, a row a run and context."""
    rows = []
    fingerprints = []
    short = []
    changed = ""
    for run in runs:
        if recipe in recipe_slots.changed_since(run.results):
            changed = "The recipe has changed since some of this was measured."
        for context in run.contexts if recipe in run.results.recipes else ():
            row = run.summary(recipe, context)
            if row is None:
                continue
            shipped, held = run.costs(recipe, context)
            suite = f"{run.results.suite}, nats" if run.results.suite == "ppl" else run.results.suite
            place = (f"{suite} (`{run.name}.json`)", f"{context:,}")
            rows.append((*place, mean(row), difference(row), f"{shipped:.3f}", f"{held:.3f}"))
            fingerprints.append(run.results.recipes[recipe].fingerprint[:FINGERPRINT_DIGITS])
            count, samples = run.num_fallbacks(recipe, context)
            if count:
                short.append(f"{count} of {samples} samples at {context:,} tokens in `{run.name}.json`")
    if not rows:
        return NOT_MEASURED
    header = ("suite", "tokens", "score [95 %]", "difference to `exact` [95 %]", "shipped ÷ bf16", "held ÷ bf16")
    prints = ", ".join(f"`{one}`" for one in dict.fromkeys(fingerprints))
    fallbacks = f"Too short for the recipe, so `exact` ran: {', '.join(short)}." if short else ""
    return _paragraphs(table(header, rows), fallbacks, changed, f"Fingerprint of the recipe as it ran: {prints}.")


def bytes_plot(run: Run) -> str:
    """SVG of every recipe's average against the bytes that it ships."""
    points = []
    for context in run.contexts:
        for row in run.by_average(context):
            family = family_of(run.results.recipes[row.recipe].slots)
            shipped = run.costs(row.recipe, context)[0]
            points.append(Point(row.recipe, family, context, shipped, row.mean, row.low, row.high))
    title = (
        f"Average of the RULER-style tasks, {run.results.model.name}, {run.results.settings['samples']} samples a task"
    )
    return accuracy_against_bytes(points, FAMILIES, title)


def needle_plot(run: Run) -> str:
    """SVG of one map a recipe, how often a needle was found by depth and context."""
    cells = [cell for cell in run.results.cells if cell.depth is not None and cell.recipe != TRANSFORMERS]
    scores = {
        (cell.recipe, cell.context, float(cell.depth)): statistics.fmean(cell.scores)
        for cell in cells
        if cell.depth is not None
    }
    title = f"One number in natural text, {run.results.model.name}, {run.results.settings['samples']} samples a place"
    return needle_maps(scores, list(run.results.recipes), title)


def family_of(slots: Mapping[str, Any]) -> str:
    """What a resolved recipe has in common with others, by its slots."""
    if slots["propagation"]["kind"] != "full":
        return LEFT_OUT
    if slots["retrieval"]["kind"] != "all":
        return READ_CHUNKS
    return DROPPED if slots["budget"]["kind"] != "all" and slots["evicted"]["kind"] == "drop" else READ_ALL


def peers(name: str, raw: Mapping[str, Any]) -> str:
    """The comparison with kvpress, from a file that `benchmarks/peer_kvpress.py` wrote."""
    rows = []
    for row in _averages_of(raw):
        between = f"{signed(row['difference'])} [{signed(row['low'])}, {signed(row['high'])}]"
        scores = (f"{row['ours']:.3f}", f"{row['kvpress']:.3f}", between, "yes" if row["agrees"] else "no")
        same = (f"{row['equal_tokens']} of {row['samples']}", f"{row['equal_rows']} of {row['samples']}")
        rows.append((f"`{row['comparison']}`", *scores, *same))
    header = (
        "comparison",
        "ours",
        "kvpress",
        "difference [95 %]",
        "agree",
        "same answer tokens",
        "same number of rows",
    )
    settings, where, peer = raw["settings"], raw["environment"], raw["peer"]
    made = (
        f"Measured by `{_peer_command(raw)}` with {peer['name']} {peer['version']} on "
        f"{_machine(where['hardware'])}, in {raw['model']['dtype']}, at commit {where['commit']}. Fingerprints of our "
        "recipes: "
        + ", ".join(f"{label} `{one['fingerprint'][:FINGERPRINT_DIGITS]}`" for label, one in raw["recipes"].items())
        + f". `benchmarks/results/{name}.json` holds every sample's scores."
    )
    heading = f"**{settings['context']:,} tokens, {settings['share']:.0%} of the rows**"
    return _paragraphs(heading, table(header, rows), "\n".join(_disagreements(raw)), made)


def _peer_command(raw: Mapping[str, Any]) -> str:
    settings = raw["settings"]
    parts = [f"python -P -m kvsluice.benchmarks.peer_kvpress --comparison {' '.join(raw['recipes'])}"]
    if set(settings["tasks"]) != set(SUITE):
        parts.append(f"--task {' '.join(settings['tasks'])}")
    parts += [f"--{name} {settings[name]}" for name in ("context", "samples", "share", "seed")]
    device = "cuda" if "gpu" in raw["environment"]["hardware"] else "cpu"
    return " ".join([*parts, f"--device {device} --dtype {raw['model']['dtype']}"])


def _averages_of(raw: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in raw["summary"] if row["task"] == AVERAGE]


def _disagreements(raw: Mapping[str, Any]) -> Iterator[str]:
    for comparison in dict.fromkeys(row["comparison"] for row in raw["summary"]):
        apart = [row for row in raw["summary"] if row["comparison"] == comparison and not row["agrees"]]
        if apart:
            names = ", ".join("the average" if row["task"] == AVERAGE else f"`{row['task']}`" for row in apart)
            yield f"- `{comparison}` differs in {names}. {apart[0]['reason'] or 'No reason is known.'}"


def mean(row: Summary) -> str:
    """A mean with its interval."""
    return f"{row.mean:.3f} [{row.low:.3f}, {row.high:.3f}]"


def difference(row: Summary) -> str:
    """A difference to `exact` with its interval, "" where there is none."""
    if row.difference is None or row.difference_low is None or row.difference_high is None:
        return ""
    return f"{signed(row.difference)} [{signed(row.difference_low)}, {signed(row.difference_high)}]"


def signed(number: float) -> str:
    """Three digits with a sign, none for zero."""
    text = f"{number:+.3f}"
    return "0.000" if float(text) == 0 else text.replace("-", "−")


def _paragraphs(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)
