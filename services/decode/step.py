"""One decode step of many sequences: which of them run through the batched kernels, and what those are told.

    rows ──> blocks (a sequence's tables, kept until its rows move) ──> tables of the step ──> forward_step ──> logits

On a CUDA device sequences whose packing the kernels read run together, and a step of a shape that has come before is
captured in a CUDA graph and from then on replayed (`captured.py`). Other sequences, and all on a CPU, attend one by
one. Where some of those that run together recall, the step has rows for what may come back; which do, the device says.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...compression.interfaces import SequenceCache
from ...compression.recipe import ModelShape
from ...compression.sealing import prepare_seals, settle_tails
from ...kernels.dispatch import TRITON, runs
from ...kernels.step_attention import (
    Block,
    Selection,
    StepAttention,
    Tables,
    recall_block,
    sequence_block,
    serves,
    shifted,
)
from ...models.forward import AttendCache, Rows, forward_rows, forward_step
from ...models.model import Model
from ...models.transfers import Fetched, sent
from ..telemetry import where
from .captured import CapturedSteps, CudaGraphs

SPREAD_STEPS = 16  # over which what is ready to be packed is spread
HOT_STEPS = 16  # after which the counts of hot sets are looked at

logger = logging.getLogger(__name__)


class Guarded(AttendCache, Protocol):
    """See `sequence.GuardedCache`.

    Attributes:
        error: the first fault; from then on attention gives zeros.
    """

    error: Exception | None


class Probe(Protocol):
    """See `quality.QualityProbe`."""

    def pick(self, rows: Sequence[StepRow], logits: Tensor) -> Any: ...
    def redo(self, sampled: Any) -> None: ...


class StepRow(NamedTuple):
    """One sequence's part in a step.

    Attributes:
        token_id: or what `sampled_by` gives.
        last_position: of the last row that the sequence may ever have.
        cache: sealed as far as is due.
        guarded: the same for attention one by one; keeps faults to itself.
        more_ids: known tokens that follow; all of them run at once, and give no logits but the last one's.
    """

    token_id: int
    position: int
    num_prompt_tokens: int
    last_position: int
    cache: SequenceCache
    guarded: Guarded
    more_ids: tuple[int, ...] = ()


class Brought(NamedTuple):
    """How many rows came back to sequences of a step, which the host knows once it has run.

    Attributes:
        places: the sequences' in the step.
        uncounted: see `SequenceCache.rows_uncounted`, of each of them.
        rows: int64 [rows], of the step's rows in the order of `numbers`.
        numbers: which of those the sequences' are.
    """

    places: list[int]
    uncounted: list[int]
    rows: Fetched
    numbers: list[int]

    def read(self) -> list[int]:
        """Rows that have come back to each sequence, once the device has run the step."""
        rows: list[int] = self.rows.wait().tolist()
        return [rows[number] - less for number, less in zip(self.numbers, self.uncounted, strict=True)]


def sampled_by(row: int) -> int:
    """What stands for the token that a row of the step before sampled, where only the device knows it yet."""
    return -1 - row


class StepComputation:
    """What one step of many sequences computes; nothing in it waits for the device.

    Args:
        most_rows: of a step.

    Attributes:
        sampled: int64 [most_rows] on the device, tokens that the rows of the step before sampled; whoever samples
            writes them, rows that do not sample have any number.
        hot_counts: int64 [2] on the device, chunks of values in host memory that attention wanted, and those of them
            that had to be fetched; whoever reads them sets them to zero.
        brought: int64 [most_rows] on the device, rows that ever came back to the sequences of the step's rows, of those
            that recall.
        selection: what sequences attend to instead of what scores best, for measurements.
    """

    def __init__(self, model: Model, shape: ModelShape, most_rows: int) -> None:
        self._model = model
        self._num_kv_heads = shape.num_kv_heads
        no_frequencies = torch.empty(0, device=model.device)  # without fixed ones no keys are rotated by kernels
        self._frequencies, self._factor = model.fixed_frequencies or (no_frequencies, 1.0)
        self.sampled = torch.zeros(most_rows, dtype=torch.int64, device=model.device)
        self.hot_counts = torch.zeros(2, dtype=torch.int64, device=model.device)
        self.brought = torch.zeros(most_rows, dtype=torch.int64, device=model.device)
        self.selection: Selection | None = None

    def __call__(self, inputs: Tensor, tables: Tables) -> Tensor:
        """Logits [rows, V] of ids, positions and lengths of prompts, int64 [3, rows]."""
        ids, positions, lengths = inputs
        rope = (self._frequencies, self._factor)
        attention = StepAttention(tables, self._num_kv_heads, *rope, self.hot_counts, self.selection, self.brought)
        return self._model.logits(forward_step(self._model, self.known(ids), positions, lengths, attention))

    def known(self, ids: Tensor) -> Tensor:
        """Token ids int64 [rows], those of the step before filled in."""
        return torch.where(ids < 0, self.sampled[(-1 - ids).clamp_min(0)], ids)


class _Known(NamedTuple):
    """A sequence's tables, and of which state of its cache."""

    version: int
    moves: int
    block: Block | None


