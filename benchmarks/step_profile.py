"""Where the device's time goes: seconds by kind of work, from what the device itself recorded."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

from .. import kernels
from ..kernels.dispatch import has_triton

MATRIX, COPIES, REST, IDLE = "matrix products", "copies", "other operations", "nothing ran"
CUDNN = "cuDNN attention"
# names that NVIDIA's libraries give their kernels
_LIBRARIES = (
    (re.compile(r"cudnn.*(sdpa|fmha|flash)|(sdpa|fmha|flash).*cudnn", re.IGNORECASE), CUDNN),
    (re.compile(r"gemm|gemv|nvjet|cutlass|xmma|splitk", re.IGNORECASE), MATRIX),
    (re.compile(r"^mem(cpy|set)", re.IGNORECASE), COPIES),
)


class Span(NamedTuple):
    """Something that the device ran, in seconds of its own clock."""

    name: str
    begin_s: float
    end_s: float


def profile(device: torch.device, action: Callable[[], object]) -> dict[str, float]:
    """Seconds of an action by kind of work, the longest first; what runs at once counts twice, `nothing ran` is the
    time between the first and the last of it in which nothing did.

    Args:
        device: a CUDA device.
    """
    activity = torch.profiler.ProfilerActivity.CUDA
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[activity], acc_events=True) as recorded:
        action()
        torch.cuda.synchronize(device)
    spans = [
        Span(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in recorded.events() or ()
        if event.device_type.name == "CUDA"
    ]
    return by_kind(spans, own_kernels())


def by_kind(spans: Iterable[Span], own: Mapping[str, str]) -> dict[str, float]:
    """Sum spans by kind.

    Args:
        own: kernel name -> kind, of this project's kernels.
    """
    ordered = sorted(spans, key=lambda one: one.begin_s)
    found: dict[str, float] = {}
    idle_s, latest_s = 0.0, ordered[0].begin_s if ordered else 0.0
    for span in ordered:
        kind = _kind(span.name, own)
        found[kind] = found.get(kind, 0.0) + span.end_s - span.begin_s
        idle_s += max(0.0, span.begin_s - latest_s)
        latest_s = max(latest_s, span.end_s)
    found[IDLE] = idle_s
    return dict(sorted(found.items(), key=lambda item: -item[1]))


@cache
def own_kernels() -> Mapping[str, str]:
    """Name of every Triton kernel of the project -> the module it stands in, without `triton`."""
    if not has_triton():
        return {}
    found: dict[str, str] = {}
    for info in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        if "triton" not in info.name.split("."):
            continue
        module = importlib.import_module(info.name)
        place = info.name.removeprefix(f"{kernels.__name__}.").split(".")
        kind = ".".join(part for part in place if part != "triton")
        # a compiled function holds the one that it was written as
        written: list[Any] = [getattr(one, "fn", None) for one in vars(module).values()]
        found |= {one.__name__: kind for one in written if getattr(one, "__module__", None) == info.name}
    return found


def _kind(name: str, own: Mapping[str, str]) -> str:
    if name in own:
        return own[name]
    return next((kind for pattern, kind in _LIBRARIES if pattern.search(name)), REST)
