"""How far a sampled share of decode steps is from full attention.

A step of a recipe that chooses chunks is redone for one of its rows, over all that the cache holds, and the
distributions of the next token are compared. What was dropped before decode is in neither. The row that is redone is
run apart from the step, behind it, and changes nothing that anybody reads: no token, cache or count depends on it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...models.forward import Rows, forward_rows
from ...models.model import Model
from ...models.transfers import sent
from ..metrics.figures import DecodeFigures, QualityFigures
from ..telemetry import where
from .step import StepRow, StepRunner

MAX_PENDING = 8  # comparisons that the device has not finished

logger = logging.getLogger(__name__)


class Sampled(NamedTuple):
    """A row that is to be redone.

    Attributes:
        logits: float32 [V], what its step gave.
    """

    row: StepRow
    logits: Tensor


class _Pending(NamedTuple):
    recipe: str
    result: Tensor
    done: torch.cuda.Event | None


class QualityProbe:
    """Redoes rows of steps.

    Args:
        rate: share of the steps of which one row is redone, 0 to 1.
        known: ids of tokens that only the device knows yet, filled in; see `StepComputation.known`.
        figures: what came of it.
    """

    def __init__(self, model: Model, rate: float, known: Callable[[Tensor], Tensor], figures: QualityFigures) -> None:
        self._model, self._rate, self._known, self._figures = model, rate, known, figures
        self._due = 0.0
        self._turn = 0
        self._pending: deque[_Pending] = deque()

    def pick(self, rows: Sequence[StepRow], logits: Tensor) -> Sampled | None:
        """The row of a step that is to be redone, if one is. Rows take turns.

        Args:
            rows: those that sample; at least one.
            logits: float32 [rows, V]; copied.
        """
        self._due += self._rate
        if self._due < 1:
            return None
        self._due -= 1
        self._collect()
        self._turn += 1
        place = self._turn % len(rows)
        row = rows[place]
        why_not = "busy" if len(self._pending) >= MAX_PENDING else row.cache.recipe.why_not_redone
        if why_not is not None:
            self._figures.skipped[row.cache.recipe.name, why_not] += 1
            return None
        return Sampled(row, logits[place].clone())

    def redo(self, sampled: Sampled) -> None:
        """Run a row again, in the step that it is of; whatever comes of it, the step has what it has."""
        recipe = sampled.row.cache.recipe.name
        try:
            self._pending.append(_Pending(recipe, *self._compare(sampled)))
        except Exception as exc:
            logger.warning("a step was not redone with full attention: %s", where(exc))
            self._figures.skipped[recipe, "failed"] += 1
        self._collect()

    def _compare(self, sampled: Sampled) -> tuple[Tensor, torch.cuda.Event | None]:
        """KL(full || sparse) and whether the best token is the same, float32 [2] on its way to the host; when it is
        there, None = now."""
        row, device = sampled.row, self._model.device
        ids, positions = sent(torch.tensor([[row.token_id], [row.position]]), device)
        again = Rows(self._known(ids), positions, row.cache.redone(), row.num_prompt_tokens)
        full = self._model.logits(forward_rows(self._model, [again]))[0].float().log_softmax(dim=-1)
        sparse = sampled.logits.float().log_softmax(dim=-1)
        divergence = (full.exp() * (full - sparse)).nan_to_num(0.0).sum().clamp_min(0)
        found = torch.stack((divergence, (full.argmax() == sparse.argmax()).float()))
        if device.type != "cuda":
            return found, None
        result = torch.empty(2, pin_memory=True)
        result.copy_(found, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(device))
        return result, done

    def _collect(self) -> None:
        """Count the comparisons that are done; waits for none."""
        while self._pending and _is_done(self._pending[0].done):
            recipe, result, _ = self._pending.popleft()
            divergence, agrees = result.tolist()
            self._figures.compared(recipe, divergence, agrees > 0)


def probe_steps(runner: StepRunner, rate: float, figures: DecodeFigures) -> DecodeFigures:
    """Have a share of a runner's steps compared, 0 = none. Returns the figures that count them."""
    if rate:
        runner.probe = QualityProbe(runner.model, rate, runner.computation.known, figures.quality)
    return figures


def _is_done(event: torch.cuda.Event | None) -> bool:
    return event is None or bool(event.query())  # type: ignore[no-untyped-call]
