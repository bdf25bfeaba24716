"""The slots of a recipe: one frozen dataclass a filling, plain numbers only, free of torch.

A filling says what it needs and guarantees by its class attributes; `recipe.Recipe` refuses combinations
that contradict each other. `build` makes the torch side of a filling and imports it lazily, so that a
process which only validates requests never loads torch.

A number left `None` is taken from the model's profile or from the model's shape when the recipe is resolved
(`recipe.resolve`); a resolved recipe has none left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import InvalidRecipe

if TYPE_CHECKING:  # the torch side; never imported at run time here
    from .budgets import Budget
    from .codecs import Codec
    from .propagation import Propagation
    from .retrieval import Retrieval
    from .scoring import Scorer

SLOT_NAMES = (
    "propagation",
    "scorer",
    "budget",
    "evicted",
    "key_codec",
    "value_codec",
    "sharing",
    "retrieval",
    "window",
)

_REGISTRY: dict[str, dict[str, type[Filling]]] = {name: {} for name in SLOT_NAMES}


class Filling:
    """Base of all slot fillings.

    Attributes:
        slot: the slots that the filling may stand in.
        kind: its name in JSON.
    """

    slot: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for slot in cls.slot:
            _REGISTRY[slot][cls.kind] = cls

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind} | {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]


def filling_from_dict(slot: str, raw: object) -> Filling:
    """Build the filling that a JSON object describes; unknown kinds and keys are refused by name."""
    known = _REGISTRY[slot]
    if not isinstance(raw, dict) or not isinstance(raw.get("kind"), str):
        raise InvalidRecipe(f"recipe.{slot}", "is not an object with a string `kind`", ", ".join(sorted(known)))
    kind = raw["kind"]
    if kind not in known:
        raise InvalidRecipe(f"recipe.{slot}.kind", f"unknown kind {kind[:64]!r}", ", ".join(sorted(known)))
    cls = known[kind]
    names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    for key in raw:
        if key != "kind" and key not in names:
            raise InvalidRecipe(
                f"recipe.{slot}", f"unknown key {str(key)[:64]!r}", ", ".join(sorted(names)) or "no keys"
            )
    try:
        return cls(**{k: v for k, v in raw.items() if k != "kind"})
    except TypeError as exc:
        raise InvalidRecipe(f"recipe.{slot}", "a required key is missing", ", ".join(sorted(names))) from exc


def check_int(where: str, value: object, low: int, high: int, optional: bool = False) -> None:
    """Refuse anything but an integer in [low, high] (or None where it is optional)."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRecipe(where, f"got {value!r}"[:96], f"an integer from {low} to {high}")


