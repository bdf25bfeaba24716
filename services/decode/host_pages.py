"""Host memory of a decode worker that values may lie in: one arena of equal pages, which a GPU reads in place.

    0                                                                                             capacity_bytes
    [ page 0 | page 1 | page 2 | … | page n - 1 ]

    page        taken by                                  given back when
    of a layer  the layer's arrival, out of what the      the last choice of the prompt lets go of its cache
                request's admission has reserved

A layer's pages lie anywhere, so the arena does not fragment. Who may take how many is the ledger's business
(`scheduler`), as with the device's memory (`pages`).
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ConfigError

PAGE_NBYTES = 1 << 20
ALIGNMENT = 16


@dataclass(frozen=True, eq=False)
class TakenPages:
    """See `HeldPages`."""

    views: tuple[Tensor, ...]


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
        self._free = list(range(self.num_pages - 1, -1, -1))

    @property
    def capacity_bytes(self) -> int:
        return self.num_pages * self.page_nbytes

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, num_pages: int) -> TakenPages:
        """Pages that come back when the result is dropped."""
        if num_pages > len(self._free):
            gc.collect()  # an exception may still hold the frames, and with them the caches, of what has ended
        assert num_pages <= len(self._free), f"{num_pages} pages of {len(self._free)}: admission reserves them"
        # one by one, as a page may come back meanwhile, whenever some cache is collected
        indices = [self._free.pop() for _ in range(num_pages)]
        held = TakenPages(tuple(self._arena[index] for index in indices))
        weakref.finalize(held, self._free.extend, indices)
        return held

    def check_integrity(self) -> None:
        """Assert that no page is free twice."""
        assert len(set(self._free)) == len(self._free) <= self.num_pages, "a page is free once"
        assert all(0 <= index < self.num_pages for index in self._free), "a free page is one of the arena's"


def _pin(arena: Tensor) -> None:
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    failed = int(runtime.cudaHostRegister(arena.data_ptr(), arena.nbytes, 0))
    if failed:
        raise ConfigError(f"kv_offloading_bytes: {arena.nbytes} bytes cannot be pinned: CUDA error {failed}")
    weakref.finalize(arena, runtime.cudaHostUnregister, arena.data_ptr())
