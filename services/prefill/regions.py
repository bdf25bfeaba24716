"""One range of bytes, given out in contiguous regions. Pure policy, free of torch.

    0                                                         size_bytes
    [ region | region |   gap   | region |        gap          ]
      taken: whoever took it gives it back    free: sorted, never adjacent

A region is taken from the first gap that holds it; one that is given back joins the gaps beside it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

ALIGN = 64  # bytes: regions begin at multiples of it


@dataclass(frozen=True, order=True)
class Region:
    """Bytes [begin, end)."""

    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


def aligned(num_bytes: int) -> int:
    """The next multiple of ALIGN."""
    return -(-num_bytes // ALIGN) * ALIGN


class Regions:
    """Gives out regions of `size_bytes`, which is rounded down to a multiple of ALIGN.

    Attributes:
        free_bytes: a plain number, which other threads may read.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes // ALIGN * ALIGN
        self.free_bytes = self.size_bytes
        self._gaps = [Region(0, self.size_bytes)] if self.size_bytes else []

    def take(self, num_bytes: int) -> Region | None:
        """A region of `num_bytes` ≥ 1, rounded up to ALIGN; None where no gap is as long."""
        need = aligned(num_bytes)
        for index, gap in enumerate(self._gaps):
            if gap.num_bytes >= need:
                rest = Region(gap.begin + need, gap.end)
                self._gaps[index : index + 1] = [rest] if rest.num_bytes else []
                self.free_bytes -= need
                return Region(gap.begin, gap.begin + need)
        return None

    def give_back(self, region: Region) -> None:
        """A region that was taken is free again."""
        at = bisect_left(self._gaps, region)
        begin, end = region.begin, region.end
        self.free_bytes += region.num_bytes
        if at < len(self._gaps) and self._gaps[at].begin == end:
            end = self._gaps.pop(at).end
        if at and self._gaps[at - 1].end == begin:
            begin = self._gaps.pop(at - 1).begin
        insort(self._gaps, Region(begin, end))

    def room_between(self, num_bytes: int, taken: Sequence[Region], first: int = 0) -> int | None:
        """Where a region could be taken if only those were, which are sorted: the number of them that lie before it, at
        least `first`; None where it could not."""
        for before in range(first, len(taken) + 1):
            begin = taken[before - 1].end if before else 0
            end = taken[before].begin if before < len(taken) else self.size_bytes
            if end - begin >= aligned(num_bytes):
                return before
        return None

    def check_integrity(self, taken: list[Region]) -> None:
        """Assert that the regions `taken` and the gaps are all bytes, each once."""
        at = 0
        for piece in sorted([*taken, *self._gaps]):
            assert piece.begin == at and piece.num_bytes > 0, "every byte is taken or free, once"
            at = piece.end
        assert at == self.size_bytes, "every byte is taken or free"
        assert self.free_bytes == sum(gap.num_bytes for gap in self._gaps), "free bytes are those of the gaps"
        ends = {gap.end for gap in self._gaps}
        assert not any(gap.begin in ends for gap in self._gaps), "gaps that touch are one"
