"""Encoded layers to frames on the way out, frames to encoded layers on the way in.

Out: a large layer leaves as frames of one kind each, split along axis 0; its small kinds, and the layers of short
prompts, share frames. What lies on a device comes to the host group by group, see `staging.py`. In: every slice is
copied once, into the tensor that it belongs to.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import tee

import torch
from torch import Tensor

from ..compression.interfaces import EncodedLayer, Part
from ..errors import FrameMismatch, PermissionDenied
from ..kvstore.envelope import Fault, corrupt
from ..kvstore.frame import (
    DEFAULT_LIMITS,
    DType,
    Frame,
    FrameLimits,
    Kind,
    TensorSlice,
    aligned,
    decode_frame,
    encode_frame,
    frame_nbytes,
)
from ..kvstore.identity import FrameIdent
from .staging import Event, HostCopies, PlainCopies

__all__ = ["FrameIdent", "FrameMeter", "FramePacker", "LayerAssembler", "layer_frames"]

TARGET_PAYLOAD_BYTES = 1008 * 1024  # with its header below 1 MiB: allocators, Redis' too, give 1.25 MiB for more
PACK_BYTES = 256 * 1024
MAX_PACKED_TENSORS = 256
MAX_OPEN_RANGES = 4096

_DTYPES = {
    torch.uint8: DType.UINT8,
    torch.int8: DType.INT8,
    torch.int32: DType.INT32,
    torch.float16: DType.FLOAT16,
    torch.bfloat16: DType.BFLOAT16,
    torch.float32: DType.FLOAT32,
    torch.float8_e4m3fn: DType.FLOAT8_E4M3,
}
_TORCH_DTYPES = {sent: dtype for dtype, sent in _DTYPES.items()}


@dataclass(frozen=True)
class Sending:
    """Rows of a tensor of a layer, where the layer lies.

    Attributes:
        spec: what the receiver hears of them, without data.
        rows: [spec.shape].
    """

    spec: TensorSlice
    rows: Tensor

    @property
    def num_bytes(self) -> int:
        return self.rows.nbytes

    def cut(self, begin: int, end: int) -> Sending:
        """Rows [begin, end) of a whole tensor."""
        return Sending(replace(self.spec, shape=(end - begin, *self.spec.shape[1:]), begin=begin), self.rows[begin:end])

    def kept(self, data: memoryview) -> Sending:
        """The same in memory of its own, from bytes that are lent."""
        own = torch.empty(len(data), dtype=torch.uint8)
        own.numpy().data[:] = data
        return Sending(self.spec, own.view(self.rows.dtype).reshape(self.spec.shape))

    def with_data(self, data: memoryview) -> TensorSlice:
        """As it is encoded."""
        return replace(self.spec, data=data)


def layer_tensors(encoded: EncodedLayer) -> list[Sending]:
    """Every tensor of a layer, whole, in the recipe's order.

    Raises:
        ValueError: a tensor without axes or of a dtype that cannot be sent, or no tensors.
    """
    named = [(part, name, tensor) for part, group in encoded.tensors.items() for name, tensor in group.items()]
    if not named:
        raise ValueError(f"layer {encoded.layer} has no tensors to send")
    sending = []
    for index, (part, name, tensor) in enumerate(named):
        if tensor.dtype not in _DTYPES or tensor.ndim == 0:
            raise ValueError(
                f"tensor {name!r} of layer {encoded.layer} cannot be sent: {tensor.dtype}, {tensor.ndim} axes"
            )
        spec = TensorSlice(
            layer=encoded.layer,
            kind=Kind(int(part)),
            name=name,
            dtype=_DTYPES[tensor.dtype],
            shape=tuple(tensor.shape),
            begin=0,
            total=tensor.shape[0],
            index=index,
            layer_tensors=len(named),
            data=memoryview(b""),
        )
        sending.append(Sending(spec, tensor))
    return sending


def layer_frames(encoded: EncodedLayer, ident: FrameIdent, num_prompt_tokens: int) -> Iterator[bytes]:
    """The frames of one layer alone; see `FramePacker`."""
    yield from FramePacker(ident, num_prompt_tokens).add(encoded)


class FramePacker:
    """Turns one prompt's encoded layers, in order, into frames.

    The first layer leaves at once, so that the receiver hears of the request as early as can be. A later layer leaves
    at once where it has `pack_bytes` or more; smaller ones wait until they have that much together. Waiting layers
    are never overtaken. Of a layer with `pack_bytes` or more, every kind that reaches `pack_bytes` has frames of its
    own, split along axis 0 into payloads of about `target_payload_bytes`, and the other kinds share frames.

    Nothing refers to a layer, or to its memory, once `add` has returned.

    Args:
        ident: whom the frames belong to.
        num_tokens: rows of the whole prompt, or those from `begin` on.
        target_payload_bytes: largest payload, unless one row alone is larger.
        pack_bytes: below it a layer waits for others.
        limits: what the receiver decodes with.
        copies: how tensors come to the host.
    """

    def __init__(
        self,
        ident: FrameIdent,
        num_tokens: int,
        target_payload_bytes: int = TARGET_PAYLOAD_BYTES,
        pack_bytes: int = PACK_BYTES,
        limits: FrameLimits = DEFAULT_LIMITS,
        copies: HostCopies | None = None,
        begin: int = 0,
    ) -> None:
        if not 0 < pack_bytes <= target_payload_bytes <= limits.max_payload_bytes:
            raise ValueError("needs 0 < pack_bytes <= target_payload_bytes <= the payload limit")
        self._ident = ident
        self._tokens = (begin, begin + num_tokens)
        self._target = target_payload_bytes
        self._pack = pack_bytes
        self._limits = limits
        self._copies = copies or PlainCopies()
        self._waiting: list[Sending] = []
        self._first = True

    def add(self, encoded: EncodedLayer, after: Event | None = None) -> list[bytes]:
        """Take the next layer; returns the frames that leave now, perhaps none.

        Args:
            after: when the layer is complete, by `copies.mark`; None where this thread has launched its computation.

        Raises:
            ValueError: a tensor that cannot be sent.
        """
        tensors = layer_tensors(encoded)
        if sum(item.num_bytes for item in tensors) >= self._pack:
            return [*self.flush(), *self._frames(self._groups(tensors), after, self._copies)]
        with closing(self._copies.to_host([[item.rows for item in tensors]], after)) as fetched:
            for data in fetched:
                self._waiting += [item.kept(part) for item, part in zip(tensors, data, strict=True)]
        waiting_bytes = sum(item.num_bytes for item in self._waiting)
        if self._first or waiting_bytes >= self._pack or len(self._waiting) >= MAX_PACKED_TENSORS:
            return self.flush()
        return []

    def flush(self) -> list[bytes]:
        """The frames of the layers that still wait; after the last layer, the rest."""
        self._first = False
        waiting, self._waiting = self._waiting, []
        return list(self._frames(_fill(waiting, self._target), None, PlainCopies()))

    def _groups(self, tensors: list[Sending]) -> Iterator[list[Sending]]:
        """What shares a frame, of a layer that does not wait."""
        kinds = dict.fromkeys(item.spec.kind for item in tensors)
        by_kind = {kind: [item for item in tensors if item.spec.kind == kind] for kind in kinds}
        small: list[Sending] = []
        for group in by_kind.values():
            if sum(item.num_bytes for item in group) >= self._pack:
                yield from _fill(group, self._target)
            else:
                small += group
        yield from _fill(small, self._target)

    def _frames(self, groups: Iterable[list[Sending]], after: Event | None, copies: HostCopies) -> Iterator[bytes]:
        groups, wanted = tee(groups)
        rows = ([item.rows for item in group] for group in wanted)
        with closing(copies.to_host(rows, after)) as fetched:
            for group, data in zip(groups, fetched, strict=True):
                slices = [item.with_data(part) for item, part in zip(group, data, strict=True)]
                yield encode_frame(self._ident, self._tokens, slices, self._limits)


class FrameMeter(FramePacker):
    """Counts a packer's frames and their bytes and makes none: nothing is copied and nothing comes to the host."""

    num_frames = 0

    def measure(self, encoded: EncodedLayer) -> int:
        """Bytes of the frames that `add` would return."""
        tensors = layer_tensors(encoded)
        if sum(item.num_bytes for item in tensors) >= self._pack:
            return self.measure_rest() + self._measured(self._groups(tensors))
        self._waiting += tensors
        waiting_bytes = sum(item.num_bytes for item in self._waiting)
        if self._first or waiting_bytes >= self._pack or len(self._waiting) >= MAX_PACKED_TENSORS:
            return self.measure_rest()
        return 0

    def measure_rest(self) -> int:
        """Bytes of the frames that `flush` would return."""
        self._first = False
        waiting, self._waiting = self._waiting, []
        return self._measured(_fill(waiting, self._target))

    def _measured(self, groups: Iterable[list[Sending]]) -> int:
        specs = [[item.spec for item in group] for group in groups]
        self.num_frames += len(specs)
        return sum(frame_nbytes(self._ident, self._tokens, own, self._limits) for own in specs)


