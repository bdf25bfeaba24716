"""Processes that share work and devices.

A small model leaves a GPU waiting for the one thread that launches its kernels, so several such threads are what
makes it busy; threads of one process would wait for one another's interpreter. Under `cuda` the processes take the
GPUs that are visible in turn, under `cuda:N` they share that one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import torch

from ..errors import InvalidRequest
from .report import environment


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        InvalidRequest: names those that are.
    """
    count = torch.cuda.device_count()
    allowed = ["cpu", "cuda", *(f"cuda:{at}" for at in range(count))] if count else ["cpu"]
    if device not in allowed:
        raise InvalidRequest("--device", repr(device[:64]), ", ".join(allowed))


def environment_of(device: str, count: int, commit: str | None) -> dict[str, Any]:
    """The environment of `count` processes on a device, GPUs and their CUDA included.

    Args:
        commit: takes the place of the checkout's, unless None.
    """
    found = environment()
    if commit is not None:
        found["commit"] = commit
    if device != "cpu":
        found["hardware"]["gpu"] = torch.cuda.get_device_name(device)
        found["hardware"]["gpus"] = min(count, torch.cuda.device_count()) if device == "cuda" else 1
        found["cuda"] = torch.version.cuda
    return found


def process_pool(count: int, device: str, start: Callable[..., None], *arguments: Any) -> ProcessPoolExecutor:
    """A pool whose every process calls `start(*arguments)` before its first task, with its GPU chosen.

    Args:
        count: of processes.
        device: "cpu", "cuda" or "cuda:N".
    """
    # spawned: a forked process could not use the device
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, context, _begin, (context.Value("i", 0), count, device, start, arguments))


def _begin(
    num_begun: Synchronized[int], count: int, device: str, start: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told as well, and ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    with num_begun.get_lock():
        number = num_begun.value
        num_begun.value += 1
    if device.startswith("cuda"):
        index = torch.device(device).index
        torch.cuda.set_device(number % torch.cuda.device_count() if index is None else index)
    start(*arguments)


def _end_with_parent() -> None:
    """A parent that was killed cannot end its processes, and they would keep the device's memory."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
