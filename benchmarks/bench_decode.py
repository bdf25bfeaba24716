"""`kvsluice bench decode`: steps of the decode engine over full caches, against transformers' dynamic cache.

Sequences are distinct, each with memory of its own, unless they are asked to share their prompt. The floor is bytes
over bandwidth: all weights but the embedding's rows once a step, and what attention reads by the caches' own count;
or, where it is later, what was fetched from host memory over the link to the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
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
from .rows import measured
from .selection import HeldSelection, force
from .sequences import Plan, cache_bytes, finished, plan_sequences, start_sequences, told
from .step_profile import profile
from .subject import Bench
from .timing import release, summarize, time_once

STEP = "decode step"
SHARED = "shared prompt"
PROFILED_STEPS = 8


def measure(bench: Bench) -> list[Row]:
    """A row for every recipe, context, batch and hit rate, and one of a single sequence for transformers."""
    options = bench.options
    cases = list(_cases(bench))
    bench.progress.expect(len(cases) + (len(options.contexts) if options.baseline else 0))
    capacity = _capacity(bench)
    rows = []
    for label, context, batch, rate in cases:
        wanted = "max" if batch is None else str(batch)
        bench.progress.begin(f"decode of {wanted} × {context} tokens, {label}" + _rate_text(rate))
        rows.append(_engine_row(bench, capacity, label, context, batch, rate))
    if options.baseline:
        other = baseline.transformers_model(bench.model)
        for context in options.contexts:
            bench.progress.begin(f"decode of 1 × {context} tokens, {TRANSFORMERS}")
            rows.append(_transformers_row(bench, other, context))
    return _compared(rows)


def _cases(bench: Bench) -> Iterator[tuple[str, int, int | None, float | None]]:
    """Label, context, batch and hit rate; recipes that select nothing have no hit rate."""
    options = bench.options
    for context, batch in product(options.contexts, options.batches):
        for label, recipe in bench.subject.recipes.items():
            rates = options.hit_rates if recipe.retrieval.needs_grid else (None,)
            yield from ((label, context, batch, rate) for rate in rates)


def _capacity(bench: Bench) -> int:
    """Asked for before any cache is made, and the same for all recipes."""
    assert bench.model is not None, "weights take their memory first"
    release(bench.device)
    return cache_bytes(bench)


def _rate_text(rate: float | None) -> str:
    return "" if rate is None else f", hit rate {rate:g}"


def _engine_row(bench: Bench, capacity: int, label: str, context: int, batch: int | None, rate: float | None) -> Row:
    recipe = bench.subject.recipes[label]
    conditions: dict[str, Any] = {"kv": bench.options.kv}
    if batch is None:
        conditions["largest batch"] = True
    if bench.options.share_prompt:
        conditions[SHARED] = True
    if rate is not None:
        conditions["hit rate"] = rate
    empty = Row(
        what=STEP,
        side=label,
        model=bench.subject.name,
        recipe_fingerprint=recipe.fingerprint,
        context=context,
        batch=batch,
        conditions=conditions,
    )
    return measured(bench, empty, partial(_time_engine, bench, capacity, recipe, rate))


def _time_engine(bench: Bench, capacity: int, recipe: Recipe, rate: float | None, empty: Row) -> Row:
    assert empty.context is not None
    options = bench.options
    # one token came with the prompt, and one step is left over, in which sequences end; it is not timed
    new_tokens = options.warmup + options.steps + (PROFILED_STEPS if options.profile else 0) + 2
    host = bench.host_pages
    plan = plan_sequences(bench, capacity, recipe, empty.context, empty.batch, new_tokens, host)
    engine = DecodeEngine(bench.model, capacity, plan.num_sequences, max_waiting=plan.num_sequences, host=host)
    start_sequences(bench, engine, plan, empty.context)
    held = None if rate is None else HeldSelection(rate, options.seed)
    engine.runner.computation.selection = held
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    with nullcontext() if held is None else force(held):
        steps = _run_steps(bench, engine, held)
    ended, samples_s, hot = finished(plan, steps.events, new_tokens), steps.samples_s, steps.hot
    resident = sum(event.resident_bytes for event in ended) / plan.num_sequences
    read = plan.num_sequences * sum(event.bytes_read for event in ended) / sum(event.steps for event in ended)
    row = replace(empty, batch=plan.num_sequences, time=summarize(samples_s), parts=steps.parts)
    # sealing comes once in some dozens of steps: a median does not see it, tokens a second must
    figures = {"mean_s": sum(samples_s) / len(samples_s)}
    figures |= _memory_figures(bench, empty.context, new_tokens, resident, plan)
    fetched = hot[1] * chunk_nbytes(recipe, bench.subject.shape, bench.dtype)
    if hot[0]:
        figures |= {"fetched_bytes": fetched, "hit_rate": 1 - hot[1] / hot[0]}
    elif held is not None and held.calls and held.hit_rate is not None:
        figures["hit_rate"] = held.hit_rate
    elif held is not None:
        row = replace(row, conditions={**row.conditions, "hit rate": "not forced: the engine asked for no selection"})
    return _finished(bench, row, read, figures, fetched)


@dataclass
class _Steps:
    """What running all sequences to their end gave.

    Attributes:
        events: of all steps.
        samples_s: of each timed step.
        hot: chunks that a timed step wanted of host memory, and that it fetched.
        parts: seconds of a step by kind of work, where they were asked for.
    """

    events: list[Event] = field(default_factory=list)
    samples_s: list[float] = field(default_factory=list)
    hot: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)


def _run_steps(bench: Bench, engine: DecodeEngine, held: HeldSelection | None) -> _Steps:
    steps, options, computation = _Steps(), bench.options, engine.runner.computation

    def one() -> None:
        if held is not None:
            held.begin_step()
        steps.events.extend(told(engine.step()))

    def some() -> None:
        for _ in range(PROFILED_STEPS):
            one()

    for _ in range(options.warmup):
        one()
    computation.hot_counts.zero_()
    for _ in range(options.steps):
        steps.samples_s.append(time_once(bench.device, one))
    steps.hot = [count / options.steps for count in computation.hot_counts.tolist()]
    if options.profile:
        parts = profile(bench.device, some)
        steps.parts = {kind: seconds / PROFILED_STEPS for kind, seconds in parts.items()}
    while engine.has_work:
        one()
    return steps


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
