"""The first half of a decode step: what is computed, and for whom. Nothing here waits for the device.

    turns ──> rows ──> logits ──> tokens, drawn on the device ──┬──> inputs of the next step, on the device
                                                                └──> a copy on its way to the host: `LaunchedStep.read`

The second half, telling what came of it, is the engine's. Between the two another step may be launched, so a launched
step holds no cache: a choice that ends meanwhile frees its memory at once. That is safe because whatever takes the
memory next is written by work that is queued behind the step: on its stream, or on one that waits for it. Pages of host
memory are written by copies on the step's stream, too.

A step that fails, as when memory runs out, is run again in halves, and those in halves, down to a row of one choice:

    compute ──> draw ──> commit: choices and samplers move on, which cannot fail
       └─ a fault ─┴──> withdraw: caches forget the rows, and everything is as it was

So only those fail that fail alone. Tokens are the same, as a row's numbers do not depend on the other rows. This is the
one place that waits for the device, as work of the failed attempt may still read memory that was let go of.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from ...compression.kept_choice import KeptChoice
from ...models.drawing import Drawn, DrawnToken, draw_rows
from ...models.parallel import Ranks, RanksBroken
from ...models.transfers import sent
from ..staging import Event as DeviceEvent
from ..telemetry import where
from .events import RowsEvent
from .failures import is_out_of_memory
from .scheduler import Choice
from .sequence import ChoiceRun, KeptRows, RequestRun, whole_rows
from .step import Brought, StepRow, StepRunner

logger = logging.getLogger(__name__)

MOST_REPLAYED = 128  # more rows of a step than one a choice; others wait for the whole step


@dataclass(slots=True)
class Turn:
    """A choice's part in a step.

    Attributes:
        samples: it gives a new token, rather than replay one.
        bytes_read: by the choice's attention, up to the end of this step.
        rows_recalled: for the choice, up to the end of this step; where the device chooses them, known once it is read.
        error: why it gave nothing.
    """

    choice: Choice
    run: RequestRun
    samples: bool = False
    bytes_read: int = 0
    rows_recalled: int = 0
    error: Exception | None = None


class _Part(NamedTuple):
    """Rows of one turn.

    Attributes:
        number: the turn's in the step, and where the next step finds the token.
        bytes_read: by the choice's attention before.
        chosen: see `SequenceCache.withdraw`.
    """

    number: int
    turn: Turn
    state: ChoiceRun
    row: StepRow
    bytes_read: int
    chosen: Sequence[KeptChoice] = ()

    def noted(self) -> _Part:
        """The same with what `withdraw` has to know, before an attempt."""
        return self._replace(chosen=self.row.cache.chosen()) if self.row.more_ids else self

    def withdraw(self) -> None:
        """Undo what an attempt has done that was not committed."""
        self.row.cache.withdraw(self.row.position, self.chosen)
        self.row.cache.counter.bytes_read = self.bytes_read
        self.state.guarded.error = None


class LaunchedStep:
    """A step that is under way.

    Attributes:
        turns: of all choices that it was to run.
        kept: rows of some of them that are to be kept, complete once what was launched before is done.
        drawn: tokens, and the numbers of the turns that they belong to.
        brought: rows that came back, and the turns that they did for.
        ranks: that hold the model together.
    """

    def __init__(self, turns: Sequence[Turn], ranks: Ranks | None = None) -> None:
        self.turns = turns
        self.ranks = ranks
        self.kept: list[tuple[Turn, KeptRows]] = []
        self.drawn: list[tuple[Drawn, list[int]]] = []
        self.brought: list[tuple[Brought, list[Turn]]] = []

    def check_alone(self, fault: Exception | None) -> None:
        """Where several ranks hold the model, a fault ends them all: the others may have met none, and would wait for
        this one's sums.

        Raises:
            RanksBroken: there are others, and there was a fault.
        """
        if fault is not None and self.ranks is not None:
            raise RanksBroken("a rank of the model failed in a step") from fault

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
        """The token of every turn, once the device has it; None where none was drawn. Turns say then what came back.

        Raises:
            RuntimeError: the device has failed.
        """
        for brought, turns in self.brought:
            for turn, rows in zip(turns, brought.read(), strict=True):
                turn.rows_recalled = rows
        tokens: list[DrawnToken | None] = [None] * len(self.turns)
        for drawn, numbers in self.drawn:
            for number, token in zip(numbers, drawn.read(), strict=True):
                tokens[number] = token
        return tokens


def launch(
    runner: StepRunner, turns: Sequence[Turn], more: Callable[[Choice, int], int] = lambda choice, most: 0
) -> LaunchedStep:
    """Run one row of each turn and draw the next token of those that sample. Faults are kept in the turns.

    Args:
        more: takes up to so many more turns for a choice that only replays tokens. They run in the same step, which
            costs little more than one row: the weights are read once.
    """
    step, left = LaunchedStep(turns, runner.model.ranks), MOST_REPLAYED
    parts: list[_Part] = []
    late: list[int] = []
    for number, turn in enumerate(turns):
        part = _part(step, number, partial(_capped, more, turn.choice, left), is_last_try=False)
        if part is not None:
            parts.append(part)
            left -= len(part.row.more_ids)
        elif turn.error is None:
            late.append(number)
    try:
        done = _run_in_parts(runner, parts, step)
        for number in late:  # what the others needed beside their caches is free again
            part = _part(step, number)
            done |= _run_in_parts(runner, [] if part is None else [part], step)
        _hand_on(runner, step)
        if done:
            runner.prepare(list(done.values()))
    except Exception as exc:
        for turn in turns:
            turn.error = turn.error or exc
    return step


def _part(
    step: LaunchedStep, number: int, more: Callable[[int], int] = lambda most: 0, is_last_try: bool = True
) -> _Part | None:
    """The rows of a turn. None where that failed: unless it has an error now, memory ran out and another try may do."""
    turn = step.turns[number]
    state = turn.run.choices[turn.choice.index]
    turn.samples = state.samples_next
    try:
        kept = state.rows_to_keep()
        if kept is not None:
            step.kept.append((turn, whole_rows(kept, step.ranks)))
        row = state.next_row(more)
        return _Part(number, turn, state, row, row.cache.counter.bytes_read)
    except Exception as exc:
        step.check_alone(exc)
        if is_last_try or not is_out_of_memory(exc):
            turn.error = exc
        return None


def _capped(more: Callable[[Choice, int], int], choice: Choice, left: int, most: int) -> int:
    return more(choice, min(most, left))


def _run_in_parts(runner: StepRunner, parts: Sequence[_Part], step: LaunchedStep) -> dict[int, StepRow]:
    """Run rows together if they can be, else in as few calls as they can. Returns the last rows of those that ran."""
    done: dict[int, StepRow] = {}
    pending = [list(parts)]
    while pending:
        # of a choice whose rows were divided, the later ones are of no use without the earlier ones
        own = [part for part in pending.pop() if part.turn.error is None]
        if not own:
            continue
        halves = _halves(own)
        short = _try(runner, own, step, is_last_try=not halves)
        left = {part.number for part in short}
        done |= {part.number: part.row for part in own if part.number not in left and part.turn.error is None}
        if 0 < len(short) < len(own):
            pending.append(short)
        elif short:
            pending += reversed(halves)  # in order: the first half is taken next
    return done


def _halves(parts: list[_Part]) -> list[list[_Part]]:
    """Two of what can be run one after the other instead of together; none of a single row."""
    if len(parts) > 1:
        middle = len(parts) // 2
        return [parts[:middle], parts[middle:]]
    row = parts[0].row
    if not row.more_ids:
        return []
    ids = (row.token_id, *row.more_ids)
    middle = len(ids) // 2
    first = row._replace(more_ids=ids[1:middle])
    second = row._replace(token_id=ids[middle], position=row.position + middle, more_ids=ids[middle + 1 :])
    return [[parts[0]._replace(row=one, chosen=())] for one in (first, second)]


def _try(runner: StepRunner, parts: list[_Part], step: LaunchedStep, is_last_try: bool) -> list[_Part]:
    """Run rows together. Returns those that did not run and may be tried again; an error that counts is in its turn."""
    try:
        parts = [part.noted() for part in parts]
        short = _run(runner, parts, step, is_last_try)
    except Exception as exc:
        step.check_alone(exc)
        for part in parts:
            part.withdraw()
            part.turn.error = exc if is_last_try else None
        short = [] if is_last_try else parts
        if short:
            logger.warning("%d rows of a step failed, and run again in halves: %s", len(parts), where(exc))
    # not before the error is gone, which holds on to what was computed
    if short:
        runner.wait()
    return short


def _run(runner: StepRunner, parts: Sequence[_Part], step: LaunchedStep, is_last_try: bool) -> list[_Part]:
    """See `_try`. What it raises leaves rows in the caches and nothing else."""
    logits = runner.logits([part.row for part in parts])
    short: list[_Part] = []
    ran: list[_Part] = []
    places: list[int] = []
    for place, part in enumerate(parts):
        error = part.state.guarded.error
        step.check_alone(error)
        if error is None:
            ran.append(part)
            if part.turn.samples:
                places.append(place)
        elif is_last_try or not is_out_of_memory(error):
            part.turn.error = error
        else:
            short.append(part)
    drawing = [parts[place] for place in places]
    drawn = sampled = None
    if drawing:
        own = logits if len(places) == len(parts) else logits[sent(torch.tensor(places), logits.device)]
        if runner.probe is not None:
            sampled = runner.probe.pick([part.row for part in drawing], own)
        drawn = draw_rows([part.state.sampler for part in drawing], own)
    for part in short:
        part.withdraw()
    for part in ran:
        part.state.launched(part.number, 1 + len(part.row.more_ids))
        counter = part.row.cache.counter
        part.turn.bytes_read, part.turn.rows_recalled = counter.bytes_read, counter.rows_recalled
    if runner.brought is not None:
        step.brought.append((runner.brought, [parts[place].turn for place in runner.brought.places]))
    if drawn is not None:
        for row, part in enumerate(drawing):
            part.state.sampler.force_drawn(drawn.ids, row)
        step.drawn.append((drawn, [part.number for part in drawing]))
    if runner.probe is not None and sampled is not None:
        runner.probe.redo(sampled)
    return short


def _hand_on(runner: StepRunner, step: LaunchedStep) -> None:
    """Put the tokens where the next step finds them; not earlier, as rows of this one look up those of the last."""
    for drawn, numbers in step.drawn:
        first = numbers[0]
        if numbers == list(range(first, first + len(numbers))):
            runner.computation.sampled[first : first + len(numbers)] = drawn.ids
        else:
            runner.computation.sampled[sent(torch.tensor(numbers), drawn.ids.device)] = drawn.ids
