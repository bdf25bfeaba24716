"""The first half of a decode step: what is computed, and for whom. Nothing here waits for the device.

    turns ──> rows ──> logits ──> tokens, drawn on the device ──┬──> inputs of the next step, on the device
                                                                └──> a copy on its way to the host: `LaunchedStep.read`

The second half, telling what came of it, is the engine's. Between the two another step may be launched, so a launched
step holds no cache: a choice that ends meanwhile frees its memory at once. That is safe because whatever takes the
memory next is written by work that is queued behind the step: on its stream, or on one that waits for it. Pages of host
memory are written by copies on the step's stream, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from ...models.drawing import Drawn, DrawnToken, draw_rows
from ...models.transfers import sent
from ..staging import Event as DeviceEvent
from .events import RowsEvent
from .scheduler import Choice
from .sequence import ChoiceRun, KeptRows, RequestRun
from .step import StepRow, StepRunner

MOST_REPLAYED = 128  # more rows of a step than one a choice; others wait for the whole step


@dataclass(slots=True)
class Turn:
    """A choice's part in a step.

    Attributes:
        samples: it gives a new token, rather than replay one.
        bytes_read: by the choice's attention, up to the end of this step.
        error: why it gave nothing.
    """

    choice: Choice
    run: RequestRun
    samples: bool = False
    bytes_read: int = 0
    error: Exception | None = None


class _Part(NamedTuple):
    turn: Turn
    state: ChoiceRun
    row: StepRow


class LaunchedStep:
    """A step that is under way.

    Attributes:
        turns: of all choices that it was to run.
        kept: rows of some of them that are to be kept, complete once what was launched before is done.
    """

    def __init__(self, turns: Sequence[Turn]) -> None:
        self.turns = turns
        self.kept: list[tuple[Turn, KeptRows]] = []
        self.drawn: Drawn | None = None

    def rows_events(self, mark: Callable[[], DeviceEvent | None]) -> list[RowsEvent]:
        """Which rows are to be kept.

        Args:
            mark: a point behind all that the calling thread has given the device.
        """
        after, events = mark() if self.kept else None, []
        for turn, kept in self.kept:
            request = turn.run.request
            rows = list(kept.layers)
            events.append(RowsEvent(request.request_id, request.epoch, turn.choice.index, kept.begin, rows, after))
        return events

    @property
    def has_faults(self) -> bool:
        """Whether some choice is known to have failed: nothing more is launched for it."""
        return any(turn.error is not None for turn in self.turns)

    def read(self) -> list[DrawnToken | None]:
        """The token of every turn, once the device has it; None where none was drawn.

        Raises:
            RuntimeError: the device has failed.
        """
        tokens = iter(() if self.drawn is None else self.drawn.read())
        return [next(tokens, None) if turn.samples and turn.error is None else None for turn in self.turns]


def launch(
    runner: StepRunner, turns: Sequence[Turn], more: Callable[[Choice, int], int] = lambda choice, most: 0
) -> LaunchedStep:
    """Run one row of each turn and draw the next token of those that sample. Faults are kept in the turns.

    Args:
        more: takes up to so many more turns for a choice that only replays tokens. They run in the same step, which
            costs little more than one row: the weights are read once.
    """
    parts, step, left = [], LaunchedStep(turns), MOST_REPLAYED
    for turn in turns:
        state = turn.run.choices[turn.choice.index]
        turn.samples = state.samples_next
        try:
            kept = state.rows_to_keep()
            if kept is not None:
                step.kept.append((turn, kept))
            row = state.next_row(partial(_capped, more, turn.choice, left))
            left -= len(row.more_ids)
            parts.append(_Part(turn, state, row))
        except Exception as exc:
            turn.error = exc
    if parts:
        try:
            _run(runner, parts, step)
        except Exception as exc:
            for part in parts:
                part.turn.error = exc
    return step


def _capped(more: Callable[[Choice, int], int], choice: Choice, left: int, most: int) -> int:
    return more(choice, min(most, left))


def _run(runner: StepRunner, parts: Sequence[_Part], step: LaunchedStep) -> None:
    rows = [part.row for part in parts]
    logits = runner.logits(rows)
    drawing, at = [], []
    for number, (turn, state, row) in enumerate(parts):
        turn.error = state.guarded.error
        if turn.error is None and turn.samples:
            drawing.append(state)
            at.append(number)
        state.launched(number, 1 + len(row.more_ids))
        turn.bytes_read = row.cache.counter.bytes_read
    if drawing:
        if len(at) == len(rows):
            step.drawn = _draw(runner, drawing, logits, slice(0, len(at)))
        else:
            index = sent(torch.tensor(at), logits.device)
            step.drawn = _draw(runner, drawing, logits[index], index)
    runner.prepare(rows)


def _draw(runner: StepRunner, states: Sequence[ChoiceRun], logits: torch.Tensor, at: slice | torch.Tensor) -> Drawn:
    """Draw the next token of each state, from logits float32 [states, V]; `at` are their rows in the step."""
    samplers = [state.sampler for state in states]
    drawn = draw_rows(samplers, logits)
    runner.computation.sampled[at] = drawn.ids
    for number, sampler in enumerate(samplers):
        sampler.force_drawn(drawn.ids, number)
    return drawn
