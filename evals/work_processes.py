"""Several processes that share an evaluation's work; each loads the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool

from ..errors import InternalError, KvsluiceError
from .evaluator import Evaluator, make_plan
from .options import EvalOptions
from .processes import process_pool
from .suites import Unit
from .workfile import Record

_evaluators: list[Evaluator] = []
"""The one evaluator of a process that `_start` has begun."""


def evaluate_in_processes(options: EvalOptions, groups: Sequence[Sequence[Unit]]) -> Iterator[Record]:
    """Records as they come, in no order.

    Raises:
        KvsluiceError: what an engine failed with, or a process that died.
    """
    if not groups:
        return
    pool = process_pool(min(options.processes, len(groups)), options.device, _start, options)
    try:
        for future in as_completed([pool.submit(_evaluate, group) for group in groups]):
            records, error = future.result()
            if error is not None:
                raise KvsluiceError(error)
            yield from records
    except BrokenProcessPool as exc:
        raise InternalError("a process of the evaluation ended early, perhaps for want of memory") from exc
    finally:
        pool.shutdown(cancel_futures=True)


def _start(options: EvalOptions) -> None:
    """Make this process ready for work."""
    _evaluators.append(Evaluator(options, make_plan(options)))


def _evaluate(units: Sequence[Unit]) -> tuple[list[Record], str | None]:
    """Records, or the message of an error of the tree; those take more than a message to make, so cannot be sent."""
    try:
        return _evaluators[0].evaluate(units), None
    except KvsluiceError as exc:
        return [], exc.message
