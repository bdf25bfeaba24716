"""Figures of a worker's GPU, from NVIDIA's management library and from torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from ..telemetry import where
from .registry import Sample

log = logging.getLogger("kvsluice.metrics")


def gpu_samples(device: Any) -> Callable[[], Iterator[Sample]]:
    """What to ask for when metrics are read; nothing where the device is no GPU.

    Args:
        device: torch's, of the worker's model.
    """
    if device.type != "cuda":
        return lambda: iter(())
    import torch

    uuid = str(torch.cuda.get_device_properties(device).uuid)
    handle = _handle(uuid)
    labels = {"gpu": uuid}

    def samples() -> Iterator[Sample]:
        yield "worker_gpu_torch_reserved_bytes", labels, torch.cuda.memory_reserved(device)
        yield "worker_gpu_torch_allocated_bytes", labels, torch.cuda.memory_allocated(device)
        if handle is not None:
            yield from _of_handle(handle, labels)

    return samples


def _handle(uuid: str) -> Any:
    """The library's name of a GPU; None where the library or its driver is not there."""
    try:
        import pynvml  # type: ignore[import-untyped]

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except Exception as exc:
        log.warning("no figures of the GPU but torch's own: %s", where(exc))
        return None


def _of_handle(handle: Any, labels: dict[str, str]) -> Iterator[Sample]:
    """Those that the GPU has; what one of them lacks is left out."""
    import pynvml

    readers: dict[str, Callable[[], float]] = {
        "worker_gpu_utilization_ratio": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        "worker_gpu_memory_used_bytes": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used,
        "worker_gpu_memory_total_bytes": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).total,
        "worker_gpu_power_watts": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "worker_gpu_temperature_celsius": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "worker_gpu_pcie_receive_bytes_per_second": lambda: _pcie(handle, pynvml.NVML_PCIE_UTIL_RX_BYTES),
        "worker_gpu_pcie_transmit_bytes_per_second": lambda: _pcie(handle, pynvml.NVML_PCIE_UTIL_TX_BYTES),
    }
    for name, read in readers.items():
        try:
            yield name, labels, read()
        except pynvml.NVMLError:
            continue


def _pcie(handle: Any, counter: int) -> float:
    """Bytes a second, over the last 20 ms."""
    import pynvml

    return float(pynvml.nvmlDeviceGetPcieThroughput(handle, counter) * 1024)
