"""Which implementation of an op runs on which device."""

from __future__ import annotations

from collections.abc import Collection

import torch

REFERENCE = "reference"
TRITON = "triton"


def backend(device: torch.device, available: Collection[str] = (REFERENCE,)) -> str:
    """Name of the implementation to run on `device`.

    Args:
        device: where the op's tensors lie.
        available: the implementations that the op has; `reference` is always among them.

    Returns:
        `triton` for CUDA tensors of an op that has it, else `reference`.
    """
    return TRITON if device.type == "cuda" and TRITON in available else REFERENCE


def require(condition: bool, message: str) -> None:
    """Refuse tensors that an op cannot take.

    Raises:
        ValueError: `message`, unless the condition holds.
    """
    if not condition:
        raise ValueError(message)
