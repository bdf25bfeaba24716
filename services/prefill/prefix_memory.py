"""Host memory for what prefill has computed of prefixes, and the copies there and back.

    engine's stream:   pack ── mark ─> next pack …             … load: what follows waits for the copies, on the device
    side stream:                └─> save: copies to the arena      └─> copies from the arena

On a GPU the arena is pinned and all its copies run on one stream of their own, in the order in which they were asked
for. That is why nobody waits for a copy before its region is read, given back or written again: whatever does so next
is a copy behind it. The engine's thread waits for none of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...errors import ConfigError
from ..staging import CudaTransfers, Event, Transfers
from .regions import Region

Pairs = Sequence[tuple[Tensor, Tensor]]
"""(from, to), of equal shape and dtype."""


class PrefixMemory(Protocol):
    """An arena, and ways in and out. Called from the engine's thread.

    Attributes:
        num_bytes: of the arena.
    """

    num_bytes: int

    def view(self, region: Region) -> Tensor:
        """uint8 [region.num_bytes] of the arena."""
        ...

    def save(self, pairs: Pairs) -> None:
        """Copy what the calling thread has launched to views of the arena."""
        ...

    def load(self, pairs: Pairs) -> None:
        """Copy from views of the arena; what the calling thread launches next finds it there."""
        ...


def make_prefix_memory(num_bytes: int, device: torch.device) -> PrefixMemory:
    """Pinned for a CUDA device, all of it at once. On a CPU the system gives memory as it is first written.

    Raises:
        ConfigError: there is not as much.
    """
    try:
        arena = torch.empty(num_bytes, dtype=torch.uint8)
    except RuntimeError as exc:
        raise ConfigError(
            f"prefix_cache_bytes: got {num_bytes}, for which there is no memory; allowed: less, or 0"
        ) from exc
    if device.type != "cuda":
        return PlainMemory(arena)
    _pin(arena)
    return StagedMemory(arena, _Transfers(device))


class PlainMemory:
    """For a model on the CPU: copies are done when they are asked for."""

    def __init__(self, arena: Tensor) -> None:
        self._arena, self.num_bytes = arena, arena.nbytes

    def view(self, region: Region) -> Tensor:
        """See `PrefixMemory`."""
        return self._arena[region.begin : region.end]

    def save(self, pairs: Pairs) -> None:
        """See `PrefixMemory`."""
        for source, target in pairs:
            target.copy_(source)

    def load(self, pairs: Pairs) -> None:
        """See `PrefixMemory`."""
        self.save(pairs)


class StagedMemory(PlainMemory):
    """For a model on a GPU.

    Args:
        arena: uint8 [n], pinned.
        transfers: this memory's own, so that no other copies run on its stream. What they copy from may be let go of
            at once.
    """

    def __init__(self, arena: Tensor, transfers: Transfers) -> None:
        super().__init__(arena)
        self._transfers = transfers

    def save(self, pairs: Pairs) -> None:
        """See `PrefixMemory`."""
        self._transfers.copy(pairs, self._transfers.mark())

    def load(self, pairs: Pairs) -> None:
        """See `PrefixMemory`."""
        # the targets' memory may have been let go of by work that is still to run
        done = self._transfers.copy(pairs, self._transfers.mark())
        self._transfers.join(done, [target for _, target in pairs])


class _Transfers(CudaTransfers):
    """Copies whose sources nobody refers to meanwhile."""

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Event) -> Event:
        """See `Transfers`."""
        pairs = list(pairs)
        for source, _ in pairs:
            if source.is_cuda:
                source.record_stream(self._stream)
        return super().copy(pairs, after)


def _pin(arena: Tensor) -> None:
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    failed = int(runtime.cudaHostRegister(arena.data_ptr(), arena.nbytes, 0))
    if failed:
        raise ConfigError(
            f"prefix_cache_bytes: got {arena.nbytes}, which cannot be pinned (CUDA error {failed}); allowed: less, or 0"
        )
    weakref.finalize(arena, runtime.cudaHostUnregister, arena.data_ptr())
