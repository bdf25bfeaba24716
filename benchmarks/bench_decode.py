"""`kvsluice bench decode`: steps of the decode engine over full caches, against transformers' dynamic cache.

Sequences are distinct, each with memory of its own, unless they are asked to share their prompt. The floor is bytes
over bandwidth: all weights but the embedding's rows once a step, and what attention reads by the caches' own count;
or, where it is later, what was fetched from host memory over the link to the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from ..compression import bound_nbytes
from ..compression.recipe import ModelShape, Recipe, get_recipe
from ..evals.results import EXACT, TRANSFORMERS
from ..services.decode.engine import DecodeEngine, Event
from . import baseline
from .bench_results import Floor, Row
from .rows import all_measured, measured
from .selection import HeldSelection, force
from .sequences import Plan, cache_bytes, finished, plan_sequences, start_sequences, told
from .step_profile import profile
from .subject import Bench
from .timing import release, summarize, time_once, time_steps

STEP = "decode step"
FIRST_STEPS = 80
SHARED = "shared prompt"
PROFILED_STEPS = 8


def measure(bench: Bench) -> list[Row]:
    """A row for every recipe, context, batch and hit rate, and one of a single sequence for transformers."""
    options = bench.options
    cases = list(product(options.contexts, options.batches, bench.subject.recipes))
    bench.progress.expect(len(cases) + (len(options.contexts) if options.baseline else 0))
    capacity = _capacity(bench)
    rows = []
    for context, batch, label in cases:
        wanted = "max" if batch is None else str(batch)
        bench.progress.begin(f"decode of {wanted} × {context} tokens, {label}")
        rows += _engine_rows(bench, capacity, label, context, batch)
    if options.baseline:
        other = baseline.transformers_model(bench.model)
        for context in options.contexts:
            bench.progress.begin(f"decode of 1 × {context} tokens, {TRANSFORMERS}")
            rows.append(_transformers_row(bench, other, context))
    return _compared(rows)


def _capacity(bench: Bench) -> int:
    """Asked for before any cache is made, and the same for all recipes."""
    assert bench.model is not None, "weights take their memory first"
    release(bench.device)
    return cache_bytes(bench)


def _engine_rows(bench: Bench, capacity: int, label: str, context: int, batch: int | None) -> list[Row]:
    """A row for every hit rate, over the same sequences; recipes that select nothing have none."""
    recipe = bench.subject.recipes[label]
    conditions: dict[str, Any] = {"kv": bench.options.kv}
    if batch is None:
        conditions["largest batch"] = True
    if bench.options.share_prompt:
        conditions[SHARED] = True
    empty = Row(
        what=STEP,
        side=label,
        model=bench.subject.name,
        recipe_fingerprint=recipe.fingerprint,
        context=context,
        batch=batch,
        conditions=conditions,
    )
    rates = bench.options.hit_rates if recipe.retrieval.needs_grid else (None,)
    empties = [empty if rate is None else replace(empty, conditions={**conditions, "hit rate": rate}) for rate in rates]
    return all_measured(bench, empties, partial(_time_engine, bench, capacity, recipe, context, batch, rates))


def _time_engine(
    bench: Bench,
    capacity: int,
    recipe: Recipe,
    context: int,
    batch: int | None,
    rates: Sequence[float | None],
    empties: Sequence[Row],
) -> list[Row]:
    options = bench.options
    # one token came with the prompt, and one step is left over, in which sequences end; it is not timed
    each = options.warmup + options.steps + (PROFILED_STEPS if options.profile else 0)
    new_tokens = first_steps(bench.device) + each * len(rates) + 2
    host = bench.host_pages
    plan = plan_sequences(bench, capacity, recipe, context, batch, new_tokens, host)
    engine = DecodeEngine(bench.model, capacity, plan.num_sequences, max_waiting=plan.num_sequences, host=host)
    start_sequences(bench, engine, plan, context)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    running = _Running(bench, engine, rates)
    with nullcontext() if running.held is None else force(running.held):
        running.begin()
        steps = [running.time(rate) for rate in rates]
        running.finish()
    ended = finished(plan, running.events, new_tokens)
    resident = sum(event.resident_bytes for event in ended) / plan.num_sequences
    read = plan.num_sequences * sum(event.bytes_read for event in ended) / sum(event.steps for event in ended)
    memory = _memory_figures(bench, context, new_tokens, resident, plan)
    rows = [replace(empty, batch=plan.num_sequences) for empty in empties]
    return [_row(bench, recipe, row, one, read, memory) for row, one in zip(rows, steps, strict=True)]


def first_steps(device: torch.device) -> int:
    """How many steps are run before any is timed: on a CPU nothing is compiled."""
    return FIRST_STEPS if device.type == "cuda" else 0


@dataclass(frozen=True)
class _Steps:
    """What the steps at one hit rate gave.

    Attributes:
        samples_s: of each timed step.
        wanted, fetched: chunks of values in host memory that a timed step wanted, and that it fetched.
        hit_rate: that was forced, None where the engine asked for no selection.
        parts: seconds of a step by kind of work, where they were asked for.
    """

    samples_s: Sequence[float]
    wanted: float
    fetched: float
    hit_rate: float | None
    parts: Mapping[str, float]


class _Running:
    """Sequences under way, and what they have told so far."""

    def __init__(self, bench: Bench, engine: DecodeEngine, rates: Sequence[float | None]) -> None:
        self._bench = bench
        self._engine = engine
        self.held = None if rates[0] is None else HeldSelection(rates[0], bench.options.seed)
        self.events: list[Event] = []
        engine.runner.computation.selection = self.held

    def begin(self) -> None:
        """Steps past a seal and a tail's first growth: what they compile and record is done once in a worker's life."""
        self._some(first_steps(self._bench.device))

    def time(self, rate: float | None) -> _Steps:
        """Steps at a hit rate; the first ones, which fetch what it has changed, do not count. Every call of the engine
        launches one step, whichever it tells of, and what is set or read here takes effect between two launches."""
        options, device, computation = self._bench.options, self._bench.device, self._engine.runner.computation
        if self.held is not None and rate is not None:
            self.held.share = rate
        self._some(options.warmup)
        computation.hot_counts.zero_()
        samples_s = time_steps(device, self._one, options.steps)
        wanted, fetched = (count / options.steps for count in computation.hot_counts.tolist())
        parts = profile(device, partial(self._some, PROFILED_STEPS)) if options.profile else {}
        forced = self.held.hit_rate if self.held is not None and self.held.calls else None
        return _Steps(samples_s, wanted, fetched, forced, {kind: s / PROFILED_STEPS for kind, s in parts.items()})

    def finish(self) -> None:
        """Run all sequences to their end."""
        while self._engine.has_work:
            self._one()

    def _some(self, count: int) -> None:
        for _ in range(count):
            self._one()

    def _one(self) -> None:
        if self.held is not None:
            self.held.begin_step()
        self.events.extend(told(self._engine.step()))


def _row(bench: Bench, recipe: Recipe, row: Row, steps: _Steps, read: float, memory: Mapping[str, float]) -> Row:
    """A row of what its steps gave.

    Args:
        read: bytes that attention reads in a step.
        memory: figures that all rows of the sequences share.
    """
    row = replace(row, time=summarize(steps.samples_s), parts=steps.parts)
    # sealing comes once in some dozens of steps: a median does not see it, tokens a second must
    figures = {"mean_s": sum(steps.samples_s) / len(steps.samples_s), "slowest_s": max(steps.samples_s), **memory}
    fetched = steps.fetched * chunk_nbytes(recipe, bench.subject.shape, bench.dtype)
    if steps.wanted:
        figures |= {"fetched_bytes": fetched, "hit_rate": 1 - steps.fetched / steps.wanted}
    elif steps.hit_rate is not None:
        figures["hit_rate"] = steps.hit_rate
    elif "hit rate" in row.conditions:
        row = replace(row, conditions={**row.conditions, "hit rate": "not forced: the engine asked for no selection"})
    return _finished(bench, row, read, figures, fetched)


def chunk_nbytes(recipe: Recipe, shape: ModelShape, dtype: torch.dtype) -> int:
    """Bytes of values of one chunk of one KV head."""
    native = str(dtype).removeprefix("torch.")
    specs = recipe.value_codec.tensor_specs(recipe.retrieval.chunk, 1, shape.head_dim, native)
    return sum(spec.nbytes for spec in specs.values())


def _memory_figures(bench: Bench, context: int, new_tokens: int, resident: float, plan: Plan) -> dict[str, float]:
    itemsize = bench.dtype.itemsize
    exact = bound_nbytes(get_recipe(EXACT), bench.subject.shape, context, new_tokens, 1, itemsize)
    figures = {
        "resident_bytes": resident,
        "reserved_bytes": plan.reserved_bytes / plan.num_sequences,
        "resident_over_exact": resident / exact,
    }
    if plan.host_bytes:
        figures["host_bytes"] = plan.host_bytes / plan.num_sequences
    if bench.device.type == "cuda":
        figures["peak_bytes"] = float(torch.cuda.max_memory_allocated(bench.device))
    return figures


def _finished(bench: Bench, row: Row, cache_read: float, figures: dict[str, float], fetched: float = 0.0) -> Row:
    assert row.time is not None and row.batch is not None
    weights = bench.model.weights
    tied = weights.head.data_ptr() == weights.embed.data_ptr()
    moved = weights.nbytes - (0 if tied else weights.embed.nbytes) + cache_read
    mean_s = figures.get("mean_s", row.time.median_s)
    own = {"tokens_per_s": row.batch / mean_s, "cache_read_bytes": cache_read}
    floor, link = Floor.of(bench.limits, moved), Floor.between(bench.limits, fetched)
    return replace(row, floor=max(floor, link, key=lambda one: one.floor_s), figures=own | figures)


def _transformers_row(bench: Bench, other: Any, context: int) -> Row:
    empty = Row(what=STEP, side=TRANSFORMERS, model=bench.subject.name, context=context, batch=1,
                conditions={"kv": "synthetic"})  # fmt: skip
    return measured(bench, empty, partial(_time_transformers, bench, other))


def _time_transformers(bench: Bench, other: Any, empty: Row) -> Row:
    assert empty.context is not None
    options = bench.options
    action = baseline.decode_step(other, bench.model, empty.context, options.seed)
    for _ in range(options.warmup):
        action()
    row = replace(empty, time=summarize([time_once(bench.device, action) for _ in range(options.steps)]))
    config = bench.subject.config
    cache = 2.0 * config.num_layers * config.num_kv_heads * config.head_dim * bench.dtype.itemsize * empty.context
    return _finished(bench, row, cache, {"resident_bytes": cache})


def _compared(rows: list[Row]) -> list[Row]:
    """Tokens a second against transformers' single sequence, and against `exact` at the batch that was asked for."""
    out = []
    for row in rows:
        ratios = {}
        for side in (TRANSFORMERS, EXACT):
            asked = [one for one in rows if one.side == side and one.context == row.context and one is not row]
            if side == EXACT:
                asked = [one for one in asked if _asked(one) == _asked(row)]
            if asked and asked[0].time is not None and row.time is not None:
                ratios[f"{side}, tokens/s"] = row.figures["tokens_per_s"] / asked[0].figures["tokens_per_s"]
        out.append(replace(row, ratios=ratios))
    return out


def _asked(row: Row) -> object:
    return "max" if "largest batch" in row.conditions else row.batch
