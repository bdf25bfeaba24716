"""How the rows of a layer are packed, tier by tier, and which of its tensors are whose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from .codec_slots import CodecFilling
from .layout import basis_name, joined_codecs
from .segment import Kit, Packing
from .spec import Tier


def packings(kit: Kit, basis: Mapping[str, Tensor], layer: int) -> list[Packing]:
    """How each tier of a layer is packed, the best first."""
    out = []
    for tier in kit.recipe.tiers():
        keys, values = tier.key_codec, tier.value_codec
        if not tier.prefix:
            keys, values = joined_codecs(kit.recipe, layer, kit.shape.num_layers)
        key_basis, value_basis = _basis_of(kit, tier, keys, False, basis), _basis_of(kit, tier, values, True, basis)
        rope = kit.rope if keys.domain == "pre_rope" else None
        out.append(Packing(keys.build(), values.build(), key_basis, value_basis, rope))
    return out


def _basis_of(
    kit: Kit, tier: Tier, codec: CodecFilling, of_values: bool, basis: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What a codec's rows share, under the codec's names; empty for a layer that has no rows of the tier."""
    names = codec.basis_specs(kit.shape.num_kv_heads, kit.shape.head_dim)
    return {name: basis[key] for name in names if (key := basis_name(tier, of_values, name)) in basis}


def tier_tensors(tensors: Mapping[str, Tensor], tier: int, prefixes: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of one tier under their codec's names."""
    own, rest = prefixes[tier], [prefix for prefix in prefixes[1:] if prefix != prefixes[tier]]
    return {
        name.removeprefix(own): tensor
        for name, tensor in tensors.items()
        if name.startswith(own) and not name.startswith(tuple(rest))
    }
