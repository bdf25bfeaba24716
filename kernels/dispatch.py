"""Which implementation of an op runs on which device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch

REFERENCE = "reference"
TRITON = "triton"

Implementation = TypeVar("Implementation")


def backend(device: torch.device, implementations: Mapping[str, Implementation]) -> Implementation:
    """The implementation to run on `device`.

    Args:
        device: where the op's tensors lie.
        implementations: those that the op has, by name; `reference` is always among them and runs everywhere.

    Returns:
        `triton`'s for CUDA tensors of an op that has it, else `reference`'s.
    """
    name = TRITON if device.type == "cuda" and TRITON in implementations else REFERENCE
    return implementations[name]


def require(condition: bool, message: str) -> None:
    """Refuse tensors that an op cannot take.

    Raises:
        ValueError: `message`, unless the condition holds.
    """
    if not condition:
        raise ValueError(message)
