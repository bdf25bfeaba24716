"""The engine stays a few packs ahead of its device."""

from __future__ import annotations

import torch

from kvsluice.services.prefill.pace import Pace, make_pace


class Event:
    def __init__(self, name: int, log: list[int]) -> None:
        self.name, self.log = name, log

    def synchronize(self) -> None:
        self.log.append(self.name)


def test_it_waits_for_the_oldest_pack_only_when_too_many_are_launched() -> None:
    waited: list[int] = []
    names = iter(range(10))
    pace = Pace(lambda: Event(next(names), waited), packs_ahead=2)
    seen = []
    for _ in range(5):
        pace.launched()
        seen.append(list(waited))
    assert seen == [[], [], [0], [0, 1], [0, 1, 2]]


def test_a_cpu_needs_none() -> None:
    assert make_pace(torch.device("cpu")) is None
