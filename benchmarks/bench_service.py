"""`kvsluice bench service`: streams of a running service, as many at once as asked for, as its clients see them.

Prompts are token ids drawn at random. Tokens are counted from when the last stream has had its first tokens until
each has had `--steps` more on average, so that nothing but generation is timed, with all streams in it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import quantiles
from typing import Any

from ..compression.filling import SLOT_NAMES
from ..compression.recipe import Recipe, get_recipe
from ..errors import InvalidRequest, Overloaded
from .bench_decode import STEP
from .bench_results import Row, load
from .rows import measured
from .subject import Bench
from .timing import summarize

STREAMS = "token of a stream"
BENCH = "bench decode, tokens/s"
LOOK_S = 0.005  # between two looks at how far streams are
DEADLINE_S = 3600.0


@dataclass
class _Stream:
    """What came of one answer.

    Attributes:
        arrivals: when, by the performance counter, and how many tokens at once.
    """

    asked_s: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    def tokens_between(self, begin_s: float, end_s: float) -> int:
        return sum(count for when_s, count in self.arrivals if begin_s < when_s <= end_s)

    def gaps_s(self, begin_s: float, end_s: float) -> list[float]:
        """Seconds a token between two messages."""
        inside = [arrival for arrival in self.arrivals if begin_s < arrival[0] <= end_s]
        return [(late[0] - early[0]) / late[1] for early, late in pairwise(inside)]


def measure(bench: Bench) -> list[Row]:
    """A row for every recipe, context and number of streams."""
    options = bench.options
    cases = list(product(options.contexts, options.batches, bench.subject.recipes.items()))
    against = [] if options.against is None else list(load(options.against).rows)
    bench.progress.expect(len(cases))
    rows = []
    for context, batch, (label, recipe) in cases:
        assert batch is not None, "a service takes numbers only"
        bench.progress.begin(f"{batch} streams of {context} tokens, {label}")
        conditions = {"new tokens": options.new_tokens}
        empty = Row(STREAMS, label, bench.subject.name, recipe.fingerprint, context, batch, conditions)
        row = measured(bench, empty, partial(_time_streams, bench, options.recipes[label]))
        rows.append(_compared(row, against))
    return rows


def check_against(path: Path) -> None:
    """Refuse a file that holds no steps of the decode engine, before anything runs.

    Raises:
        InvalidRequest: it does not.
    """
    if all(row.what != STEP for row in load(path).rows):
        raise InvalidRequest("--against", f"{path} holds no decode steps", "a file that `kvsluice bench decode` wrote")


def request_options(recipe: Recipe) -> dict[str, Any]:
    """How a request names a recipe: by the library's name, and by the slots that differ from it."""
    name = recipe.name.removesuffix("-custom")
    own, plain = json.loads(recipe.to_json()), json.loads(get_recipe(name).to_json())
    return {"recipe": name, "slots": {slot: own[slot] for slot in SLOT_NAMES if own[slot] != plain[slot]}}


def _time_streams(bench: Bench, recipe: Recipe, empty: Row) -> Row:
    return asyncio.run(_run(bench, recipe, empty))


async def _run(bench: Bench, recipe: Recipe, empty: Row) -> Row:
    from ..client import AsyncClient

    assert empty.context is not None and empty.batch is not None
    options = bench.options
    asked = request_options(recipe) | {
        "max_tokens": options.new_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "timeout_s": DEADLINE_S,
    }
    streams: list[_Stream] = []
    async with AsyncClient(options.address) as client:

        async def follow(prompt: tuple[int, ...]) -> None:
            stream = _Stream(time.perf_counter())
            streams.append(stream)
            async for chunk in client.stream(list(prompt), **asked):
                if chunk.token_ids:
                    stream.arrivals.append((time.perf_counter(), len(chunk.token_ids)))

        prompts = [bench.prompt(empty.context, index) for index in range(empty.batch)]
        tasks = [asyncio.create_task(follow(prompt)) for prompt in prompts]
        try:
            begin_s = await _reached(tasks, streams, 0, 1 + options.warmup)
            end_s = await _reached(tasks, streams, _sum(streams) + empty.batch * options.steps, 0)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return _row(empty, streams, begin_s, end_s)


async def _reached(tasks: Sequence[asyncio.Task[None]], streams: Sequence[_Stream], total: int, each: int) -> float:
    """When all streams together have had `total` tokens, and each of them `each`.

    Raises:
        Overloaded: a stream has ended before.
        KvsluiceError: a stream has failed.
    """
    while len(streams) < len(tasks) or min(s.num_tokens for s in streams) < each or _sum(streams) < total:
        for task in tasks:
            if task.done():
                task.result()
                raise Overloaded("an answer had ended before all streams had run long enough; --new-tokens sets where")
        await asyncio.sleep(LOOK_S)
    return time.perf_counter()


def _sum(streams: Sequence[_Stream]) -> int:
    return sum(stream.num_tokens for stream in streams)


def _row(empty: Row, streams: Sequence[_Stream], begin_s: float, end_s: float) -> Row:
    gaps_s = [gap for stream in streams for gap in stream.gaps_s(begin_s, end_s)]
    first_s = [stream.arrivals[0][0] - stream.asked_s for stream in streams]
    figures = {
        "tokens_per_s": sum(stream.tokens_between(begin_s, end_s) for stream in streams) / (end_s - begin_s),
        "token_p99_s": quantiles(gaps_s, n=100, method="inclusive")[98] if len(gaps_s) > 1 else gaps_s[0],
        "mean_first_token_s": sum(first_s) / len(first_s),
        "last_first_token_s": max(first_s),
    }
    return replace(empty, time=summarize(gaps_s), figures=figures)


def _compared(row: Row, against: Sequence[Row]) -> Row:
    """The row with its ratio to the decode engine alone, where that ran the same model, recipe, context and batch: to
    its fastest steps, as which share of chunks stays chosen in a service is not known."""
    meant = (row.model, row.recipe_fingerprint, row.context, row.batch)
    rates = [
        other.figures["tokens_per_s"]
        for other in against
        if other.what == STEP
        and (other.model, other.recipe_fingerprint, other.context, other.batch) == meant
        and other.time is not None
    ]
    if not rates or row.time is None:
        return row
    return replace(row, ratios={**row.ratios, BENCH: row.figures["tokens_per_s"] / max(rates)})
