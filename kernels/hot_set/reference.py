"""The hot set of one KV head, in plain Python: which chunks are where after each step."""

from __future__ import annotations

from collections.abc import Sequence

OLDEST = 254  # steps; older slots count as equally old


class HotHead:
    """Args:
    num_slots: chunks that the device holds.
    """

    def __init__(self, num_slots: int) -> None:
        self.held = [-1] * num_slots
        self.used = [-1] * num_slots
        self.clock = 0

    def want(self, chosen: Sequence[int]) -> tuple[list[int], list[int]]:
        """Returns the slot of each chunk, and the chunks that had to be fetched, in the order of `chosen`."""
        self.clock += 1
        missing = [chunk for chunk in chosen if chunk not in self.held]
        for chunk in chosen:
            if chunk in self.held:
                self.used[self.held.index(chunk)] = self.clock

        def age(slot: int) -> int:
            return OLDEST + 1 if self.used[slot] < 0 else min(self.clock - self.used[slot], OLDEST)

        # those that are taken are the oldest, ties go to the lower slot; they are filled from the lowest on
        oldest = sorted(range(len(self.held)), key=lambda slot: (-age(slot), slot))[: len(missing)]
        for chunk, slot in zip(missing, sorted(oldest), strict=True):
            self.held[slot], self.used[slot] = chunk, self.clock
        return [self.held.index(chunk) for chunk in chosen], missing
