"""Several processes that share an evaluation's work, and one device; each loads the model.

A small model leaves a GPU waiting for the one thread that launches its kernels, so several such threads are what
makes it busy; threads of one process would wait for one another's interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch

from ..errors import InternalError, KvsluiceError
from .evaluator import Evaluator, make_plan
from .options import EvalOptions
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
    count = min(options.processes, len(groups))
    # spawned: a forked process could not use the device
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, _start, (options, count))
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


def _start(options: EvalOptions, num_processes: int) -> None:
    """Make this process ready for work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told as well, and ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_processes))
    _evaluators.append(Evaluator(options, make_plan(options)))


def _end_with_parent() -> None:
    """A parent that was killed cannot end its processes, and they would keep the device's memory."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _evaluate(units: Sequence[Unit]) -> tuple[list[Record], str | None]:
    """Records, or the message of an error of the tree; those take more than a message to make, so cannot be sent."""
    try:
        return _evaluators[0].evaluate(units), None
    except KvsluiceError as exc:
        return [], exc.message
