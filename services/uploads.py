"""Arrived layers to the device, beside the steps that run there.

    receiving thread:   layer in host memory ── piece by piece ─> pinned buffer ── side stream: copy ─> device tensors
    engine thread:      a step … a step ── the next one waits, on the device, until the copy is done

Copying from memory that is not pinned would hold up the thread that does it and the stream that it does it on. Here
that thread is never the engine's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ..compression.interfaces import EncodedLayer
from .staging import BUFFER_BYTES, CudaTransfers, Event, Transfers

NUM_BUFFERS = 2

Wait = Callable[[], None]
"""Has what the calling thread launches from now on wait, on the device, until a layer is there."""


class Uploads(Protocol):
    """A way for layers from host memory to where they are decoded."""

    def upload(self, encoded: EncodedLayer) -> tuple[EncodedLayer, Wait]:
        """The layer on the device, and what its user calls before it uses it. Any thread may call."""
        ...


def make_uploads(device: torch.device) -> Uploads:
    """Through pinned buffers to a CUDA device; where there is nothing to copy, the layer itself."""
    return BufferedUploads(device, CudaTransfers(device)) if device.type == "cuda" else NoUploads()


class NoUploads:
    """Layers are decoded where they arrive."""

    def upload(self, encoded: EncodedLayer) -> tuple[EncodedLayer, Wait]:
        """See `Uploads`."""
        return encoded, lambda: None


class BufferedUploads:
    """Copies through a few pinned buffers, one layer after the other.

    Args:
        device: where layers go.
        transfers: to that device.
        buffer_bytes: of one buffer; larger tensors go in pieces.
    """

    def __init__(
        self,
        device: torch.device,
        transfers: Transfers,
        buffer_bytes: int = BUFFER_BYTES,
        num_buffers: int = NUM_BUFFERS,
    ) -> None:
        self._device = device
        self._transfers = transfers
        self._buffer_bytes = buffer_bytes
        self._lock = threading.Lock()
        # a buffer is filled again once the copy out of it is done
        self._buffers: list[tuple[Tensor, Event] | None] = [None] * num_buffers
        self._next = 0

    def upload(self, encoded: EncodedLayer) -> tuple[EncodedLayer, Wait]:
        """See `Uploads`."""
        moved = {
            part: {name: torch.empty_like(tensor, device=self._device) for name, tensor in group.items()}
            for part, group in encoded.tensors.items()
        }
        pairs = [
            (tensor, moved[part][name]) for part, group in encoded.tensors.items() for name, tensor in group.items()
        ]
        with self._lock:
            done = self._copy([(source, target) for source, target in pairs if source.numel()])
        targets = [target for _, target in pairs]
        return replace(encoded, tensors=moved), lambda: self._transfers.join(done, targets)

    def _copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Event:
        # the memory of the targets may have been let go of by work that is still to run
        after = done = self._transfers.mark()
        for source, target in pairs:
            for piece, place in _pieces(source, target, self._buffer_bytes):
                buffer = self._buffer()
                staged = buffer[: len(piece)]
                staged.copy_(piece)
                done = self._transfers.copy([(staged, place)], after)
                self._buffers[self._next] = (buffer, done)
                self._next = (self._next + 1) % len(self._buffers)
        return done

    def _buffer(self) -> Tensor:
        used = self._buffers[self._next]
        if used is None:
            return self._transfers.buffer(self._buffer_bytes)
        used[1].synchronize()
        return used[0]


def _pieces(source: Tensor, target: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The bytes of both, in pieces of at most `size`."""
    own, other = (tensor.reshape(-1).view(torch.uint8) for tensor in (source, target))
    for begin in range(0, len(own), size):
        yield own[begin : begin + size], other[begin : begin + size]
