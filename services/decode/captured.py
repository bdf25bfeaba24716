"""Steps as CUDA graphs: a step of a shape that has come before is captured, and from then on replayed.

A captured step reads its inputs and tables from buffers of its own, which are filled before each replay; tables only
when they have changed. Rows are filled up with idle ones to a round number, so that few shapes come up.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ...kernels.step_attention import Block, Tables, step_tables
from ...models.transfers import sent
from ..telemetry import where

ROW_BUCKETS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64)
MAX_GRAPHS = 64
MAX_SEEN = 4096  # shapes that are remembered
MAX_FAILURES = 3  # of a shape to be captured

logger = logging.getLogger(__name__)

Compute = Callable[[Tensor, Tables], Tensor]
"""inputs int64 [n, rows] and tables, both on the device -> logits [rows, V]."""

Signature = tuple[object, ...]
"""Of tables: what a captured step depends on besides their numbers."""


class Graphs(Protocol):
    """A way to record work on a device and to do it again."""

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record `work`, whose kernels and workspaces are warm, without doing it. Returns what does it, and where the
        result lies then."""
        ...


class CudaGraphs:
    """CUDA graphs that share their memory: what one has given is void once another is replayed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None  # a handle, whose type is torch's own

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """See `Graphs`."""
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(self._device), _no_collection():
            # not `torch.cuda.graph`, which gives all cached memory back to the driver before every capture
            main, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(self._device)
            with torch.cuda.stream(side):
                # other threads of the process may go on taking memory meanwhile
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    result = work()
                except BaseException:
                    self._give_up(graph)
                    raise
                graph.capture_end()
            main.wait_stream(side)
        return graph.replay, result

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that has failed, and take what the device says of it: others would be told of it else."""
        self._pool = None  # the device may count it as being written to still
        for end in (graph.capture_end, partial(torch.cuda.synchronize, self._device)):
            with suppress(RuntimeError):
                end()


@contextmanager
def _no_collection() -> Iterator[None]:
    """What the collector would free may not be freed while a step is captured."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass
class _Captured:
    """A captured step. `blocks` are those that its tables were last filled from; none = they may be anything's."""

    replay: Callable[[], None]
    inputs: Tensor
    tables: Tables
    logits: Tensor
    blocks: tuple[Block, ...]


class CapturedSteps:
    """Runs steps, captured where they can be.

    Args:
        compute: the step. It must not wait for the device.
        device: where it runs.
        graphs: None = nothing is captured.
        max_graphs: captured steps that are kept, those used last.
    """

    def __init__(
        self, compute: Compute, device: torch.device, graphs: Graphs | None, max_graphs: int = MAX_GRAPHS
    ) -> None:
        self._compute = compute
        self._device = device
        self._graphs = graphs
        self._max_graphs = max_graphs
        self._captured: OrderedDict[Signature, _Captured] = OrderedDict()
        self._seen: set[Signature] = set()
        self._failures: Counter[Signature] = Counter()
        self._last: tuple[tuple[Block, ...], Tables] | None = None

    def run(self, inputs: Tensor, blocks: Sequence[Block]) -> Tensor:
        """Logits [rows, V], void at the next call.

        Args:
            inputs: int64 [n, rows], on the host.
            blocks: of every row's sequence.
        """
        own, num_rows = tuple(blocks), inputs.shape[1]
        tables = self._tables(own)
        padded = torch.zeros(inputs.shape[0], tables.num_rows, dtype=torch.int64)
        padded[:, :num_rows] = inputs
        step = self._step(tables, padded, own)
        if step is None:
            return self._compute(sent(padded, self._device), tables.to(self._device))[:num_rows]
        step.inputs.copy_(sent(padded, self._device))
        self._fill(step, tables, own)
        step.replay()
        return step.logits[:num_rows]

    def _tables(self, blocks: tuple[Block, ...]) -> Tables:
        """Padded tables on the host: those of the step before, with the rows written over whose blocks are others. They
        are made anew only where sequences come, go or change places, or a block has another shape."""
        if self._last is not None:
            before, tables = self._last
            self._last = None  # what is half written is not to be relied on
            if len(before) == len(blocks) and all(tables.put(row, blocks[row]) for row in _others(before, blocks)):
                self._last = (blocks, tables)
                return tables
        tables = step_tables(blocks).padded(_bucket(len(blocks)))
        self._last = (blocks, tables)
        return tables

    @staticmethod
    def _fill(step: _Captured, tables: Tables, blocks: tuple[Block, ...]) -> None:
        """Bring a captured step's tables up to date."""
        before, step.blocks = step.blocks, ()  # until they are: copying may fail half way
        if before and step.tables.places == tables.places:
            step.tables.copy_rows(tables, _others(before, blocks))
        else:
            step.tables.copy_(tables)
            step.tables = step.tables.placed_as(tables)
        step.blocks = blocks

    def _step(self, tables: Tables, inputs: Tensor, blocks: tuple[Block, ...]) -> _Captured | None:
        """The captured step of the tables' shape; None where it is not to be captured, or not yet: the first step of a
        shape compiles kernels and takes workspaces, which a capture must not."""
        key = tables.signature
        if self._graphs is None or self._failures[key] == MAX_FAILURES:
            return None
        if key not in self._seen:
            if len(self._seen) >= MAX_SEEN:
                self._seen = set(self._captured)
            self._seen.add(key)
            return None
        if key not in self._captured:
            try:
                self._captured[key] = self._capture(inputs, tables, blocks)
            except Exception as exc:  # nothing of the step has run, so it is computed
                if len(self._failures) >= MAX_SEEN:
                    self._failures.clear()
                self._failures[key] += 1
                logger.warning("a step of %d rows was not captured: %s", tables.num_rows, where(exc))
                return None
        self._captured.move_to_end(key)
        while len(self._captured) > self._max_graphs:
            forgotten, _ = self._captured.popitem(last=False)
            self._seen.discard(forgotten)
        return self._captured[key]

    def _capture(self, inputs: Tensor, tables: Tables, blocks: tuple[Block, ...]) -> _Captured:
        assert self._graphs is not None
        own_inputs, own_tables = inputs.clone().to(self._device), tables.clone().to(self._device)
        replay, logits = self._graphs.capture(lambda: self._compute(own_inputs, own_tables))
        return _Captured(replay, own_inputs, own_tables, logits, blocks)


def _bucket(num_rows: int) -> int:
    return next((size for size in ROW_BUCKETS if size >= num_rows), -(-num_rows // 64) * 64)


def _others(a: tuple[Block, ...], b: tuple[Block, ...]) -> list[int]:
    """Rows whose blocks are not the same, of as many."""
    return [row for row, (one, other) in enumerate(zip(a, b, strict=True)) if one is not other]
