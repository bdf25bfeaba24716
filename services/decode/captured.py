"""Steps as CUDA graphs: a step of a shape that has come before is captured, and from then on replayed.

A captured step reads its inputs and tables from buffers of its own, which are filled before each replay; tables only
when they have changed. Rows are filled up with idle ones to a round number, so that few shapes come up.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.step_attention import Block, Tables, step_tables

ROW_BUCKETS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64)
MAX_GRAPHS = 16

Compute = Callable[[Tensor, Tables], Tensor]
"""inputs int64 [n, rows] and tables, both on the device -> logits [rows, V]."""


@dataclass
class _Graph:
    """A captured step. `blocks` are those that its tables were last filled from."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    tables: Tables
    logits: Tensor
    blocks: tuple[Block, ...]


class Captured:
    """Runs steps, captured where they can be.

    Args:
        compute: the step. It must not wait for the device.
        device: where it runs; on a CPU nothing is captured.
        max_graphs: captured steps that are kept, those used last.
    """

    def __init__(self, compute: Compute, device: torch.device, max_graphs: int = MAX_GRAPHS) -> None:
        self._compute = compute
        self._device = device
        self._max_graphs = max_graphs
        self._graphs: OrderedDict[tuple[object, ...], _Graph | None] = OrderedDict()
        self._last: tuple[tuple[Block, ...], Tables] | None = None
        self._pool: Any = None  # a handle, whose type is torch's own

    def run(self, inputs: Tensor, blocks: Sequence[Block]) -> Tensor:
        """Logits [rows, V], void at the next call.

        Args:
            inputs: int64 [n, rows], on the host.
            blocks: of every row's sequence.
        """
        own = tuple(blocks)
        num_rows = inputs.shape[1]
        tables = self._tables(own)
        padded = torch.zeros(inputs.shape[0], tables.num_rows, dtype=torch.int64)
        padded[:, :num_rows] = inputs
        if self._device.type != "cuda":
            return self._compute(padded, tables)[:num_rows]
        key = tables.signature
        if key not in self._graphs:
            # the first step of a shape compiles kernels and takes workspaces, which a capture must not
            self._remember(key, None)
            return self._compute(padded.to(self._device), tables.to(self._device))[:num_rows]
        self._graphs.move_to_end(key)
        captured = self._graphs[key]
        if captured is None:
            captured = self._capture(padded, tables, own)
            self._remember(key, captured)
        captured.inputs.copy_(padded, non_blocking=True)
        if not _same(captured.blocks, own):
            captured.tables.copy_(tables)
            captured.blocks = own
        captured.graph.replay()
        return captured.logits[:num_rows]

    def _tables(self, blocks: tuple[Block, ...]) -> Tables:
        """Padded tables on the host, made anew only when a block has changed."""
        if self._last is not None and _same(self._last[0], blocks):
            return self._last[1]
        tables = step_tables(blocks).padded(_bucket(len(blocks)))
        self._last = (blocks, tables)
        return tables

    def _remember(self, key: tuple[object, ...], captured: _Graph | None) -> None:
        self._graphs[key] = captured
        while len(self._graphs) > self._max_graphs:
            self._graphs.popitem(last=False)

    def _capture(self, inputs: Tensor, tables: Tables, blocks: tuple[Block, ...]) -> _Graph:
        graph = torch.cuda.CUDAGraph()
        own_inputs, own_tables = inputs.to(self._device), tables.to(self._device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(self._device)
        # other threads of the process may go on taking memory meanwhile
        capture = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        with torch.cuda.device(self._device), capture:
            logits = self._compute(own_inputs, own_tables)
        return _Graph(graph, own_inputs, own_tables, logits, blocks)


def _bucket(num_rows: int) -> int:
    return next((size for size in ROW_BUCKETS if size >= num_rows), -(-num_rows // 64) * 64)


def _same(a: tuple[Block, ...], b: tuple[Block, ...]) -> bool:
    return len(a) == len(b) and all(one is other for one, other in zip(a, b, strict=True))
