"""Memory that the blocks of a choice are sealed into, and where each block goes in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.seal import SEAL_FIELDS, SealKey, serves
from ..kernels.step_attention import Layout
from .codec_slots import Affine, CodecFilling, Dense, Float8, LowRank, Native, Specs
from .retrieval_slots import ChunkLandmarks
from .segment import Kit, Segment

if TYPE_CHECKING:
    from .layer_cache import LayerCache

Numbers = NDArray[np.int64]

# fields of a job, see `kernels.seal`
_TAILS, _ANGLES, _KEYS, _KEY_BASIS, _VALUES, _VALUE_BASIS, _SUMMARY = 0, 2, 3, 6, 7, 10, 11


def seal_key(kit: Kit, tier: int, dtype: torch.dtype) -> SealKey | None:
    """How blocks of a tier are packed from tails of a dtype; None where the kernels do not."""
    filling, retrieval = kit.recipe.tiers()[tier], kit.recipe.retrieval
    keys, values = _layout(filling.key_codec, dtype), _layout(filling.value_codec, dtype)
    if keys is None or values is None or isinstance(retrieval, ChunkLandmarks) != (kit.retrieval is not None):
        return None
    key = SealKey(
        keys,
        values,
        dtype,
        kit.recipe.block,
        retrieval.chunk,
        retrieval.landmark_bits if isinstance(retrieval, ChunkLandmarks) else 0,
        filling.key_codec.domain == "pre_rope",
        kit.shape.num_kv_heads,
        kit.shape.head_dim,
    )
    return key if serves(key) else None


def _layout(codec: CodecFilling, native: torch.dtype) -> Layout | None:
    if isinstance(codec, Native):
        return Layout("dense", dtype=native)
    if isinstance(codec, Dense):
        return Layout("dense", dtype=getattr(torch, codec.dtype))
    if isinstance(codec, Affine):
        return Layout(codec.axis, bits=codec.bits, group=codec.group, balanced=codec.balanced)
    if isinstance(codec, LowRank):
        return Layout("lowrank", bits=codec.bits, rank=codec.rank or 0)
    return Layout("float8") if isinstance(codec, Float8) else None


NUM_PLACES = 8


class GrownRoom:
    """What layers that are packed alike seal into: of everything that they hold, one tensor [layers, …].

    Args:
        layers: their caches, of one choice.
        num_rows: room, whole blocks. Rows that were sealed before are taken over.

    Attributes:
        segments: of each layer, in order.
        read_nbytes: bytes that a block adds to what each query reads, in all layers: landmarks, or else everything.
    """

    def __init__(self, kit: Kit, key: SealKey, tier: int, layers: Sequence[LayerCache], num_rows: int) -> None:
        self.key, self.layers = key, layers
        heads, dim, retrieval = kit.shape.num_kv_heads, kit.shape.head_dim, kit.recipe.retrieval
        native = str(key.dtype).removeprefix("torch.")
        filling, device = kit.recipe.tiers()[tier], layers[0].tail.device
        specs: list[Specs] = [codec.tensor_specs(num_rows, heads, dim, native)
                              for codec in (filling.key_codec, filling.value_codec)]  # fmt: skip
        specs.append(retrieval.landmark_specs(num_rows // retrieval.chunk, heads, dim) if key.landmark_bits else {})
        self._stacks = [
            {
                name: torch.empty(len(layers), *spec.shape, dtype=getattr(torch, spec.dtype), device=device)
                for name, spec in group.items()
            }
            for group in specs
        ]
        views = [{name: stack.unbind(0) for name, stack in group.items()} for group in self._stacks]
        self.segments = []
        for i, layer in enumerate(layers):
            keys, values, summary = ({name: parts[i] for name, parts in group.items()} for group in views)
            begin = layer.tail.begin if layer.grown is None else layer.grown.begin
            own = Segment(kit, layer.grown_packing, keys, values, 0, begin, None, summary, num_rows)
            if layer.grown is not None:
                own.take(layer.grown)
            self.segments.append(own)
        num_blocks = num_rows // key.num_rows
        read = self._stacks[2].values() if key.landmark_bits else self.tensors()
        self.read_nbytes = sum(stack.nbytes for stack in read) // num_blocks
        self._num_blocks = num_blocks
        self.number()

    def number(self) -> None:
        """Take down where the first block of each layer goes, and how much further each next one."""
        self._first = np.zeros((len(self.layers), SEAL_FIELDS), dtype=np.int64)
        self._step = np.zeros(SEAL_FIELDS, dtype=np.int64)
        for begin, group in zip((_KEYS, _VALUES, _SUMMARY), self._stacks, strict=True):
            for field, stack in enumerate(group.values(), begin):
                nbytes = stack[0].nbytes
                self._first[:, field] = stack.data_ptr() + nbytes * np.arange(len(stack))
                self._step[field] = nbytes // self._num_blocks
        for field, of_keys in ((_KEY_BASIS, True), (_VALUE_BASIS, False)):
            for i, layer in enumerate(self.layers):
                packing = layer.grown_packing
                shared = packing.key_basis if of_keys else packing.value_basis
                self._first[i, field] = next((t.data_ptr() for t in shared.values()), 0)

    def jobs(self, block: int) -> Numbers:
        """The jobs of a block in all layers, int64 [layers, SEAL_FIELDS], for rows that are first in the tails."""
        jobs = self._first + block * self._step
        jobs[:, _TAILS:_ANGLES] = [layer.tail.addresses() for layer in self.layers]
        return jobs

    def places(self) -> Numbers:
        """Addresses of the packed keys and values and of landmarks and their scales, int64 [layers, NUM_PLACES]."""
        return np.delete(self._first[:, _KEYS:], (_KEY_BASIS - _KEYS, _VALUE_BASIS - _KEYS), axis=1)

    def tensors(self) -> Iterator[Tensor]:
        """Everything it holds."""
        for group in self._stacks:
            yield from group.values()
