"""Rows of device tensors to host memory, in the order asked for, without stalling who computes them.

    engine thread:  layer L encoded ── mark() ──> layer L+1 computes …
    packing thread:      to_host(groups, mark) ── side stream: copy ──> event ──> bytes, packed while the next copy runs

The thread that packs waits for the copies, the engine's never does. A copy's source is referred to until its event is
done, so the allocator cannot give the memory to anyone else before. Views of pinned memory live until the next group
is asked for: what shall last longer is copied by then, as frames are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, LifoQueue
from typing import Protocol

import torch
from torch import Tensor

BUFFER_BYTES = 16 << 20
NUM_BUFFERS = 4
ALIGN = 16

Group = Sequence[Tensor]
"""Tensors whose bytes are wanted together; any layout."""


class Event(Protocol):
    """A point in a stream of the device's work."""

    def synchronize(self) -> None: ...


class HostCopies(Protocol):
    """A way from where tensors lie to bytes in host memory."""

    def mark(self) -> Event | None:
        """After all that the calling thread has launched; does not wait."""
        ...

    def to_host(self, groups: Iterable[Group], after: Event | None) -> Generator[list[memoryview], None, None]:
        """The elements of every group's tensors, dense and row-major; valid until the next group is asked for.

        Args:
            groups: of tensors that are complete at `after`.
            after: what `mark` gave, or None = after all that the calling thread has launched.
        """
        ...


def make_host_copies(device: torch.device) -> HostCopies:
    """Staged for a CUDA device, by plain copies otherwise."""
    return Staging(CudaTransfers(device)) if device.type == "cuda" else PlainCopies()


class PlainCopies:
    """Views of what lies in host memory already, and copies that wait for the device of what does not."""

    def mark(self) -> None:
        """Nothing is waited for: copies follow the calling thread's work."""
        return None

    def to_host(self, groups: Iterable[Group], after: Event | None = None) -> Generator[list[memoryview], None, None]:
        """See `HostCopies`."""
        for group in groups:
            yield [tensor_bytes(tensor) for tensor in group]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The elements of a tensor, dense and row-major; a view of its memory where that is how a CPU tensor lies."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class Transfers(Protocol):
    """What staging wants of a device."""

    def mark(self) -> Event: ...

    def buffer(self, size_bytes: int) -> Tensor:
        """uint8 [size_bytes] of host memory that copies reach without the CPU."""
        ...

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Event) -> Event:
        """Copy (from, to) pairs once `after` is done; the event that says when. Does not wait."""
        ...

    def join(self, done: Event, tensors: Iterable[Tensor]) -> None:
        """What the calling thread launches from now on runs behind `done`; tensors that copies have written are its."""
        ...


class CudaTransfers:
    """Copies on a side stream of a CUDA device. Any thread may call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def mark(self) -> Event:
        """After what the calling thread has launched on its current stream."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def buffer(self, size_bytes: int) -> Tensor:
        """See `Transfers`."""
        with torch.cuda.device(self._device):
            return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Event) -> Event:
        """See `Transfers`."""
        assert isinstance(after, torch.cuda.Event), "made by `mark`"
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
                if target.is_cuda:
                    # nobody may be given its memory while it is written, even if it is let go of
                    target.record_stream(self._stream)
            # an event that blocks lets other threads have the core while it is waited for
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(self._stream)
        return done

    def join(self, done: Event, tensors: Iterable[Tensor]) -> None:
        """See `Transfers`."""
        assert isinstance(done, torch.cuda.Event), "made by `copy` or `mark`"
        current = torch.cuda.current_stream(self._device)
        current.wait_event(done)
        for tensor in tensors:
            tensor.record_stream(current)


@dataclass
class _Batch:
    """Groups that share a buffer.

    Attributes:
        groups: kept until their copies are done.
        offsets: in the buffer, of every tensor of every group.
        size_bytes: of all.
    """

    groups: list[Group]
    offsets: list[list[int]]
    size_bytes: int


