"""Copies between a device and the arena of prefixes, on a stream that runs late."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kvsluice.services.prefill.prefix_memory import PlainMemory, StagedMemory
from kvsluice.services.prefill.regions import Region


class LateStream:
    """Transfers whose copies run in order, but only when somebody is behind them."""

    def __init__(self) -> None:
        self.waiting: list[list[tuple[Tensor, Tensor]]] = []
        self.joined: list[Tensor] = []

    def mark(self) -> object:
        return object()

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: object) -> int:
        self.waiting.append(list(pairs))
        return len(self.waiting)

    def join(self, done: int, tensors: Iterable[Tensor]) -> None:
        assert done == len(self.waiting), "a load is the last that was asked for"
        for pairs in self.waiting:
            for source, target in pairs:
                target.copy_(source)
        self.waiting.clear()
        self.joined += tensors


def test_views_are_pieces_of_the_arena() -> None:
    arena = torch.arange(16, dtype=torch.uint8)
    memory = PlainMemory(arena)
    view = memory.view(Region(4, 8))
    assert memory.num_bytes == 16 and view.tolist() == [4, 5, 6, 7]
    memory.save([(torch.zeros(4, dtype=torch.uint8), view)])
    assert arena[3:9].tolist() == [3, 0, 0, 0, 0, 8]


def test_what_is_loaded_is_behind_what_was_saved_though_nobody_waited() -> None:
    stream = LateStream()
    memory = StagedMemory(torch.zeros(64, dtype=torch.uint8), stream)  # type: ignore[arg-type]
    place = memory.view(Region(0, 64)).view(torch.float32)
    memory.save([(torch.full((16,), 1.0), place)])
    memory.save([(torch.full((16,), 2.0), place)])  # the region was given back, and out again
    assert place.sum() == 0, "nobody has waited for the copies"
    out = torch.empty(16)
    memory.load([(place, out)])
    assert out.tolist() == [2.0] * 16 and stream.joined == [out]
