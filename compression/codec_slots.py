"""The codec slots: how sealed rows of keys and values are stored, sent and read. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ..errors import InvalidRecipe
from .filling import Filling, check_choice, check_int

if TYPE_CHECKING:  # the torch side; never imported at run time here
    from .codecs import Codec

_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
SCALE_PAIR_BYTES = 4  # a float16 scale and a float16 minimum


def affine_nbytes(num_rows: int, width: int, bits: int, num_groups: int) -> int:
    """Bytes of `num_rows` packed rows of `width` codes and of their scale groups."""
    return num_rows * -(-width * bits // 8) + num_groups * SCALE_PAIR_BYTES


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

    def build(self, role: Literal["key", "value"]) -> Codec:
        """The torch side."""
        raise NotImplementedError

    def encoded_nbytes(self, num_rows: int, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        """Bytes of `num_rows` encoded rows; `itemsize` is that of the compute dtype."""
        raise NotImplementedError

    def basis_nbytes(self, num_kv_heads: int, head_dim: int) -> int:
        """Bytes of what all rows of a layer share."""
        return 0

    def min_rows(self) -> int:
        """Rows below which encoding makes no sense."""
        return 1


@dataclass(frozen=True)
class Native(CodecFilling):
    """Rows in the dtype that the model computes in; post-RoPE for keys."""

    slot = ("key_codec", "value_codec")
    kind = "native"

    def build(self, role: Literal["key", "value"]) -> Codec:
        from .codecs import DenseCodec

        return DenseCodec(role, None)

    def encoded_nbytes(self, num_rows: int, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        return num_rows * num_kv_heads * head_dim * itemsize


@dataclass(frozen=True)
class Dense(CodecFilling):
    """Rows in a given floating-point dtype; post-RoPE for keys."""

    slot = ("key_codec", "value_codec")
    kind = "dense"

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        check_choice("recipe.codec.dtype", self.dtype, ("bfloat16", "float16", "float32"))

    def build(self, role: Literal["key", "value"]) -> Codec:
        from .codecs import DenseCodec

        return DenseCodec(role, self.dtype)

    def encoded_nbytes(self, num_rows: int, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        return num_rows * num_kv_heads * head_dim * _SIZES[self.dtype]


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

    def build(self, role: Literal["key", "value"]) -> Codec:
        from .codecs import AffineCodec

        return AffineCodec(role, self)

    def encoded_nbytes(self, num_rows: int, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        if self.axis == "channel":
            num_groups = -(-num_rows // self.group) * head_dim
        else:
            num_groups = num_rows * -(-head_dim // self.group)
        return num_kv_heads * affine_nbytes(num_rows, head_dim, self.bits, num_groups)


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

    def build(self, role: Literal["key", "value"]) -> Codec:
        from .lowrank import LowRankCodec

        return LowRankCodec(self)

    def encoded_nbytes(self, num_rows: int, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        rank = self.rank or 0
        return num_rows * rank * 2 if self.bits == 16 else affine_nbytes(num_rows, rank, self.bits, num_rows)

    def basis_nbytes(self, num_kv_heads: int, head_dim: int) -> int:
        return (self.rank or 0) * num_kv_heads * head_dim * 2

    def min_rows(self) -> int:
        return self.rank or 1


@dataclass(frozen=True)
class ProfileKeys(CodecFilling):
    """The key codec that the model's profile names; replaced when the recipe is resolved."""

    slot = ("key_codec",)
    kind = "profile"
    head_shared: ClassVar[bool] = True

    def build(self, role: Literal["key", "value"]) -> Codec:
        raise InvalidRecipe("recipe.key_codec", "is not resolved", "a recipe that went through resolve()")
