"""The slots of a recipe: one frozen dataclass a filling, plain numbers only, free of torch.

A filling says what it needs and guarantees by its attributes; `spec.Recipe` refuses combinations that
contradict each other. `build` makes the torch side of a filling and imports it lazily, so that a
process which only validates requests never loads torch.

    propagation_slots   which rows enter the next layer
    ranking_slots       scorer and budget: how important a token is, how many are kept
    codec_slots         how rows are packed
    retrieval_slots     what decode attends to
    here                evicted, sharing, window

A number left `None` is taken from the model's profile or from the model's shape when the recipe is resolved
(`resolve.resolve`); a resolved recipe has none left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ..errors import InvalidRecipe
from .codec_slots import Affine as Affine
from .codec_slots import CodecFilling as CodecFilling
from .codec_slots import Dense as Dense
from .codec_slots import Float8 as Float8
from .codec_slots import LowRank as LowRank
from .codec_slots import Native as Native
from .codec_slots import ProfileKeys as ProfileKeys
from .filling import Filling, as_float, check_choice, check_int, check_number
from .propagation_slots import FullPropagation as FullPropagation
from .propagation_slots import PropagationFilling as PropagationFilling
from .propagation_slots import TspPropagation as TspPropagation
from .ranking_slots import AccumulatedScorer as AccumulatedScorer
from .ranking_slots import BudgetFilling as BudgetFilling
from .ranking_slots import EndsBudget as EndsBudget
from .ranking_slots import KeepAll as KeepAll
from .ranking_slots import NoScorer as NoScorer
from .ranking_slots import PyramidBudget as PyramidBudget
from .ranking_slots import ScorerFilling as ScorerFilling
from .ranking_slots import SnapScorer as SnapScorer
from .ranking_slots import UniformBudget as UniformBudget
from .retrieval_slots import AttendAll as AttendAll
from .retrieval_slots import ChunkLandmarks as ChunkLandmarks
from .retrieval_slots import RetrievalFilling as RetrievalFilling

# --- evicted: what happens to the rest ---------------------------------------------------------------------


class EvictedFilling(Filling):
    """What becomes of rows that a budget does not keep.

    Attributes:
        keeps: they stay in the cache, packed by `key_codec` and `value_codec`.
    """

    keeps: ClassVar[bool] = False

    @property
    def key_codec(self) -> CodecFilling:
        """How the keys of rows that stay are packed."""
        raise NotImplementedError

    @property
    def value_codec(self) -> CodecFilling:
        """How their values are packed."""
        raise NotImplementedError


@dataclass(frozen=True)
class Drop(EvictedFilling):
    """Evicted rows are gone."""

    slot = ("evicted",)
    kind = "drop"


@dataclass(frozen=True)
class Demote(EvictedFilling):
    """Evicted rows stay at lower precision, and so do generated rows once they are sealed (MiKV, arXiv 2402.18096 §3).

    Attributes:
        key_bits, value_bits: 8, 4 or 2.
        key_axis: `token` as published, or `channel`.
        group: elements that share a scale and minimum.
        balanced: scale the keys' channels by b = sqrt(max|q| / max|k|) before packing; see `Affine`.
    """

    slot = ("evicted",)
    kind = "demote"
    keeps: ClassVar[bool] = True

    key_bits: int = 4
    value_bits: int = 4
    key_axis: Literal["channel", "token"] = "token"
    group: int = 32
    balanced: bool = False

    def __post_init__(self) -> None:
        check_choice("recipe.evicted.key_bits", self.key_bits, (8, 4, 2))
        check_choice("recipe.evicted.value_bits", self.value_bits, (8, 4, 2))
        check_choice("recipe.evicted.key_axis", self.key_axis, ("channel", "token"))
        check_choice("recipe.evicted.group", self.group, (16, 32, 64, 128))
        check_choice("recipe.evicted.balanced", self.balanced, (True, False))
        if self.balanced and self.key_axis == "channel":
            raise InvalidRecipe(
                "recipe.evicted.balanced", "is of no use along `channel`, which scales channels", "false"
            )

    @property
    def key_codec(self) -> CodecFilling:
        return Affine(self.key_bits, self.key_axis, self.group, self.balanced)

    @property
    def value_codec(self) -> CodecFilling:
        return Affine(self.value_bits, "token", self.group)

    def neutral(self) -> Drop:
        return Drop()


# --- sharing: what layers share ----------------------------------------------------------------------------


class SharingFilling(Filling):
    """What layers have in common in the cache.

    Attributes:
        layers: neighbouring layers that share, 1 = none do.
        values: their values are shared too, not only their keys.
    """

    layers: int = 1
    values: bool = False

    def group(self, layer: int, num_layers: int) -> range:
        """The layers that share with `layer`, itself included; the first one carries what is shared."""
        first = layer // self.layers * self.layers
        return range(first, min(first + self.layers, num_layers))


@dataclass(frozen=True)
class NoSharing(SharingFilling):
    """Every layer stands alone."""

    slot = ("sharing",)
    kind = "none"


@dataclass(frozen=True)
class LayerGroups(SharingFilling):
    """Neighbouring layers are factored together: one set of factor rows a group, a basis for each layer (xKV, arXiv
    2503.18893 §3). The rank of a group is that of the codec times its layers.

    A group's frames leave when its last layer is final, and prefill holds the group's rows until then.

    Attributes:
        layers: layers a group; the last group may have fewer.
        values: see `SharingFilling`.
    """

    slot = ("sharing",)
    kind = "groups"

    layers: int = 4
    values: bool = False

    def __post_init__(self) -> None:
        check_int("recipe.sharing.layers", self.layers, 1, 64)
        check_choice("recipe.sharing.values", self.values, (True, False))

    def neutral(self) -> NoSharing:
        return NoSharing()


# --- window: what stays exact at both ends -----------------------------------------------------------------


@dataclass(frozen=True)
class ExactEnds(Filling):
    """Rows that stay exact, and when generated rows stop being so.

    Attributes:
        sinks: first positions of the sequence.
        local: last rows of the sequence, at least.
        local_rate: the same as a share of the prompt, sinks included; the larger of both counts.
        seal_block: generated rows are sealed in blocks of at least this many, at positions that are multiples of it,
            once at least the local rows are newer; 0 = generated rows stay exact for ever.
        dtype: what exact rows are kept in: the model's compute dtype, or bfloat16.
        positions: `original`, or `cache`: sinks stand right before the local rows, as if nothing lay between
            (StreamingLLM, arXiv 2309.17453 §3.2).
    """

    slot = ("window",)
    kind = "ends"

    sinks: int = 0
    local: int = 0
    local_rate: float = 0.0
    seal_block: int = 0
    dtype: Literal["native", "bfloat16"] = "native"
    positions: Literal["original", "cache"] = "original"

    def __post_init__(self) -> None:
        check_int("recipe.window.sinks", self.sinks, 0, 4096)
        check_int("recipe.window.local", self.local, 0, 65536)
        check_number("recipe.window.local_rate", self.local_rate, 0.0, 1.0)
        check_int("recipe.window.seal_block", self.seal_block, 0, 4096)
        check_choice("recipe.window.dtype", self.dtype, ("native", "bfloat16"))
        check_choice("recipe.window.positions", self.positions, ("original", "cache"))
        as_float(self, "local_rate")

    def local_rows(self, num_tokens: int) -> int:
        """Rows at the end that stay exact at least, for a prompt of `num_tokens`."""
        return max(self.local, int(num_tokens * self.local_rate) - self.sinks)

    def neutral(self) -> ExactEnds:
        return replace(self, dtype="native", positions="original")
