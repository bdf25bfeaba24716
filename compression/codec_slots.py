"""The codec slots: how sealed rows of keys and values are stored, sent and read. Free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from ..errors import InvalidRecipe
from .filling import Filling, as_float, check_choice, check_int, check_rate
from .subspace_plan import subspace_flops

if TYPE_CHECKING:  # the torch side; never imported at run time here
    from .codecs import Codec

_ITEM_BYTES = {"uint8": 1, "int8": 1, "int32": 4, "float16": 2, "bfloat16": 2, "float32": 4, "float8_e4m3fn": 1}


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
        keys_only: it makes no sense for values.
        wants_query_peak: it scales by the largest query of every channel.
        by_row: a row of a KV head is packed by itself, in tensors [n, Hkv, …] that share nothing.
    """

    domain: ClassVar[str] = "post_rope"
    head_shared: ClassVar[bool] = False

    @property
    def keys_only(self) -> bool:
        return False

    @property
    def wants_query_peak(self) -> bool:
        return False

    @property
    def by_row(self) -> bool:
        return False

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

    def flops(self, num_rows: int, num_kv_heads: int, head_dim: int) -> float:
        """Operations of the matrix products by which rows are packed, a multiply-add counted as two."""
        return 0.0

    def joined(self, num_layers: int) -> CodecFilling | None:
        """The codec that packs the rows of `num_layers` layers as one, their heads side by side; None when it packs
        every layer alone anyhow."""
        return None

    def neutral(self) -> CodecFilling:
        return Native()


@dataclass(frozen=True)
class Native(CodecFilling):
    """Rows in the dtype that the model computes in; post-RoPE for keys."""

    slot = ("key_codec", "value_codec")
    kind = "native"

    @property
    def by_row(self) -> bool:
        return True

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

    @property
    def by_row(self) -> bool:
        return True

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
        balanced: for keys along `token`: channels are multiplied by b = sqrt(max|q| / max|k|) before packing and
            divided by it after, so that channels with large keys do not take the whole range (MiKV, arXiv 2402.18096
            §3.3). It helps at 2 bits and does not at 3 and more.
    """

    slot = ("key_codec", "value_codec")
    kind = "affine"

    bits: int = 4
    axis: Literal["channel", "token"] = "token"
    group: int = 32
    balanced: bool = False

    def __post_init__(self) -> None:
        check_choice("recipe.codec.bits", self.bits, (8, 4, 2))
        check_choice("recipe.codec.axis", self.axis, ("channel", "token"))
        check_choice("recipe.codec.group", self.group, (16, 32, 64, 128))
        check_choice("recipe.codec.balanced", self.balanced, (True, False))
        if self.balanced and self.axis == "channel":
            raise InvalidRecipe("recipe.codec.balanced", "is of no use along `channel`, which scales channels", "false")

    @property
    def keys_only(self) -> bool:
        return self.balanced

    @property
    def wants_query_peak(self) -> bool:
        return self.balanced

    @property
    def by_row(self) -> bool:
        return self.axis == "token" and not self.balanced

    def basis_specs(self, num_kv_heads: int, head_dim: int) -> Specs:
        return {"balance": TensorSpec("float32", (1, num_kv_heads, head_dim))} if self.balanced else {}

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
class Float8(CodecFilling):
    """8-bit floating point (e4m3, 3 bits of mantissa) with one scale a layer, for keys and for values: what other
    engines offer as an fp8 KV cache. The scale maps the largest sealed row of the prompt to the largest number of the
    format; larger rows that are generated later are clipped to it."""

    slot = ("key_codec", "value_codec")
    kind = "float8"

    def build(self) -> Codec:
        from .codecs import Float8Codec

        return Float8Codec()

    def tensor_specs(self, num_rows: int, num_kv_heads: int, head_dim: int, native: str) -> Specs:
        return {"rows": TensorSpec("float8_e4m3fn", (num_rows, num_kv_heads, head_dim))}

    def basis_specs(self, num_kv_heads: int, head_dim: int) -> Specs:
        return {"scale": TensorSpec("float32", (1,))}


@dataclass(frozen=True)
class LowRank(CodecFilling):
    """Rows of all heads as factor rows x basis, by truncated SVD; keys before RoPE (ShadowKV, arXiv 2410.21465 §4.1).

    Attributes:
        rank: columns kept. None = filled in from `share` when the recipe is resolved.
        share: the rank as a share of KV heads x head size, rounded to a multiple of 2.
        bits: 16 keeps the factor rows in bfloat16; 8 or 4 packs them, one group a row.
    """

    slot = ("key_codec", "value_codec")
    kind = "lowrank"
    domain: ClassVar[str] = "pre_rope"
    head_shared: ClassVar[bool] = True

    rank: int | None = None
    share: float = 0.156
    bits: int = 16

    def __post_init__(self) -> None:
        check_int("recipe.codec.rank", self.rank, 1, 16384, optional=True)
        check_rate("recipe.codec.share", self.share)
        check_choice("recipe.codec.bits", self.bits, (16, 8, 4))
        as_float(self, "share")

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

    def flops(self, num_rows: int, num_kv_heads: int, head_dim: int) -> float:
        assert self.rank is not None, "counted after resolution"
        width = num_kv_heads * head_dim
        fit = 0.0
        if self.rank < width:
            fit += 2.0 * num_rows * width * width + subspace_flops(width, self.rank)
        rank = min(self.rank, width)
        if self.bits < 16:
            fit += 2.0 * width * rank * rank
        return fit + 2.0 * num_rows * width * rank

    def joined(self, num_layers: int) -> LowRank:
        assert self.rank is not None, "joined after resolution"
        return replace(self, rank=self.rank * num_layers)


@dataclass(frozen=True)
class ProfileKeys(CodecFilling):
    """The key codec that the model's profile names; replaced when the recipe is resolved."""

    slot = ("key_codec",)
    kind = "profile"
    head_shared: ClassVar[bool] = True

    @property
    def keys_only(self) -> bool:
        return True

    def open_field(self) -> str | None:
        return "kind"

    def build(self) -> Codec:
        raise InvalidRecipe("recipe.key_codec", "is not resolved", "a recipe that went through resolve()")
