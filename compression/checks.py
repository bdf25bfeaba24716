"""Whether a layer that has arrived is one that its recipe makes."""

from __future__ import annotations

from ..errors import FrameMismatch
from .interfaces import EncodedLayer, Part
from .layout import layer_layout, layer_specs
from .spec import ModelShape, Recipe

_NATIVE = ("float32", "bfloat16", "float16")


def check_tensors(encoded: EncodedLayer, recipe: Recipe, shape: ModelShape, num_tokens: int) -> None:
    """Refuse a layer whose tensors are not those that the recipe makes, or whose indices point outside the prompt.

    Raises:
        FrameMismatch: names the tensor.
    """
    expected = layer_specs(recipe, shape, num_tokens, encoded.layer, "native")
    wanted = {(part, name): spec for part, group in expected.items() for name, spec in group.items()}
    got = {(part, name): tensor for part, group in encoded.tensors.items() for name, tensor in group.items()}
    if wanted.keys() != got.keys():
        odd = ", ".join(f"{part.name}.{name}" for part, name in sorted(wanted.keys() ^ got.keys()))
        raise FrameMismatch(f"layer {encoded.layer}: missing or unexpected {odd}")
    for (part, name), spec in wanted.items():
        tensor = got[part, name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        allowed = _NATIVE if spec.dtype == "native" else (spec.dtype,)
        if tuple(tensor.shape) != spec.shape or dtype not in allowed:
            raise FrameMismatch(
                f"layer {encoded.layer}: {part.name}.{name} is {dtype} {tuple(tensor.shape)}, "
                f"expected {' or '.join(allowed)} {spec.shape}"
            )
    at = layer_layout(recipe, num_tokens, encoded.layer)
    chunk = recipe.retrieval.chunk
    limits = {
        (Part.POSITIONS, "rows"): (at.num_sinks, at.sealed_end),
        (Part.POSITIONS, "chunks"): (at.num_sinks // chunk, at.sealed_end // chunk),
        (Part.OUTLIERS, "chunks"): (0, at.num_sealed // chunk),
        (Part.HIDDEN, "chunks"): (at.num_sinks // chunk, at.sealed_end // chunk),
    }
    for (part, name), (low, high) in limits.items():
        index = got.get((part, name))
        if index is None:
            continue
        if not low <= int(index.min()) <= int(index.max()) < high:
            raise FrameMismatch(f"layer {encoded.layer}: {part.name}.{name} is not within {low} to {high - 1}")
        if len(index) > 1 and not bool((index.diff(dim=0) > 0).all()):
            raise FrameMismatch(f"layer {encoded.layer}: {part.name}.{name} does not ascend")