def check_rate(where: str, value: object, optional: bool = False) -> None:
    """Refuse anything but a finite number in (0, 1] (or None where it is optional)."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not 0 < value <= 1:
        raise InvalidRecipe(where, f"got {value!r}"[:96], "a number above 0 and at most 1")


def check_choice(where: str, value: object, allowed: tuple[object, ...]) -> None:
    """Refuse anything that is not one of the allowed values."""
    if not any(value == a and type(value) is type(a) for a in allowed):
        raise InvalidRecipe(where, f"got {value!r}"[:96], ", ".join(map(str, allowed)))


# --- propagation: which rows enter the next layer ---------------------------------------------------------


@dataclass(frozen=True)
class FullPropagation(Filling):
    """Every row passes every layer."""

    slot = ("propagation",)
    kind = "full"
    recallable: ClassVar[bool] = True

    def build(self, chunk: int) -> Propagation:
        from .propagation import Full

        return Full()


@dataclass(frozen=True)
class TspPropagation(Filling):
    """Token-selective propagation (FastKV, arXiv 2502.01068 §3): after `layer` only selected rows go on.

    Attributes:
        layer: the layer T whose attention selects; its own KV keeps all rows. None = from the model's profile.
        rate: share of the prompt's rows that go on, the window included. None = from the profile.
        window: the last rows, whose queries score and which always go on.
        kernel: width of the max-pool over scores.
        chunk_aligned: select whole position-aligned chunks of the retrieval's size instead of single tokens.
        recall: rows a decode step may fetch back, as a share of the prompt; 0 = never.
    """

    slot = ("propagation",)
    kind = "tsp"

    layer: int | None = None
    rate: float | None = None
    window: int = 8
    kernel: int = 7
    chunk_aligned: bool = False
    recall: float = 0.0

    def __post_init__(self) -> None:
        check_int("recipe.propagation.layer", self.layer, 0, 1023, optional=True)
        check_rate("recipe.propagation.rate", self.rate, optional=True)
        check_int("recipe.propagation.window", self.window, 1, 4096)
        check_int("recipe.propagation.kernel", self.kernel, 1, 255)
        check_choice("recipe.propagation.chunk_aligned", self.chunk_aligned, (True, False))
        check_choice("recipe.propagation.recall", self.recall, (0.0,))

    def build(self, chunk: int) -> Propagation:
        from .propagation import Tsp

        return Tsp(self, chunk)


# --- scorer: how important a token is ----------------------------------------------------------------------


@dataclass(frozen=True)
class NoScorer(Filling):
    """Nothing is scored, because nothing is evicted."""

    slot = ("scorer",)
    kind = "none"

    def build(self) -> Scorer | None:
        return None


@dataclass(frozen=True)
class SnapScorer(Filling):
    """Attention of the last `window` queries, pooled, summed over the GQA group (SnapKV, arXiv 2404.14469)."""

    slot = ("scorer",)
    kind = "snap"

    window: int = 8
    kernel: int = 7
    pool: Literal["max", "avg"] = "max"

    def __post_init__(self) -> None:
        check_int("recipe.scorer.window", self.window, 1, 4096)
        check_int("recipe.scorer.kernel", self.kernel, 1, 255)
        check_choice("recipe.scorer.pool", self.pool, ("max", "avg"))

    def build(self) -> Scorer | None:
        from .scoring import Snap

        return Snap(self)


# --- budget: how many tokens each layer and head keeps -----------------------------------------------------


@dataclass(frozen=True)
class KeepAll(Filling):
    """Every row that reaches a layer is kept."""

    slot = ("budget",)
    kind = "all"
    evicts: ClassVar[bool] = False
    head_shared: ClassVar[bool] = True

    def build(self) -> Budget | None:
        return None


@dataclass(frozen=True)
class UniformBudget(Filling):
    """Every layer and KV head keeps the same number of rows, a share of the prompt, the scorer's window included."""

    slot = ("budget",)
    kind = "uniform"
    evicts: ClassVar[bool] = True
    head_shared: ClassVar[bool] = False

    rate: float = 0.1

    def __post_init__(self) -> None:
        check_rate("recipe.budget.rate", self.rate)

    def build(self) -> Budget | None:
        from .budgets import Uniform

        return Uniform(self)


# --- evicted: what happens to the rest ---------------------------------------------------------------------


@dataclass(frozen=True)
class Drop(Filling):
    """Evicted rows are gone."""

    slot = ("evicted",)
    kind = "drop"


# --- codecs: how rows are stored and sent ------------------------------------------------------------------


@dataclass(frozen=True)
class Native(Filling):
    """Rows in the dtype that the model computes in; post-RoPE for keys."""

    slot = ("key_codec", "value_codec")
    kind = "native"
    domain: ClassVar[str] = "post_rope"
    append_block: ClassVar[int] = 1
    head_shared: ClassVar[bool] = False

    def build(self, role: Literal["key", "value"]) -> Codec:
        from .codecs import DenseCodec

        return DenseCodec(role, None)


@dataclass(frozen=True)
class Dense(Filling):
    """Rows in a given floating-point dtype; post-RoPE for keys."""

    slot = ("key_codec", "value_codec")
    kind = "dense"
    domain: ClassVar[str] = "post_rope"
    append_block: ClassVar[int] = 1
    head_shared: ClassVar[bool] = False

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        check_choice("recipe.codec.dtype", self.dtype, ("bfloat16", "float16", "float32"))

    def build(self, role: Literal["key", "value"]) -> Codec:
        from .codecs import DenseCodec

        return DenseCodec(role, self.dtype)


@dataclass(frozen=True)
class Affine(Filling):
    """Asymmetric integers with a float16 scale and minimum per group (KIVI, arXiv 2402.02750 §3).

    Attributes:
        bits: 8, 4 or 2, packed into bytes.
        axis: `channel` groups `group` consecutive rows of one channel (keys); `token` groups `group` channels of one row (values).
        group: elements that share a scale and minimum.
    """

    slot = ("key_codec", "value_codec")
    kind = "affine"
    domain: ClassVar[str] = "post_rope"
    head_shared: ClassVar[bool] = False

    bits: int = 4
    axis: Literal["channel", "token"] = "token"
    group: int = 32

    def __post_init__(self) -> None:
        check_choice("recipe.codec.bits", self.bits, (8, 4, 2))
        check_choice("recipe.codec.axis", self.axis, ("channel", "token"))
        check_choice("recipe.codec.group", self.group, (16, 32, 64, 128))

    @property
    def append_block(self) -> int:
        """Rows that must be sealed together."""
        return self.group if self.axis == "channel" else 1

    def build(self, role: Literal["key", "value"]) -> Codec:
        from .codecs import AffineCodec

        return AffineCodec(role, self)