def _fill(tensors: list[Sending], target_payload_bytes: int) -> Iterator[list[Sending]]:
    """The tensors in order, cut between rows into groups whose payloads reach the target but do not pass it, unless
    one row alone does."""
    group: list[Sending] = []
    end = 0
    for item in tensors:
        begin, rows, row_nbytes = 0, item.spec.shape[0], item.spec.row_nbytes
        while begin < rows or begin == rows == 0:
            room = max(target_payload_bytes - aligned(end), 0)
            fit = min(room // row_nbytes, rows - begin) if row_nbytes else rows
            if group and ((fit == 0 and rows > 0) or len(group) == MAX_PACKED_TENSORS):
                yield group
                group, end = [], 0
                continue
            stop = begin + (max(fit, 1) if rows else 0)
            group.append(item.cut(begin, stop))
            end = aligned(end) + group[-1].num_bytes
            if rows == 0:
                break
            begin = stop
    if group:
        yield group


@dataclass
class _Receiving:
    """A tensor on its way in.

    Attributes:
        spec: of the first slice that came.
        tensor: [total, ...], rows outside `ranges` not yet written.
        memory: the same as bytes.
        ranges: disjoint half-open ranges of rows that are there, ascending, never touching.
    """

    spec: TensorSlice
    tensor: Tensor
    memory: memoryview
    ranges: list[tuple[int, int]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return self.spec.total == 0 or self.ranges == [(0, self.spec.total)]

    def place(self, item: TensorSlice) -> None:
        begin, end = item.begin, item.begin + item.shape[0]
        at = bisect(self.ranges, (begin, end))
        before, after = self.ranges[at - 1 : at] if at else [], self.ranges[at : at + 1]
        if (before and before[0][1] > begin) or (after and after[0][0] < end):
            raise corrupt("layer", Fault.DUPLICATE)
        joined_begin, joined_end, low, high = begin, end, at, at
        if before and before[0][1] == begin:
            joined_begin, low = before[0][0], at - 1
        if after and after[0][0] == end:
            joined_end, high = after[0][1], at + 1
        self.ranges[low:high] = [(joined_begin, joined_end)]
        if len(self.ranges) > MAX_OPEN_RANGES:
            raise corrupt("layer", Fault.SCATTERED)
        self.memory[begin * item.row_nbytes : end * item.row_nbytes] = item.data


@dataclass
class _ReceivingLayer:
    num_tensors: int
    tensors: dict[int, _Receiving] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.tensors) == self.num_tensors and all(tensor.complete for tensor in self.tensors.values())


class LayerAssembler:
    """Puts one sequence's layers together from its frames, which may come in any order.

    A layer is complete when each of the tensors that its slices announce has all of its rows. Memory is taken for
    whole tensors when their first slice comes, and at most `max_bytes` in all, complete layers included. After
    `CorruptFrame` the sequence is lost; after `FrameMismatch` nothing has changed.

    Args:
        expected: whom the frames must belong to.
        num_layers: layers of the model.
        max_bytes: of all tensors together, as announced when the request was admitted.
        limits: of one frame.
    """

    def __init__(
        self, expected: FrameIdent, num_layers: int, max_bytes: int, limits: FrameLimits = DEFAULT_LIMITS
    ) -> None:
        self._expected = expected
        self._limits = limits
        self._free_bytes = max_bytes
        self._tokens: tuple[int, int] | None = None
        self._missing = set(range(num_layers))
        self._num_layers = num_layers
        self._receiving: dict[int, _ReceivingLayer] = {}

    def add(self, data: bytes | memoryview) -> list[EncodedLayer]:
        """Take a frame; returns the layers that became complete, ascending.

        Raises:
            CorruptFrame: the bytes are no sound frame, or contradict the frames before.
            FrameMismatch: a sound frame of another request, epoch, model or recipe; PermissionDenied: tenant.
        """
        return self.add_frame(decode_frame(data, self._limits))

    def add_frame(self, frame: Frame) -> list[EncodedLayer]:
        """The same for a frame that is decoded already."""
        for name in FrameIdent.__dataclass_fields__:
            if getattr(frame.ident, name) != getattr(self._expected, name):
                error = PermissionDenied if name == "tenant" else FrameMismatch
                raise error(f"a frame of another {name.replace('_', ' ')}")
        if self._tokens not in (None, frame.tokens):
            raise corrupt("layer", Fault.INCONSISTENT)
        self._tokens = frame.tokens
        for item in frame.tensors:
            self._take(item)
        return [self._finish(layer) for layer in sorted(self._receiving) if self._receiving[layer].complete]

    def missing(self) -> list[int]:
        """Layers that are not complete, ascending."""
        return sorted(self._missing)

    def _take(self, item: TensorSlice) -> None:
        if item.layer >= self._num_layers:
            raise corrupt("layer", Fault.LAYER_RANGE)
        if item.layer not in self._missing:
            raise corrupt("layer", Fault.DUPLICATE)
        layer = self._receiving.setdefault(item.layer, _ReceivingLayer(item.layer_tensors))
        if layer.num_tensors != item.layer_tensors:
            raise corrupt("layer", Fault.INCONSISTENT)
        known = layer.tensors.get(item.index)
        if known is None:
            if any((other.spec.kind, other.spec.name) == (item.kind, item.name) for other in layer.tensors.values()):
                raise corrupt("layer", Fault.INCONSISTENT)
            known = layer.tensors[item.index] = self._allocate(item)
        elif _whole(known.spec) != _whole(item):
            raise corrupt("layer", Fault.INCONSISTENT)
        elif known.complete:
            raise corrupt("layer", Fault.DUPLICATE)
        known.place(item)

    def _allocate(self, item: TensorSlice) -> _Receiving:
        num_bytes = item.total * item.row_nbytes
        if num_bytes > self._free_bytes:
            raise corrupt("layer", Fault.ANNOUNCED_BOUND)
        self._free_bytes -= num_bytes
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        tensor = memory.view(_TORCH_DTYPES[item.dtype]).reshape(item.total, *item.shape[1:])
        return _Receiving(replace(item, data=memoryview(b"")), tensor, memory.numpy().data)

    def _finish(self, layer: int) -> EncodedLayer:
        self._missing.remove(layer)
        received = self._receiving.pop(layer).tensors
        parts: dict[Part, dict[str, Tensor]] = {}
        for index in sorted(received):
            spec = received[index].spec
            parts.setdefault(Part(spec.kind), {})[spec.name] = received[index].tensor
        return EncodedLayer(layer, parts)


def _whole(item: TensorSlice) -> tuple[object, ...]:
    """What all slices of one tensor must agree on."""
    return item.kind, item.name, item.dtype, item.total, item.shape[1:]
