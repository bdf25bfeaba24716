"""Which implementation of an op runs on which device."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import TypeVar

import torch

REFERENCE = "reference"
TRITON = "triton"

Implementation = TypeVar("Implementation")

_forced: str | None = None


class Modules(Mapping[str, ModuleType]):
    """The implementations of an op, which are modules of its package, each imported when it is first wanted.

    Args:
        package: `__package__` of the op.
        names: its implementations; `triton` counts only where Triton is installed.
    """

    def __init__(self, package: str, *names: str) -> None:
        self._package = package
        self._names = [name for name in names if name != TRITON or has_triton()]
        self._imported: dict[str, ModuleType] = {}

    def __getitem__(self, name: str) -> ModuleType:
        if name not in self._imported:
            if name not in self._names:
                raise KeyError(name)
            self._imported[name] = importlib.import_module(f".{name}", self._package)
        return self._imported[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@cache
def has_triton() -> bool:
    """Whether Triton is installed; it is not imported to find out."""
    return importlib.util.find_spec("triton") is not None


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Within the context every op that has the implementation `name` runs it, whatever the device."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def backend(device: torch.device, implementations: Mapping[str, Implementation]) -> Implementation:
    """The implementation to run on `device`.

    Args:
        device: where the op's tensors lie.
        implementations: those that the op has, by name; `reference` is always among them and runs everywhere.

    Returns:
        `triton`'s for CUDA tensors of an op that has it, else `reference`'s; another one where it is `forced`.
    """
    wanted = _forced or (TRITON if device.type == "cuda" else REFERENCE)
    return implementations[wanted if wanted in implementations else REFERENCE]


def runs(name: str, device: torch.device) -> bool:
    """Whether ops that have the implementation `name` run it on `device`."""
    wanted = _forced or (TRITON if device.type == "cuda" else REFERENCE)
    return wanted == name and (name != TRITON or has_triton())


def block_rows(device: torch.device, rows: int) -> int:
    """Rows to work on at once, where `rows` suit a CPU: many more on a GPU, whose time goes into launches."""
    return rows if device.type == "cpu" else 16 * rows


def require(condition: bool, message: str) -> None:
    """Refuse tensors that an op cannot take.

    Raises:
        ValueError: `message`, unless the condition holds.
    """
    if not condition:
        raise ValueError(message)
