"""`kvsluice bench tiers`: tokens a second of more sequences than the device's pool holds.

A pool of `--kv-pool-gib` holds so many sequences; 1, 2, 4, 8 … times as many run, and those that the pool does not
hold lie in host memory until it is their turn (`services/decode/tiers`). A step has at most as many rows as the pool
holds sequences, whatever the load, so a ratio to the rate at 1 × says what taking turns costs, and nothing else. A
second side holds the same load whole on the device, where that has the memory: there a step takes other sequences than
the one before, as they are more than its rows.

What turns cost: of a slice of S steps that a sequence has on the device, some steps go by while its memory is on its
way out and in (bytes over the link, and the step that it is asked after), in which its share of the pool does nothing;
and the host gives the device some hundreds of copies for each way and makes its tables anew. With sequences of 0.25 GB,
a link of 50 GB/s, steps of 15 ms, 32 rows and S = 128 that is 3 to 4 steps of 132, and some 25 ms of the host for every
4 steps, most of which the device does not see: 0.8 to 0.95 of the rate are to be expected, whatever the load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch

from ..compression.recipe import Recipe
from ..errors import InternalError, Overloaded
from ..models.sampling import SamplingParams
from ..services.decode.engine import DecodeEngine, DecodeRequest, EmittedChoice, OpenedEvent, TokensEvent
from ..services.decode.overflow import OverflowPolicy
from ..services.decode.scheduler import Demand
from ..services.decode.tiers import TierPolicy, Tiers
from .bench_results import Row
from .rows import measured
from .sequences import GPU_SHARE, cache_bytes, fill_layers, prefill_engine, told
from .subject import Bench
from .timing import release, summarize, time_steps

WHAT = "decode by turns"
LOAD = "sequences ÷ pool"
BY_TURNS, WHOLE = "by turns", "whole on the device"
SLICES = 4  # that a sequence may have before and after what is timed


@dataclass(frozen=True)
class _Load:
    """What runs.

    Attributes:
        in_pool: sequences that the pool holds, which is the most rows of a step.
        count: sequences that run.
        new_tokens: that each of them may have.
    """

    recipe: Recipe
    context: int
    demand: Demand
    in_pool: int
    count: int
    new_tokens: int


def measure(bench: Bench) -> list[Row]:
    """A row for every recipe, context and load, by turns and, beyond the pool, whole on the device."""
    options = bench.options
    cases = list(product(options.contexts, bench.subject.recipes))
    sides = [(side, load) for load in options.loads for side in (BY_TURNS, WHOLE) if side == BY_TURNS or load > 1]
    bench.progress.expect(len(cases) * len(sides))
    assert bench.model is not None, "weights take their memory first"
    release(bench.device)
    rows = []
    for context, label in cases:
        own = []
        for side, load in sides:
            bench.progress.begin(f"{load} × the pool, {context} tokens, {label}, {side}")
            empty = Row(
                what=WHAT,
                side=label,
                model=bench.subject.name,
                recipe_fingerprint=bench.subject.recipes[label].fingerprint,
                context=context,
                conditions={"kv": options.kv, LOAD: load, "where": side},
            )
            own.append(measured(bench, empty, partial(_time, bench, bench.subject.recipes[label], side, load)))
        rows += _compared(own)
    return rows


def _time(bench: Bench, recipe: Recipe, side: str, times: int, empty: Row) -> Row:
    options = bench.options
    assert empty.context is not None
    load = _load(bench, recipe, empty.context, times)
    capacity = (load.in_pool if side == BY_TURNS else load.count) * load.demand.total_bytes
    _check_memory(bench, load, side, capacity)
    policy = TierPolicy(time_slice=options.time_slice)
    engine = DecodeEngine(
        bench.model,
        capacity,
        load.in_pool,
        max_waiting=load.count,
        host=bench.host_pages,
        tiers=policy if side == BY_TURNS else None,
    )
    tiers = engine.scheduler.tiers
    _fill(bench, engine, load, tiers)
    running = _Running(engine)
    # turns that began together end together: the first slices are not what goes on for long
    for _ in range(options.warmup + (options.time_slice if times > 1 else 0)):
        running.step()
    moved = 0 if tiers is None else tiers.counts.bytes_up
    preempted = 0 if tiers is None else tiers.counts.preemptions
    running.tokens = 0
    samples = time_steps(bench.device, running.step, max(options.steps, times * options.time_slice))
    figures = {"tokens_per_s": running.tokens / sum(samples), "tokens_per_step": running.tokens / len(samples)}
    if tiers is not None and times > 1:
        figures["moved_per_s_bytes"] = 2 * (tiers.counts.bytes_up - moved) / sum(samples)
        figures["preemptions"] = tiers.counts.preemptions - preempted
    figures |= {"sequences": load.count, "reserved_bytes": load.demand.total_bytes}
    for request_id in load_ids(load):
        engine.cancel(request_id)
    engine.step()
    engine.check_integrity()
    return replace(empty, batch=load.in_pool, time=summarize(samples), figures=figures)


class _Running:
    """Steps of an engine, and the tokens that they told."""

    def __init__(self, engine: DecodeEngine) -> None:
        self._engine = engine
        self.tokens = 0

    def step(self) -> None:
        """One call of the engine."""
        events = told(self._engine.step())
        self.tokens += sum(len(event.sampled) for event in events if isinstance(event, TokensEvent))


def _load(bench: Bench, recipe: Recipe, context: int, times: int) -> _Load:
    """How many sequences run.

    Raises:
        Overloaded: the pool does not hold one.
    """
    options, capacity = bench.options, cache_bytes(bench)
    new_tokens = options.warmup + max(options.steps, options.time_slice) + SLICES * options.time_slice
    request = _request(recipe, context, new_tokens, 0)
    demand = DecodeEngine(bench.model, capacity, max_num_seqs=1, host=bench.host_pages).demand(request)
    in_pool = min(capacity // demand.total_bytes, options.most_rows or capacity)
    if not in_pool:
        raise Overloaded(f"a sequence may take {demand.total_bytes} bytes; --kv-pool-gib gives {capacity}")
    return _Load(recipe, context, demand, in_pool, in_pool * times, new_tokens)


def _request(recipe: Recipe, context: int, new_tokens: int, index: int) -> DecodeRequest:
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    return DecodeRequest(f"sequence-{index}", 1, context, recipe, sampling)


def load_ids(load: _Load) -> Sequence[str]:
    """Request ids of all sequences."""
    return [f"sequence-{index}" for index in range(load.count)]


def _check_memory(bench: Bench, load: _Load, side: str, capacity: int) -> None:
    """Refuse what neither memory holds before it is made.

    Raises:
        Overloaded: names the memory.
    """
    host = bench.host_pages
    assert host is not None, "the option has a default"
    page, demand = host.page_nbytes, load.demand
    away = 0 if side == WHOLE else load.count - load.in_pool
    on_host = load.count * demand.host_bytes + away * -(-demand.total_bytes // page) * page
    most = host.capacity_bytes * (OverflowPolicy().high if away else 1.0)
    if on_host > most:
        raise Overloaded(f"{load.count} sequences may take {on_host} bytes of host memory; --kv-offloading-gib leaves "
                         f"{int(most)}")  # fmt: skip
    if side == WHOLE and bench.device.type == "cuda":
        free = int(torch.cuda.mem_get_info(bench.device)[0] * GPU_SHARE)
        if capacity > free:
            raise Overloaded(f"{load.count} sequences may take {capacity} bytes; the device has {free}")


def _fill(bench: Bench, engine: DecodeEngine, load: _Load, tiers: Tiers | None) -> None:
    """Start all sequences. Those that are in make room for the others as soon as they have had one step."""
    policy = None if tiers is None else tiers.policy
    if tiers is not None and policy is not None:
        tiers.policy = replace(policy, time_slice=1)
    for index in range(load.count):
        engine.open(_request(load.recipe, load.context, load.new_tokens, index))
    prefill = prefill_engine(bench) if bench.options.kv == "prefill" else None
    started, idle = 0, 0
    while started < load.count:
        opened = [event for event in told(engine.step()) if isinstance(event, OpenedEvent)]
        idle = 0 if opened else idle + 1
        if idle > load.new_tokens:
            raise InternalError(f"{started} of {load.count} sequences were let in")
        for event in opened:
            index = int(event.request_id.removeprefix("sequence-"))
            fill_layers(bench, load.recipe, load.context, index, partial(engine.add_layer, event.request_id), prefill)
            first = EmittedChoice((index % bench.subject.config.vocab_size,))
            engine.commit(event.request_id, bench.prompt(load.context, index), [first])
            started += 1
    if tiers is not None and policy is not None:
        tiers.policy = policy


def _compared(rows: list[Row]) -> list[Row]:
    """Tokens a second against the pool that is not oversubscribed, and against the same load whole on the device."""
    rates = {(row.conditions[LOAD], row.conditions["where"]): row.figures.get("tokens_per_s")
             for row in rows}  # fmt: skip
    out = []
    for row in rows:
        times, ratios = row.conditions[LOAD], {}
        rate, alone, whole = row.figures.get("tokens_per_s"), rates.get((1, BY_TURNS)), rates.get((times, WHOLE))
        if rate is not None and times != 1 and row.conditions["where"] == BY_TURNS:
            ratios = {name: rate / other for name, other in (("1 ×, tokens/s", alone), (f"{WHOLE}, tokens/s", whole))
                      if other is not None}  # fmt: skip
        out.append(replace(row, ratios=ratios))
    return out