@dataclass
class _Copying:
    """A batch on its way, and the memory that it goes to."""

    batch: _Batch
    memory: Tensor
    done: Event

    def views(self) -> Iterator[list[memoryview]]:
        for group, offsets in zip(self.batch.groups, self.batch.offsets, strict=True):
            yield [self._bytes(tensor, at).numpy().data for tensor, at in zip(group, offsets, strict=True)]

    def _bytes(self, tensor: Tensor, at: int) -> Tensor:
        return self.memory[at : at + tensor.nbytes]


class Staging:
    """Copies on a stream of its own through a few pinned buffers, which all threads share.

    Where every buffer is taken, a thread that has one goes on with that one, and a thread that has none waits: none
    waits while it holds what another waits for.

    Args:
        transfers: of the device that the tensors are on.
        buffer_bytes: of one buffer; a larger group goes through memory of its own that is not pinned.
        num_buffers: made when first needed, and kept.
    """

    def __init__(self, transfers: Transfers, buffer_bytes: int = BUFFER_BYTES, num_buffers: int = NUM_BUFFERS) -> None:
        self._transfers = transfers
        self._buffer_bytes = buffer_bytes
        # the last one given back is the next: a buffer is made where all made ones are taken; None = one to be made
        self._free: LifoQueue[Tensor | None] = LifoQueue()
        for _ in range(num_buffers):
            self._free.put(None)

    def mark(self) -> Event:
        """See `HostCopies`."""
        return self._transfers.mark()

    def to_host(self, groups: Iterable[Group], after: Event | None) -> Generator[list[memoryview], None, None]:
        """See `HostCopies`. One buffer fills while the one before is read."""
        running: deque[_Copying] = deque()
        after = after or self.mark()
        try:
            for batch in _batches(groups, self._buffer_bytes):
                while (memory := self._take(batch.size_bytes, wait=not running)) is None:
                    yield from self._finish(running)
                running.append(self._start(batch, memory, after))
                if len(running) > 1:
                    yield from self._finish(running)
            while running:
                yield from self._finish(running)
        finally:
            for copying in running:
                copying.done.synchronize()
                self._give_back(copying.memory)

    def _finish(self, running: deque[_Copying]) -> Iterator[list[memoryview]]:
        first = running[0]
        first.done.synchronize()
        yield from first.views()
        self._give_back(running.popleft().memory)

    def _start(self, batch: _Batch, memory: Tensor, after: Event) -> _Copying:
        pairs = [
            (tensor.detach(), memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
            for group, offsets in zip(batch.groups, batch.offsets, strict=True)
            for tensor, at in zip(group, offsets, strict=True)
            if tensor.nbytes
        ]
        try:
            return _Copying(batch, memory, self._transfers.copy(pairs, after))
        except BaseException:
            self._give_back(memory)
            raise

    def _take(self, size_bytes: int, wait: bool) -> Tensor | None:
        """A buffer, or None where all are taken and it is not waited for one."""
        if size_bytes > self._buffer_bytes:
            return torch.empty(size_bytes, dtype=torch.uint8)
        try:
            memory = self._free.get(block=wait)
        except Empty:
            return None
        if memory is not None:
            return memory
        try:
            return self._transfers.buffer(self._buffer_bytes)
        except BaseException:
            self._free.put(None)
            raise

    def _give_back(self, memory: Tensor) -> None:
        if memory.nbytes == self._buffer_bytes:
            self._free.put(memory)


def _batches(groups: Iterable[Group], buffer_bytes: int) -> Iterator[_Batch]:
    """As many groups in a row as fit into a buffer, at least one."""
    batch = _Batch([], [], 0)
    for group in groups:
        offsets, end = _placed(group, batch.size_bytes)
        if batch.groups and end > buffer_bytes:
            yield batch
            batch = _Batch([], [], 0)
            offsets, end = _placed(group, 0)
        batch.groups.append(group)
        batch.offsets.append(offsets)
        batch.size_bytes = end
    if batch.groups:
        yield batch


def _placed(group: Group, begin: int) -> tuple[list[int], int]:
    """Where each tensor of a group lies behind `begin`, and where the last one ends."""
    offsets = []
    for tensor in group:
        begin = -(-begin // ALIGN) * ALIGN
        offsets.append(begin)
        begin += tensor.nbytes
    return offsets, begin
