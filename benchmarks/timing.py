"""How long an action takes and what the device could do: warm-up, repetitions, medians with quartiles.

On a GPU kernels are timed by events on the device, behind a write that empties its cache and keeps it busy while the
next launches are queued; whole engine steps by the wall clock, between two synchronisations or, where one is launched
before the last has ended, as they follow each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median, quantiles

import torch
from torch import Tensor

from .bench_results import Limits, Timing
from .live_bytes import LiveBytes

FLUSHED_BYTES = 256 << 20  # more than any GPU's cache
COVER_CYCLES = 2_000_000  # of a GPU's clock, about a millisecond
GPU_COPY_BYTES, CPU_COPY_BYTES = 1 << 30, 32 << 20
PINNED_BYTES = 256 << 20
GPU_GEMM_SIZE, CPU_GEMM_SIZE = 8192, 384
LIMIT_REPEATS = 7

Action = Callable[[], object]


def summarize(samples_s: Sequence[float]) -> Timing:
    """Median and quartiles of at least one sample."""
    if len(samples_s) == 1:
        return Timing(samples_s[0], samples_s[0], samples_s[0], 1)
    low_s, _, high_s = quantiles(samples_s, n=4, method="inclusive")
    return Timing(median(samples_s), low_s, high_s, len(samples_s))


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(device: torch.device, action: Action) -> float:
    """Seconds by the wall clock, until the device is done."""
    synchronize(device)
    began_s = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - began_s


def time_steps(device: torch.device, step: Action, count: int) -> list[float]:
    """Seconds between the returns of `count` steps in a row, each of which may leave work under way for the next one to
    wait for. Together they are the time from a device at rest to a device at rest: the first call finds nothing to wait
    for, so what the last has left under way counts as the first one's."""
    synchronize(device)
    samples_s, before_s = [], time.perf_counter()
    for _ in range(count):
        step()
        now_s = time.perf_counter()
        samples_s.append(now_s - before_s)
        before_s = now_s
    synchronize(device)
    samples_s[0] += time.perf_counter() - before_s
    return samples_s


def time_wall(device: torch.device, action: Action, warmup: int, repeats: int) -> Timing:
    """Time whole actions by the wall clock."""
    for _ in range(warmup):
        action()
    return summarize([time_once(device, action) for _ in range(repeats)])


def time_kernel(device: torch.device, action: Action, warmup: int, repeats: int) -> Timing:
    """Time the device's work alone: by events on a GPU, by the wall clock elsewhere."""
    if device.type != "cuda":
        return time_wall(device, action, warmup, repeats)
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
    for _ in range(max(1, warmup)):
        action()
    with torch.cuda.device(device):
        events = []
        for _ in range(repeats):
            flushed.zero_()
            # what the host takes to launch the action passes meanwhile: a step replays its launches from a graph
            torch.cuda._sleep(COVER_CYCLES)  # type: ignore[no-untyped-call]
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            action()
            end.record()
            events.append((begin, end))
        synchronize(device)
        return summarize([begin.elapsed_time(end) / 1e3 for begin, end in events])


def peak_bytes(device: torch.device, action: Action) -> int:
    """The most that one action had allocated at once beside what was there before. It runs once, and on a CPU slowly,
    for there every operation is looked at."""
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        action()
        synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    counter = LiveBytes()
    with counter:
        action()
    return counter.peak_bytes


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Bandwidths by copies, and the rate of a square matrix product of random numbers."""
    on_gpu = device.type == "cuda"
    copy_bytes, size = (GPU_COPY_BYTES, GPU_GEMM_SIZE) if on_gpu else (CPU_COPY_BYTES, CPU_GEMM_SIZE)
    host = torch.ones(CPU_COPY_BYTES, dtype=torch.uint8)
    host_rate = 2 * _copy_rate(host, torch.empty_like(host))
    rate, to_host = host_rate, None
    if on_gpu:
        source = torch.ones(copy_bytes, dtype=torch.uint8, device=device)
        rate = 2 * _copy_rate(source, torch.empty_like(source))
        pinned = torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
        to_host = _copy_rate(source[:PINNED_BYTES], pinned)
        del source
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    multiplying = time_kernel(device, partial(torch.mm, a, b), 2, LIMIT_REPEATS)
    return Limits(rate, 2 * size**3 / multiplying.median_s, host_rate, to_host, copy_bytes, size)


def _copy_rate(source: Tensor, target: Tensor) -> float:
    """Bytes a second, each counted once."""
    copying = time_kernel(source.device, partial(target.copy_, source, non_blocking=True), 2, LIMIT_REPEATS)
    return source.nbytes / copying.median_s


def release(device: torch.device) -> None:
    """Give memory that nothing uses any more back to the device."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()