@dataclass(frozen=True)
class LowRank(Filling):
    """Pre-RoPE keys of all heads as rows x basis, by truncated SVD (ShadowKV, arXiv 2410.21465 §4.1).

    Attributes:
        rank: columns kept. None = 0.156 x KV heads x head size, rounded to a multiple of 2.
        bits: 16 keeps the factor rows in bfloat16; 8 or 4 packs them, one group a row.
    """

    slot = ("key_codec",)
    kind = "lowrank"
    domain: ClassVar[str] = "pre_rope"
    append_block: ClassVar[int] = 1
    head_shared: ClassVar[bool] = True

    rank: int | None = None
    bits: int = 16

    def __post_init__(self) -> None:
        check_int("recipe.key_codec.rank", self.rank, 1, 8192, optional=True)
        check_choice("recipe.key_codec.bits", self.bits, (16, 8, 4))

    def build(self, role: Literal["key", "value"]) -> Codec:
        from .codecs import LowRankCodec

        return LowRankCodec(self)


@dataclass(frozen=True)
class ProfileKeys(Filling):
    """The key codec that the model's profile names; replaced when the recipe is resolved."""

    slot = ("key_codec",)
    kind = "profile"
    domain: ClassVar[str] = "post_rope"
    append_block: ClassVar[int] = 1
    head_shared: ClassVar[bool] = True

    def build(self, role: Literal["key", "value"]) -> Codec:
        raise InvalidRecipe("recipe.key_codec", "is not resolved", "a recipe that went through resolve()")


# --- sharing: what layers share ----------------------------------------------------------------------------


@dataclass(frozen=True)
class NoSharing(Filling):
    """Every layer stands alone."""

    slot = ("sharing",)
    kind = "none"


# --- retrieval: what decode attends to ---------------------------------------------------------------------


@dataclass(frozen=True)
class AttendAll(Filling):
    """Decode attends to every row that is kept."""

    slot = ("retrieval",)
    kind = "all"
    chunk: ClassVar[int] = 1
    needs_grid: ClassVar[bool] = False

    def build(self) -> Retrieval | None:
        return None


@dataclass(frozen=True)
class ChunkLandmarks(Filling):
    """Decode scores one landmark a chunk and attends to the best chunks of each KV head (ShadowKV §4.2).

    Attributes:
        chunk: rows a chunk.
        outliers: chunks a KV head whose landmark describes them worst (least cosine); kept exact, never scored.
        budget_tokens: rows that a decode step attends to, at least.
        budget_rate: the same as a share of the prompt; the larger of both counts.
        landmark_bits: 16 keeps landmarks in bfloat16, 8 in int8 with a scale each.
    """

    slot = ("retrieval",)
    kind = "chunks"
    needs_grid: ClassVar[bool] = True

    chunk: int = 8
    outliers: int = 48
    budget_tokens: int = 256
    budget_rate: float = 0.0156
    landmark_bits: int = 16

    def __post_init__(self) -> None:
        check_choice("recipe.retrieval.chunk", self.chunk, (1, 2, 4, 8, 16))
        check_int("recipe.retrieval.outliers", self.outliers, 0, 4096)
        check_int("recipe.retrieval.budget_tokens", self.budget_tokens, 1, 1 << 20)
        check_rate("recipe.retrieval.budget_rate", self.budget_rate)
        check_choice("recipe.retrieval.landmark_bits", self.landmark_bits, (16, 8))

    def build(self) -> Retrieval | None:
        from .retrieval import Landmarks

        return Landmarks(self)


# --- window: what stays exact at both ends -----------------------------------------------------------------


@dataclass(frozen=True)
class ExactEnds(Filling):
    """Rows that stay exact, and when generated rows stop being so.

    Attributes:
        sinks: first positions of the sequence.
        local: last rows of the sequence, at least.
        seal_block: generated rows are sealed in blocks of this many, at positions that are multiples of it,
            once at least `local` newer rows exist; 0 = generated rows stay exact for ever.
    """

    slot = ("window",)
    kind = "ends"

    sinks: int = 0
    local: int = 0
    seal_block: int = 0

    def __post_init__(self) -> None:
        check_int("recipe.window.sinks", self.sinks, 0, 4096)
        check_int("recipe.window.local", self.local, 0, 65536)
        check_int("recipe.window.seal_block", self.seal_block, 0, 4096)


