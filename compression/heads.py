"""Parts of an encoded layer: what a decode worker's rank holds that has some of the KV heads.

What travels and what is stored knows nothing of ranks, so prefill and decode may have any number of them. Tensors of
single heads are cut along the heads; what all heads share (factor rows, scales of a layer, ids of chunks) every rank
has whole: with a joint factorization of all heads that is most of the keys' bytes, once a rank.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .codec_slots import TensorSpec
from .interfaces import EncodedLayer, Part
from .layout import layer_specs
from .spec import ModelShape, Recipe

PartSpecs = dict[Part, dict[str, TensorSpec]]


def shape_of_rank(shape: ModelShape, size: int) -> ModelShape:
    """The shape of a rank's part of a model that `size` ranks hold; the number divides the heads."""
    return replace(shape, num_heads=shape.num_heads // size, num_kv_heads=shape.num_kv_heads // size)


class HeadParts:
    """Cuts the layers of one prompt.

    Args:
        recipe: resolved.
        shape: of the whole model.
        native: the compute dtype, as torch names it.
        size: number of ranks.
    """

    def __init__(self, recipe: Recipe, shape: ModelShape, num_tokens: int, native: str, size: int) -> None:
        self._recipe, self._num_tokens, self._native = recipe, num_tokens, native
        self._whole, self._own = shape, shape_of_rank(shape, size)

    def specs(self, layer: int) -> PartSpecs:
        """The tensors of one rank's part of a layer."""
        return layer_specs(self._recipe, self._own, self._num_tokens, layer, self._native)

    def of(self, encoded: EncodedLayer, rank: int) -> EncodedLayer:
        """A rank's part of a layer whose tensors are the recipe's; they may be views."""
        own = self.specs(encoded.layer)
        tensors = {
            part: {name: cut_heads(tensor, own[part][name].shape, rank) for name, tensor in group.items()}
            for part, group in encoded.tensors.items()
        }
        return EncodedLayer(encoded.layer, tensors)


def cut_heads(x: Tensor, own: tuple[int, ...], rank: int) -> Tensor:
    """A rank's part of x, of shape `own`: along the axis of the heads, the only one that can be shorter."""
    for axis, (whole, part) in enumerate(zip(x.shape, own, strict=True)):
        if whole != part:
            return x.narrow(axis, rank * part, part)
    return x
