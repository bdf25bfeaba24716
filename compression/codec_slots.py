"""The codec slots: how sealed rows of keys and values are stored, sent and read. Free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ..errors import InvalidRecipe
from .filling import Filling, check_choice, check_int

if TYPE_CHECKING:  # the torch side; never imported at run time here
    from .codecs import Codec

_ITEM_BYTES = {"uint8": 1, "int8": 1, "int32": 4, "float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class TensorSpec:
    """Dtype, as torch names it, and shape of one tensor of an encoded layer."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


Specs = dict[str, TensorSpec]


def affine_specs(codes: tuple[int, ...], bits: int, groups: tuple[int, ...]) -> Specs:
    """Specs of what `kernels.quantize` makes of a tensor of shape `codes` with scales of shape `groups`."""
    packed = (*codes[:-1], -(-codes[-1] * bits // 8))
    return {
        "codes": TensorSpec("uint8", packed),
        "scale": TensorSpec("float16", groups),
        "minimum": TensorSpec("float16", groups),
    }


class CodecFilling(Filling):
    """What every codec declares.

    Attributes:
        domain: whether it encodes keys before (`pre_rope`) or after (`post_rope`) rotation. Values ignore it.
        append_block: rows that must be sealed together; groups of rows start at multiples of it.
        head_shared: one stored row serves all KV heads, so heads cannot keep different rows.
    """

    domain: ClassVar[str] = "post_rope"
    head_shared: ClassVar[bool] = False

    @property
    def append_block(self) -> int:
        return 1

    def build(self) -> Codec:
        """The torch side."""
        raise NotImplementedError

    def tensor_specs(self, num_rows: int, num_kv_heads: int, head_dim: int, native: str) -> Specs:
        """The tensors of `num_rows` encoded rows; axis 0 is rows or groups of rows. `native` is the compute dtype."""
        raise NotImplementedError

    def basis_specs(self, num_kv_heads: int, head_dim: int) -> Specs:
        """The tensors that all rows of a layer share."""
        return {}

    def min_rows(self) -> int:
        """Rows below which encoding makes no sense."""
        return 1


@dataclass(frozen=True)
class Native(CodecFilling):
    """Rows in the dtype that the model computes in; post-RoPE for keys."""

    slot = ("key_codec", "value_codec")
    kind = "native"

    def build(self) -> Codec:
        from .codecs import DenseCodec

        return DenseCodec(None)

    def tensor_specs(self, num_rows: int, num_kv_heads: int, head_dim: int, native: str) -> Specs:
        return {"rows": TensorSpec(native, (num_rows, num_kv_heads, head_dim))}


@dataclass(frozen=True)
class Dense(CodecFilling):
    """Rows in a given floating-point dtype; post-RoPE for keys."""

    slot = ("key_codec", "value_codec")
    kind = "dense"

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        check_choice("recipe.codec.dtype", self.dtype, ("bfloat16", "float16", "float32"))

    def build(self) -> Codec:
        from .codecs import DenseCodec

        return DenseCodec(self.dtype)

    def tensor_specs(self, num_rows: int, num_kv_heads: int, head_dim: int, native: str) -> Specs:
        return {"rows": TensorSpec(self.dtype, (num_rows, num_kv_heads, head_dim))}


@dataclass(frozen=True)
class Affine(CodecFilling):
    """Asymmetric integers with a float16 scale and minimum per group (KIVI, arXiv 2402.02750 §3).

    Attributes:
        bits: 8, 4 or 2, packed into bytes.
        axis: `channel` groups `group` consecutive rows of one channel (keys); `token` groups `group` channels of one
            row (values).
        group: elements that share a scale and minimum; along a row, never more than the head size.
    """

    slot = ("key_codec", "value_codec")
    kind = "affine"

    bits: int = 4
    axis: Literal["channel", "token"] = "token"
    group: int = 32

    def __post_init__(self) -> None:
        check_choice("recipe.codec.bits", self.bits, (8, 4, 2))
        check_choice("recipe.codec.axis", self.axis, ("channel", "token"))
        check_choice("recipe.codec.group", self.group, (16, 32, 64, 128))

    @property
    def append_block(self) -> int:
        return self.group if self.axis == "channel" else 1

    def build(self) -> Codec:
        from .codecs import AffineCodec

        return AffineCodec(self)

    def tensor_specs(self, num_rows: int, num_kv_heads: int, head_dim: int, native: str) -> Specs:
        if self.axis == "channel":
            groups = (-(-num_rows // self.group), num_kv_heads, head_dim)
        else:
            groups = (num_rows, num_kv_heads, -(-head_dim // self.group))
        return affine_specs((num_rows, num_kv_heads, head_dim), self.bits, groups)


@dataclass(frozen=True)
class LowRank(CodecFilling):
    """Pre-RoPE keys of all heads as rows x basis, by truncated SVD (ShadowKV, arXiv 2410.21465 §4.1).

    Attributes:
        rank: columns kept. None = 0.156 x KV heads x head size, rounded to a multiple of 2.
        bits: 16 keeps the factor rows in bfloat16; 8 or 4 packs them, one group a row.
    """

    slot = ("key_codec",)
    kind = "lowrank"
    domain: ClassVar[str] = "pre_rope"
    head_shared: ClassVar[bool] = True

    rank: int | None = None
    bits: int = 16

    def __post_init__(self) -> None:
        check_int("recipe.key_codec.rank", self.rank, 1, 8192, optional=True)
        check_choice("recipe.key_codec.bits", self.bits, (16, 8, 4))

    def build(self) -> Codec:
        from .lowrank import LowRankCodec

        return LowRankCodec(self)

    def tensor_specs(self, num_rows: int, num_kv_heads: int, head_dim: int, native: str) -> Specs:
        rank = self.rank or 0
        if self.bits == 16:
            return {"rows": TensorSpec("bfloat16", (num_rows, rank))}
        return affine_specs((num_rows, rank), self.bits, (num_rows, 1))

    def basis_specs(self, num_kv_heads: int, head_dim: int) -> Specs:
        return {"basis": TensorSpec("bfloat16", (self.rank or 0, num_kv_heads, head_dim))}

    def min_rows(self) -> int:
        return self.rank or 1


@dataclass(frozen=True)
class ProfileKeys(CodecFilling):
    """The key codec that the model's profile names; replaced when the recipe is resolved."""

    slot = ("key_codec",)
    kind = "profile"
    head_shared: ClassVar[bool] = True

    def open_field(self) -> str | None:
        return "kind"

    def build(self) -> Codec:
        raise InvalidRecipe("recipe.key_codec", "is not resolved", "a recipe that went through resolve()")
