"""`kvsluice bench store`: how fast requests are written to a store and read back, against clients that do only that.

A redis-server of its own is started on this machine and persists nothing. Values are of the sizes that requests write:
a frame of a prompt, a frame of generated rows, a manifest; and a head is moved. The sides take turns in every
repetition, with as many connections and operations at once. Clients read what they wrote themselves.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from statistics import quantiles
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InternalError
from ..evals.results import EXACT
from .bench_results import Row
from .rows import all_measured, compared
from .subject import Bench
from .timing import summarize

if TYPE_CHECKING:
    from .store_sides import Side

WRITE, READ, HEAD = "store: write", "store: read", "store: move a head"
FRAME, ROWS, MANIFEST = "frame of a prompt", "frame of generated rows", "manifest"
LEAST_SECONDS, TOOL_TRIAL = 0.2, 1000  # of Redis' own tool, which counts milliseconds: seconds, and operations


@dataclass(frozen=True)
class Case:
    """What is done over and over.

    Attributes:
        value: that is written or read; empty for a head.
    """

    what: str
    value: bytes


@dataclass
class Samples:
    """Of one side.

    Attributes:
        operation_s: of every repetition, its time over its operations.
        latency_s: of every operation that counts.
    """

    operation_s: list[float]
    latency_s: list[float]


def measure(bench: Bench) -> list[Row]:
    """Rows of every side for every case and number of operations at once."""
    from ..evals.service_process import running_redis

    rows: list[Row] = []
    cases = _cases(bench)
    batches = [batch for batch in bench.options.batches if batch is not None]
    bench.progress.expect(len(cases) * len(batches))
    with running_redis() as address:
        for batch, case in itertools.product(batches, cases):
            bench.progress.begin(f"{case.what}, {batch} at once")
            empties = [_empty(bench, case, side, batch) for side in _sides(case)]
            rows += all_measured(bench, empties, lambda empty, case=case: _measure(bench, address, case, empty))  # type: ignore[misc]
    return compared(rows, _sides(cases[0]))


def _empty(bench: Bench, case: Case, side: str, batch: int) -> Row:
    return Row(what=case.what, side=side, model=bench.subject.name, batch=batch)


def _sides(case: Case) -> list[str]:
    from .store_sides import LIBRARY, OURS, TOOL, has_tool

    return [OURS, LIBRARY] + ([TOOL] if case.value and has_tool() else [])


def _cases(bench: Bench) -> list[Case]:
    """The values of a request: frames as the service cuts them, of random numbers in the shape of the model."""
    from ..kvstore.frame import decode_frame
    from ..kvstore.identity import frame_key
    from ..kvstore.manifest import ChoiceState, EmittedToken, Manifest, encode_manifest, frame_entry
    from .stored_bytes import KEEP_EVERY, rows_layer
    from .subject import bench_ident

    options, subject = bench.options, bench.subject
    recipe = subject.recipes[EXACT]
    ident = bench_ident("0" * 32, "0" * 32, recipe.fingerprint)
    dtype = str(bench.dtype).removeprefix("torch.")
    generator = torch.Generator().manual_seed(options.seed)

    def frames(num_rows: int, begin: int, layers: int) -> list[bytes]:
        from ..compression.interfaces import EncodedLayer
        from ..services.framing import FramePacker

        packer, made = FramePacker(ident, num_rows, begin=begin), []
        for index in range(layers):
            tensors = {
                part: {name: torch.randn(one.shape, generator=generator).to(one.dtype) for name, one in group.items()}
                for part, group in rows_layer(recipe, subject.shape, num_rows, index, dtype).tensors.items()
            }
            made += packer.add(EncodedLayer(index, tensors))
        return made + packer.flush()

    layer = frames(options.contexts[0], 0, 1)
    rows = frames(KEEP_EVERY, options.contexts[0], subject.shape.num_layers)
    entries = tuple(
        frame_entry(frame_key(ident, i), decode_frame(data)) for i, data in enumerate(layer * subject.shape.num_layers)
    )
    first = (ChoiceState((EmittedToken(0),)),)
    ids = bench.prompt(options.contexts[0])
    manifest = encode_manifest(Manifest(ident, recipe.to_json(), ids, first, 0, entries))
    values = {FRAME: max(layer, key=len), ROWS: max(rows, key=len), MANIFEST: manifest}
    cases = [Case(f"{verb}, {name}", value) for name, value in values.items() for verb in (WRITE, READ)]
    return [*cases, Case(HEAD, b"")]


def _measure(bench: Bench, address: str, case: Case, empties: Sequence[Row]) -> list[Row]:
    from .store_sides import TOOL

    batch, repeats = empties[0].batch or 1, bench.options.repeats
    samples = asyncio.run(_time_clients(bench, address, case, batch))
    rows = []
    for empty in empties:
        figures: dict[str, float] = {}
        if empty.side == TOOL:
            operation_s = [_time_tool(bench, address, case, batch) for _ in range(repeats)]
        else:
            operation_s = samples[empty.side].operation_s
            own = samples[empty.side].latency_s
            figures["latency_p99_s"] = quantiles(own, n=100, method="inclusive")[98] if len(own) > 1 else own[0]
        time_s = summarize(operation_s)
        if case.value:
            sizes = {"value_bytes": float(len(case.value)), "bytes_per_s": len(case.value) / time_s.median_s}
            figures = sizes | figures
        rows.append(replace(empty, time=time_s, figures=figures))
    return rows


def _time_tool(bench: Bench, address: str, case: Case, batch: int) -> float:
    from .store_sides import run_tool

    command = "set" if case.what.startswith(WRITE) else "get"
    first_s = run_tool(address, command, len(case.value), batch, TOOL_TRIAL)
    count = max(TOOL_TRIAL, int(LEAST_SECONDS / first_s))
    return run_tool(address, command, len(case.value), batch, count)


async def _time_clients(bench: Bench, address: str, case: Case, batch: int) -> dict[str, Samples]:
    from .store_sides import open_sides

    options = bench.options
    async with open_sides(address, batch) as sides:
        found = {name: Samples([], []) for name in sides}
        for repeat in range(options.warmup + options.repeats):
            for name, side in sides.items():
                operation_s, latency_s = await _time_once(side, case, batch, options.steps, f"{name}-{repeat}")
                if repeat >= options.warmup:
                    found[name].operation_s.append(operation_s)
                    found[name].latency_s += latency_s
        return found


async def _time_once(side: Side, case: Case, batch: int, count: int, label: str) -> tuple[float, list[float]]:
    """Seconds of one of `count` operations, `batch` of them at once, and the latency of each."""
    from ..kvstore.identity import StoreKey

    keys = [StoreKey(f"kvsluice:frame:{label}:{i}") for i in range(count)]
    if case.what == HEAD:
        work, keys = _head_moves(side, batch, label)
    elif case.what.startswith(WRITE):
        work = lambda i: side.write(keys[i], case.value)  # noqa: E731
    else:
        for key in keys:
            await side.write(key, case.value)
        if await side.read(keys[0]) != case.value:
            raise InternalError("something else was read than had been written")
        work = lambda i: _read(side, keys[i], case.value)  # noqa: E731
    latency_s: list[float] = []
    numbers = iter(range(count))

    async def worker() -> None:
        for i in numbers:
            began_s = time.perf_counter()
            await work(i)
            latency_s.append(time.perf_counter() - began_s)

    began_s = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(batch)))
    operation_s = (time.perf_counter() - began_s) / count
    await side.remove(keys)
    return operation_s, latency_s


async def _read(side: Side, key: Any, value: bytes) -> None:
    found = await side.read(key)
    if found is None or len(found) != len(value):
        raise InternalError("what was written was not read")


def _head_moves(side: Side, batch: int, label: str) -> tuple[Callable[[int], Coroutine[Any, Any, None]], list[Any]]:
    """Moves of as many heads as are moved at once, each one behind its last."""
    from ..kvstore.identity import HeadKey, ManifestKey, StoreKey
    from ..kvstore.store import Head

    names = [HeadKey(f"kvsluice:head:{label}:{i}") for i in range(batch)]
    free = list(range(batch))
    heads: list[Head | None] = [None] * batch

    async def move(i: int) -> None:
        at = free.pop()
        after = Head(1, ManifestKey(StoreKey(f"kvsluice:continuation:{'0' * 64}:1:{i}")))
        await side.move_head(names[at], heads[at], after)
        heads[at] = after
        free.append(at)

    return move, list(names)
