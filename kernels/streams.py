"""Work beside the current stream's, which a CUDA graph may record as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


class Beside:
    """Work that was given to a side stream; on a CPU, done already."""

    def __init__(self, device: torch.device) -> None:
        self._done = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def record(self) -> None:
        """All of it has been given to the current stream, which is the side one."""
        if self._done is not None:
            self._done.record()  # type: ignore[no-untyped-call]

    def join(self) -> None:
        """Let what comes next on the current stream find it done."""
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)


@contextmanager
def beside(device: torch.device) -> Iterator[Beside]:
    """Within the context work goes to a side stream of a CUDA device, behind all that the current one has been given.
    The current stream has to `join` before what the side stream writes is used, and before what it reads is freed."""
    work = Beside(device)
    if device.type != "cuda":
        yield work
        return
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        yield work
        work.record()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call,no-any-return]
