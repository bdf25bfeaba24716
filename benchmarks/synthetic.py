"""Encoded layers drawn at random in a recipe's format: what a decode worker would hold, without a prompt behind it.

Keys and values come out near zero mean and unit variance, indices ascend and lie where the prompt's rows may lie, so a
cache takes them as it takes real ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..compression.codec_slots import CodecFilling, TensorSpec
from ..compression.interfaces import EncodedLayer, Part
from ..compression.layout import LayerLayout, layer_layout, layer_specs
from ..compression.recipe import ModelShape, Recipe


class SyntheticLayers:
    """Draws the layers of prompts of one length.

    Args:
        recipe: resolved.
        native: the compute dtype.
        generator: on the device that tensors are drawn on.
    """

    def __init__(
        self, recipe: Recipe, shape: ModelShape, num_tokens: int, native: torch.dtype, generator: torch.Generator
    ) -> None:
        self._recipe = recipe
        self._shape = shape
        self._num_tokens = num_tokens
        self._native = str(native).removeprefix("torch.")
        self._generator = generator
        self._device = generator.device

    def layer(self, index: int) -> EncodedLayer:
        """One layer, drawn anew at every call."""
        at = layer_layout(self._recipe, self._num_tokens, index)
        specs = layer_specs(self._recipe, self._shape, self._num_tokens, index, self._native)
        tensors = {
            part: {name: self._tensor(at, part, name, spec) for name, spec in group.items()}
            for part, group in specs.items()
        }
        return EncodedLayer(index, tensors)

    def _tensor(self, at: LayerLayout, part: Part, name: str, spec: TensorSpec) -> Tensor:
        if spec.dtype == "int32":
            return self._indices(at, part, name, spec)
        dtype = getattr(torch, spec.dtype)
        if spec.dtype == "uint8":
            return torch.randint(256, spec.shape, dtype=dtype, device=self._device, generator=self._generator)
        filled = self._constant(part, name)
        if filled is not None:
            return torch.full(spec.shape, filled, dtype=dtype, device=self._device)
        deviation = 1 / math.sqrt(spec.shape[0]) if part is Part.BASIS else 1.0
        # numbers are not drawn in 8 bits
        drawn = torch.empty(spec.shape, dtype=torch.float16 if dtype.itemsize == 1 else dtype, device=self._device)
        return drawn.normal_(0, deviation, generator=self._generator).to(dtype)

    def _indices(self, at: LayerLayout, part: Part, name: str, spec: TensorSpec) -> Tensor:
        """Ascending along axis 0 and evenly spread over all that they may be."""
        chunk = self._recipe.retrieval.chunk
        low, high = at.num_sinks, at.sealed_end
        if part is Part.OUTLIERS:
            low, high = 0, at.num_sealed // chunk
        elif name == "chunks":
            low, high = low // chunk, high // chunk
        count = spec.shape[0]
        spread = torch.arange(count, dtype=torch.int64, device=self._device) * (high - low) // max(count, 1) + low
        column = spread.to(torch.int32).view(-1, *(1 for _ in spec.shape[1:]))
        return column.expand(spec.shape).contiguous()

    def _constant(self, part: Part, name: str) -> float | None:
        """What scales and minima of packed integers are, so that codes drawn evenly have unit variance; and factors
        that are neutral at 1. None for everything else."""
        if part is Part.BASIS:
            return 1.0 if name.endswith(("scale", "balance")) else None
        if not name.endswith(("scale", "minimum")):
            return None
        levels = 1 << int(getattr(self._codec(part, name), "bits", 8))
        step: float = math.sqrt(12) / levels
        return step if name.endswith("scale") else -step * (levels - 1) / 2

    def _codec(self, part: Part, name: str) -> CodecFilling:
        tier = next(one for one in reversed(self._recipe.tiers()) if name.startswith(one.prefix))
        return tier.value_codec if part is Part.VALUES else tier.key_codec
