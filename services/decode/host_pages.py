"""Host memory of a decode worker: one arena of equal pages, pinned where a GPU is to reach it.

    0                                                                                             capacity_bytes
    [ page 0 | page 1 | page 2 | … | page n - 1 ]

    pages of   taken by                                  given back when
    values, or a layer's arrival, out of what the        the last choice of the prompt lets go of its cache
    hidden     request's admission has reserved
    rows
    a parked   its leaving the device, out of what the   it is back on the device, is in the store, or has
    request    choice of it has reserved                 ended

Pages lie anywhere, so the arena does not fragment; the lowest free ones are taken, so that those of one taking mostly
follow each other. Who may take how many is the ledger's business (`scheduler`, `tiers`), as with the device's memory
(`pages`).
"""

from __future__ import annotations

import gc
import heapq
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ...errors import ConfigError

PAGE_NBYTES = 1 << 20
ALIGNMENT = 16


@dataclass(frozen=True, eq=False)
class TakenPages:
    """See `HeldPages`.

    Attributes:
        spans: uint8, the same memory in as few pieces as there are.
    """

    views: tuple[Tensor, ...]
    spans: tuple[Tensor, ...]


class HostPages:
    """An arena of pages.

    Args:
        capacity_bytes: what all pages take, at most; whole pages are made of it.
        device: what reads it; its memory is pinned for a GPU. It is registered with the driver instead of allocated
            by it, as torch's allocator of pinned memory rounds up to powers of two.
        page_nbytes: of a page.

    Raises:
        ConfigError: no page fits, or the memory cannot be had or pinned.
    """

    def __init__(self, capacity_bytes: int, device: torch.device, page_nbytes: int = PAGE_NBYTES) -> None:
        if page_nbytes < ALIGNMENT or page_nbytes % ALIGNMENT:
            raise ConfigError(f"page_nbytes: got {page_nbytes}; allowed: a multiple of {ALIGNMENT}")
        if capacity_bytes < page_nbytes:
            raise ConfigError(f"kv_offloading_bytes: got {capacity_bytes}; allowed: at least a page, {page_nbytes}")
        self.page_nbytes = page_nbytes
        self.num_pages = capacity_bytes // page_nbytes
        try:
            self._arena = torch.empty(self.num_pages, page_nbytes, dtype=torch.uint8)
        except RuntimeError as exc:
            raise ConfigError(f"kv_offloading_bytes: this machine does not have {capacity_bytes} bytes") from exc
        if device.type == "cuda":
            _pin(self._arena)
        self._free = list(range(self.num_pages))  # a heap
        self._held: dict[int, tuple[int, ...]] = {}  # number of a taking -> its pages
        self._given_back: deque[int] = deque()  # numbers of takings that nobody holds any more
        self._num_taken = 0

    @property
    def capacity_bytes(self) -> int:
        return self.num_pages * self.page_nbytes

    @property
    def num_free(self) -> int:
        self._settle()
        return len(self._free)

    def take(self, num_pages: int) -> TakenPages:
        """Pages that come back when the result is dropped."""
        if num_pages > self.num_free:
            gc.collect()  # an exception may still hold the frames, and with them the caches, of what has ended
        assert num_pages <= self.num_free, f"{num_pages} pages of {len(self._free)}: admission reserves them"
        indices = tuple(heapq.heappop(self._free) for _ in range(num_pages))
        self._num_taken += 1
        self._held[self._num_taken] = indices
        held = TakenPages(tuple(self._arena[index] for index in indices), self._spans(indices))
        # whenever some cache is collected, in the midst of anything: the pages are put back later
        weakref.finalize(held, self._given_back.append, self._num_taken)
        return held

    def check_integrity(self) -> None:
        """Assert that every page is free or held by one taking, and by that alone."""
        self._settle()
        pages = [*self._free, *(index for indices in self._held.values() for index in indices)]
        assert sorted(pages) == list(range(self.num_pages)), "a page is free, or held, once"

    def _spans(self, indices: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The arena's pieces that ascending pages lie in."""
        firsts = [i for i, index in enumerate(indices) if i == 0 or indices[i - 1] != index - 1]
        ends = [*firsts[1:], len(indices)]
        return tuple(self._arena[indices[a] : indices[b - 1] + 1].view(-1) for a, b in zip(firsts, ends, strict=True))

    def _settle(self) -> None:
        """Put back the pages of what nobody holds any more."""
        while self._given_back:
            for index in self._held.pop(self._given_back.popleft()):
                heapq.heappush(self._free, index)


class Extent:
    """Pieces of host memory as one range of bytes.

    Args:
        parts: uint8 [n] each, contiguous.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = [part.numpy().data for part in parts]
        self._ends = list(accumulate(len(part) for part in self._parts))

    @property
    def num_bytes(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, begin: int, end: int) -> bytes:
        """A copy of bytes [begin, end)."""
        return b"".join(self._views(begin, end))

    def write(self, begin: int, data: bytes | memoryview) -> None:
        """Put bytes in from `begin` on."""
        at, source = 0, memoryview(data)
        for view in self._views(begin, begin + len(source)):
            view[:] = source[at : at + len(view)]
            at += len(view)

    def _views(self, begin: int, end: int) -> Iterator[memoryview]:
        assert 0 <= begin <= end <= self.num_bytes, "it lies within the range"
        number = bisect_right(self._ends, begin)
        while begin < end:
            part, first = self._parts[number], self._ends[number] - len(self._parts[number])
            stop = min(end, self._ends[number])
            yield part[begin - first : stop - first]
            begin, number = stop, number + 1


def _pin(arena: Tensor) -> None:
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    failed = int(runtime.cudaHostRegister(arena.data_ptr(), arena.nbytes, 0))
    if failed:
        raise ConfigError(f"kv_offloading_bytes: {arena.nbytes} bytes cannot be pinned: CUDA error {failed}")
    weakref.finalize(arena, runtime.cudaHostUnregister, arena.data_ptr())