class StepRunner:
    """Runs steps.

    Args:
        model: the model; rows of keys have its dtype.
        shape: its shape.
        most_rows: of a step.

    Attributes:
        computation: of the batched steps.
        like: one row of keys, [1, Hkv, d].
        brought: what came back in the last step, of sequences that run together; None = none of them recalls.
        probe: compares steps with full attention; None = nobody does.
        hot_counts: what those of `computation` were some steps ago.
    """

    def __init__(self, model: Model, shape: ModelShape, most_rows: int) -> None:
        self.model = model
        self._shape = shape
        self._blocks: WeakKeyDictionary[SequenceCache, _Known] = WeakKeyDictionary()
        self._retired: list[object] = []  # what work on the device may still read
        graphs = CudaGraphs(model.device) if model.device.type == "cuda" else None
        self.computation = StepComputation(model, shape, most_rows)
        self._steps = CapturedSteps(self.computation, model.device, graphs)
        self._side = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._before = torch.cuda.Event() if self._side is not None else None  # type: ignore[no-untyped-call]
        like = (1, shape.num_kv_heads, shape.head_dim)
        self.hot_counts = (0, 0)
        self._hot_counts = torch.zeros(2, dtype=torch.int64, pin_memory=self._side is not None)
        self._steps_run = 0
        self.brought: Brought | None = None
        self.probe: Probe | None = None
        self.like = torch.empty(like, dtype=model.dtype, device=model.device)

    def logits(self, rows: Sequence[StepRow]) -> Tensor:
        """Append a row, or several, to every sequence. Returns float32 [rows, V] in their order, of the last row of
        each; void at the next call."""
        settle_tails([row.cache for row in rows])  # first, as what is packed ahead in this step reads what it moves
        if self._before is not None:
            self._before.record(torch.cuda.current_stream(self.model.device))
        self.brought = None
        if not runs(TRITON, self.model.device):
            return self._one_by_one(rows)
        blocks = [self._block_or_fault(row) for row in rows]
        together = [i for i, block in enumerate(blocks) if block is not None]
        apart = [i for i, block in enumerate(blocks) if block is None]
        served = [block for block in blocks if block is not None]
        if not together:
            return self._one_by_one(rows)
        joined = self._together([rows[i] for i in together], served, together)
        if not apart:
            return joined
        single = self._one_by_one([rows[i] for i in apart])
        order = sent(torch.tensor(together + apart), joined.device).argsort()
        return torch.cat((joined, single))[order]

    def prepare(self, rows: Sequence[StepRow]) -> None:
        """Do while the device runs the step what later ones need; call it before anything waits for the logits."""
        self._steps_run += 1
        if self._steps_run % HOT_STEPS == 0:
            # what was copied when this came last is on the host by now
            self.hot_counts = (int(self._hot_counts[0]), int(self._hot_counts[1]))
            self._hot_counts.copy_(self.computation.hot_counts, non_blocking=True)
        self._pack_ahead(rows)
        if runs(TRITON, self.model.device):
            self._look_ahead(rows)

    def _pack_ahead(self, rows: Sequence[StepRow]) -> None:
        """Pack what the sequences will seal, on a stream of its own."""
        if self._side is None or self._before is None:
            if runs(TRITON, self.model.device):
                self._prepare_seals(rows)
            return
        with torch.cuda.device(self.model.device), torch.cuda.stream(self._side):
            # work that came before the step may still read memory that packing takes
            self._side.wait_event(self._before)
            self._prepare_seals(rows)

    def _prepare_seals(self, rows: Sequence[StepRow]) -> None:
        # a block is ready to be packed some dozens of steps before it is due, so no step has to pack many
        most_layers = self._shape.num_layers * -(-len(rows) // SPREAD_STEPS)
        caches, ends = [row.cache for row in rows], [row.last_position for row in rows]
        self._retired = []
        try:
            prepare_seals(caches, ends, most_layers, self.model.rope_tables, self._retired)
        except Exception as exc:  # sealing packs what is not there yet, and the step has succeeded
            logger.warning("nothing was packed ahead: %s", where(exc))

    def _look_ahead(self, rows: Sequence[StepRow]) -> None:
        """Make room for the next rows, and tables of what that moves. Tails that are sealed from do not grow for long,
        and what is packed ahead reads them still."""
        for row in rows:
            lasts = row.cache.recipe.window.seal_block or row.cache.runs_apart
            if row.position < row.last_position and not lasts:
                try:
                    self._block(row.cache)
                except Exception as exc:  # the next step meets it again
                    logger.warning("no room was made ahead: %s", where(exc))

    def join(self) -> None:
        """Let what comes next on the device find what was packed ahead; call it before anything is sealed."""
        if self._side is not None:
            torch.cuda.current_stream(self.model.device).wait_stream(self._side)

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def _block_or_fault(self, row: StepRow) -> Block | None:
        """`_block`, whose faults end its own sequence: it runs apart then, where attention gives zeros. So does who has
        several rows, and whose rows do more than the kernels know."""
        if row.more_ids or row.cache.runs_apart:
            return None
        try:
            return self._block(row.cache)
        except Exception as exc:
            row.guarded.error = row.guarded.error or exc
            return None

    def _block(self, cache: SequenceCache) -> Block | None:
        """The tables of a sequence with room for its next row; None where the kernels do not read its packing."""
        known = self._blocks.get(cache)
        if known is not None and known.block is None:
            return None
        cache.reserve(1, self.like)
        if known is not None and known.version == cache.version:
            return known.block
        block = None
        if known is not None and known.block is not None and known.moves == cache.moves:
            shift = cache.shift()
            block = None if shift is None else shifted(known.block, shift)
        if block is None:
            block = self._whole_block(cache)
        self._blocks[cache] = _Known(cache.version, cache.moves, block)
        return block

    def _whole_block(self, cache: SequenceCache) -> Block | None:
        views, fixed_rope = cache.views(), self.model.fixed_frequencies is not None
        if not serves(views, self._shape.head_dim, fixed_rope):
            return None
        block, recall = sequence_block(views), cache.recall_view()
        block.recall = None if recall is None else recall_block(recall, views, block)
        return block

    def _one_by_one(self, rows: Sequence[StepRow]) -> Tensor:
        sizes = [1 + len(row.more_ids) for row in rows]
        ids, positions = sent(_all_rows(rows), self.model.device)
        parts = zip(rows, torch.split(self.computation.known(ids), sizes), torch.split(positions, sizes), strict=True)
        batch = [Rows(own_ids, at, row.guarded, row.num_prompt_tokens) for row, own_ids, at in parts]
        hidden = forward_rows(self.model, batch)
        if max(sizes) > 1:
            hidden = hidden[sent(torch.tensor(sizes).cumsum(0) - 1, hidden.device)]
            for row in rows:
                if row.more_ids:
                    row.cache.note_moved()  # tables count on one row a step
        return self.model.logits(hidden)

    def _together(self, rows: Sequence[StepRow], blocks: Sequence[Block], places: Sequence[int]) -> Tensor:
        numbers = [number for number, block in enumerate(blocks) if block.recall is not None]
        uncounted = [rows[number].cache.rows_uncounted for number in numbers]
        for row in rows:
            row.cache.begin_step()  # first, so that what a step has done that fails half way is looked for
        logits = self._steps.run(self._inputs(rows), blocks)
        for row in rows:
            row.cache.advance(1)
        if numbers:
            brought = Fetched(self.computation.brought[: len(rows)].clone())
            self.brought = Brought([places[number] for number in numbers], uncounted, brought, numbers)
        return logits

    def _inputs(self, rows: Sequence[StepRow]) -> Tensor:
        """Ids, positions and lengths of prompts, int64 [3, rows], on the host."""
        return torch.tensor([[row[field] for row in rows] for field in range(3)], dtype=torch.int64)


def _all_rows(rows: Sequence[StepRow]) -> Tensor:
    """Ids and positions of all rows of each sequence, int64 [2, n], on the host."""
    ids = [token_id for row in rows for token_id in (row.token_id, *row.more_ids)]
    positions = [at for row in rows for at in range(row.position, row.position + 1 + len(row.more_ids))]
    return torch.tensor([ids, positions], dtype=torch.int64)
