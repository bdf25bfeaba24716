"""What recipes are worth by what they cost, and by turn: tables and plots from files that evaluations wrote."""

from __future__ import annotations

from collections.abc import Iterator

from .cost_plots import FLOPS_TICKS, Cost, TurnScore, accuracy_against_costs, accuracy_by_turn
from .costs import prefill_share
from .overview import HIT_HEADER, hit_rows
from .pages import table
from .plots import Point
from .recipe_tables import FAMILIES, difference, family_of, mean, origin, signed
from .recorded import Run
from .results import EXACT, Summary
from .statistics import over_turns

TITLES = {"ruler": "RULER-style tasks", "multiturn": "tasks of several turns"}
LEAST_SPREAD = 1.05  # times the least operations are the most that are worth a plot


def costs_plot(run: Run) -> str:
    """SVG of every recipe's average against prefill's operations and against the bytes that decode holds."""
    columns = (
        Cost("floating-point operations of prefill ÷ those of exact", list(_points(run, by_flops=True)), FLOPS_TICKS),
        Cost("bytes that decode holds ÷ bytes of the KV cache in bf16", list(_points(run, by_flops=False))),
    )
    return accuracy_against_costs(columns, EXACT, FAMILIES, _title(run))


def costs_differ(run: Run) -> bool:
    """Whether prefill's operations are known of every recipe and context, and tell recipes apart."""
    places = ((row.recipe, context) for context in run.contexts for row in run.by_average(context))
    shares = [prefill_share(run.results, *place) for place in places]
    known = [share for share in shares if share is not None]
    return len(known) == len(shares) and max(known) > LEAST_SPREAD * min(known)


def turns_plot(run: Run) -> str:
    """SVG of the mean of each turn, a line a recipe."""
    scores = {
        context: {row.recipe: [TurnScore(one.mean, one.low, one.high) for one in _turns(run, row.recipe, context)]
                  for row in run.by_average(context)}
        for context in run.contexts
    }  # fmt: skip
    return accuracy_by_turn(scores, _title(run))


def turn_scores(run: Run) -> str:
    """Two tables for each context: the mean of each turn and what the last lies above the first, and the differences to
    `exact` of each turn."""
    parts = []
    for context in run.contexts:
        rows, differences = [], []
        for row in run.by_average(context):
            turns = _turns(run, row.recipe, context)
            change = over_turns(run.cells(row.recipe, context))
            ends = f"{signed(change.mean)} [{signed(change.low)}, {signed(change.high)}]"
            rows.append((f"`{row.recipe}`", *map(mean, turns), ends))
            differences.append((f"`{row.recipe}`", *map(difference, turns)))
        header = ("recipe", *(f"turn {turn} [95 %]" for turn in range(1, len(turns) + 1)))
        parts += [f"**{context:,} tokens**", table((*header, "last − first [95 %]"), rows)]
        if any(any(cells[1:]) for cells in differences):
            parts += ["Differences to `exact` in the same turn:", table(header, differences)]
    return "\n\n".join([*parts, origin(run)])


def found_prefixes(run: Run) -> str:
    """Two tables for each context: the mean of the first prompts and of those that found the document, and what was
    found and saved."""
    parts = []
    for context in run.contexts:
        rows = []
        for row in run.by_average(context):
            turns = _turns(run, row.recipe, context)
            rows.append((f"`{row.recipe}`", *map(mean, turns)))
        header = ("recipe", "miss [95 %]", *(f"hit {place} [95 %]" for place in range(1, len(turns))))
        found = [(f"`{recipe}`", *cells) for recipe, *cells in hit_rows(run.results, context)]
        parts += [f"**{context:,} tokens**", table(header, rows), table(HIT_HEADER, found)]
    return "\n\n".join([*parts, origin(run)])


def _turns(run: Run, recipe: str, context: int) -> list[Summary]:
    turns = sorted({cell.turn for cell in run.cells(recipe, context) if cell.turn is not None})
    found = (run.summary(recipe, context, turn=turn) for turn in turns)
    return [row for row in found if row is not None]


def _points(run: Run, by_flops: bool) -> Iterator[Point]:
    """One a recipe and context."""
    for context in run.contexts:
        for row in run.by_average(context):
            family = family_of(run.results.recipes[row.recipe].slots)
            cost = prefill_share(run.results, row.recipe, context) if by_flops else run.costs(row.recipe, context)[1]
            assert cost is not None, "known, see `costs_differ`"
            yield Point(row.recipe, family, context, cost, row.mean, row.low, row.high)


def _title(run: Run) -> str:
    what = TITLES.get(run.results.suite, "tasks")
    return f"Average of the {what}, {run.results.model.name}, {run.results.settings['samples']} samples a task"
