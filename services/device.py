"""Whether the device that a worker is to compute on is there. Brings torch."""

from __future__ import annotations

import torch

from ..errors import ConfigError


def check_device(device: str) -> None:
    """Raises `ConfigError` where torch has no such device here.

    Args:
        device: cpu, cuda or cuda:N.
    """
    if not device.startswith("cuda"):
        return
    count, number = torch.cuda.device_count(), int(device.partition(":")[2] or 0)
    if number >= count:
        why = "this torch is a build for CPUs" if torch.version.cuda is None else f"torch finds {count} GPUs here"
        others = f", cuda:0 to cuda:{count - 1}" if count else ""
        raise ConfigError(f"device: got {device}, and {why}; allowed: cpu{others}")
