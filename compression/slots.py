"""The slots of a recipe: one frozen dataclass a filling, plain numbers only, free of torch.

A filling says what it needs and guarantees by its attributes; `spec.Recipe` refuses combinations that
contradict each other. `build` makes the torch side of a filling and imports it lazily, so that a
process which only validates requests never loads torch. The codecs are in `codec_slots`.

A number left `None` is taken from the model's profile or from the model's shape when the recipe is resolved
(`resolve.resolve`); a resolved recipe has none left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from .codec_slots import Affine as Affine
from .codec_slots import CodecFilling as CodecFilling
from .codec_slots import Dense as Dense
from .codec_slots import LowRank as LowRank
from .codec_slots import Native as Native
from .codec_slots import ProfileKeys as ProfileKeys
from .codec_slots import Specs, TensorSpec
from .filling import Filling, as_float, check_choice, check_int, check_odd, check_rate

if TYPE_CHECKING:  # the torch side; never imported at run time here
    from .budgets import Budget
    from .propagation import Propagation
    from .retrieval import Retrieval
    from .scoring import Scorer


MAX_SCORING_WINDOW = 512  # last rows whose queries score all others: their scores are window x heads floats a row

# --- propagation: which rows enter the next layer ---------------------------------------------------------


class PropagationFilling(Filling):
    """What every way of propagation declares.

    Attributes:
        selects: some rows do not enter the deep layers.
        window: last rows that always go on, 0 = no such promise.
        chunk_aligned: rows go on in whole position-aligned chunks of the retrieval's size.
    """

    selects: ClassVar[bool] = False
    window: int = 0
    chunk_aligned: bool = False

    def rows_at(self, layer: int, num_tokens: int, chunk: int, sinks: int) -> int:
        """Rows of a prompt of `num_tokens` that pass `layer`."""
        raise NotImplementedError

    def too_short(self, num_tokens: int, chunk: int, sinks: int) -> bool:
        """Whether a prompt is too short to select from."""
        return False

    def build(self, chunk: int, sinks: int) -> Propagation:
        """The torch side."""
        raise NotImplementedError


@dataclass(frozen=True)
class FullPropagation(PropagationFilling):
    """Every row passes every layer."""

    slot = ("propagation",)
    kind = "full"

    def rows_at(self, layer: int, num_tokens: int, chunk: int, sinks: int) -> int:
        return num_tokens

    def build(self, chunk: int, sinks: int) -> Propagation:
        from .propagation import Full

        return Full()


@dataclass(frozen=True)
class TspPropagation(PropagationFilling):
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
    selects: ClassVar[bool] = True

    layer: int | None = None
    rate: float | None = None
    window: int = 8
    kernel: int = 7
    chunk_aligned: bool = False
    recall: float = 0.0

    def __post_init__(self) -> None:
        check_int("recipe.propagation.layer", self.layer, 0, 1023, optional=True)
        check_rate("recipe.propagation.rate", self.rate, optional=True)
        check_int("recipe.propagation.window", self.window, 1, MAX_SCORING_WINDOW)
        check_odd("recipe.propagation.kernel", self.kernel, 255)
        check_choice("recipe.propagation.chunk_aligned", self.chunk_aligned, (True, False))
        check_choice("recipe.propagation.recall", self.recall, (0.0, 0))
        as_float(self, "rate", "recall")

    def rows_at(self, layer: int, num_tokens: int, chunk: int, sinks: int) -> int:
        assert self.layer is not None
        if layer <= self.layer:
            return num_tokens
        begin = self.window_begin(num_tokens, chunk, sinks)
        return sinks + self.num_selected(num_tokens, chunk, sinks) * chunk + num_tokens - begin

    def window_begin(self, num_tokens: int, chunk: int, sinks: int) -> int:
        """First position of the rows at the end that always go on: the window, extended to a chunk's start."""
        return max(sinks, (num_tokens - self.window) // chunk * chunk)

    def num_selected(self, num_tokens: int, chunk: int, sinks: int) -> int:
        """Chunks that are selected by score, beside sinks and window."""
        assert self.rate is not None
        begin = self.window_begin(num_tokens, chunk, sinks)
        free = int(num_tokens * self.rate) - (num_tokens - begin) - sinks
        return min(max(0, free // chunk), (begin - sinks) // chunk)

    def too_short(self, num_tokens: int, chunk: int, sinks: int) -> bool:
        return self.num_selected(num_tokens, chunk, sinks) < 1

    def build(self, chunk: int, sinks: int) -> Propagation:
        from .propagation import Tsp

        return Tsp(self, chunk, sinks)


# --- scorer: how important a token is ----------------------------------------------------------------------


class ScorerFilling(Filling):
    """What every scorer declares.

    Attributes:
        scores: it ranks tokens, so that an evicting budget can stand beside it.
        window: last rows whose queries it wants and which it ranks first.
    """

    scores: ClassVar[bool] = False
    window: int = 0

    def build(self) -> Scorer | None:
        """The torch side."""
        raise NotImplementedError


@dataclass(frozen=True)
class NoScorer(ScorerFilling):
    """Nothing is scored, because nothing is evicted."""

    slot = ("scorer",)
    kind = "none"

    def build(self) -> Scorer | None:
        return None


@dataclass(frozen=True)
class SnapScorer(ScorerFilling):
    """Attention of the last `window` queries, pooled, summed over the GQA group (SnapKV, arXiv 2404.14469)."""

    slot = ("scorer",)
    kind = "snap"
    scores: ClassVar[bool] = True

    window: int = 8
    kernel: int = 7
    pool: Literal["max", "avg"] = "max"

    def __post_init__(self) -> None:
        check_int("recipe.scorer.window", self.window, 1, MAX_SCORING_WINDOW)
        check_odd("recipe.scorer.kernel", self.kernel, 255)
        check_choice("recipe.scorer.pool", self.pool, ("max", "avg"))

    def build(self) -> Scorer | None:
        from .scoring import Snap

        return Snap(self)


# --- budget: how many tokens each layer and head keeps -----------------------------------------------------


class BudgetFilling(Filling):
    """What every budget declares.

    Attributes:
        evicts: rows that reached a layer may be missing from its cache.
        head_shared: all KV heads keep the same rows.
    """

    evicts: ClassVar[bool] = False
    head_shared: ClassVar[bool] = True

    def kept_rows(self, num_rows: int, num_tokens: int) -> int:
        """Rows each KV head keeps of `num_rows` that reached a layer, in a prompt of `num_tokens`."""
        return num_rows

    def build(self) -> Budget | None:
        """The torch side."""
        raise NotImplementedError


@dataclass(frozen=True)
class KeepAll(BudgetFilling):
    """Every row that reaches a layer is kept."""

    slot = ("budget",)
    kind = "all"

    def build(self) -> Budget | None:
        return None


@dataclass(frozen=True)
class UniformBudget(BudgetFilling):
    """Every layer and KV head keeps the same number of rows, a share of the prompt, the scorer's window included."""

    slot = ("budget",)
    kind = "uniform"
    evicts: ClassVar[bool] = True
    head_shared: ClassVar[bool] = False

    rate: float = 0.1

    def __post_init__(self) -> None:
        check_rate("recipe.budget.rate", self.rate)
        as_float(self, "rate")

    def kept_rows(self, num_rows: int, num_tokens: int) -> int:
        return min(num_rows, int(num_tokens * self.rate))

    def build(self) -> Budget | None:
        from .budgets import Uniform

        return Uniform()


# --- evicted: what happens to the rest ---------------------------------------------------------------------


class EvictedFilling(Filling):
    """What becomes of rows that a budget does not keep."""


@dataclass(frozen=True)
class Drop(EvictedFilling):
    """Evicted rows are gone."""

    slot = ("evicted",)
    kind = "drop"


# --- sharing: what layers share ----------------------------------------------------------------------------


class SharingFilling(Filling):
    """What layers have in common in the cache."""


@dataclass(frozen=True)
class NoSharing(SharingFilling):
    """Every layer stands alone."""

    slot = ("sharing",)
    kind = "none"


# --- retrieval: what decode attends to ---------------------------------------------------------------------


class RetrievalFilling(Filling):
    """What every retrieval declares.

    Attributes:
        needs_grid: sealed rows must be whole position-aligned chunks, the same for all KV heads.
        chunk: rows a chunk.
        outliers: chunks a KV head that stay exact.
    """

    needs_grid: ClassVar[bool] = False
    chunk: int = 1
    outliers: int = 0

    def selected_chunks(self, num_tokens: int) -> int:
        """Chunks that a decode step attends to, a pure function of the prompt's length."""
        raise NotImplementedError

    def landmark_specs(self, num_chunks: int, num_kv_heads: int, head_dim: int) -> Specs:
        """The tensors that are scored instead of the chunks' keys."""
        return {}

    def build(self) -> Retrieval | None:
        """The torch side."""
        raise NotImplementedError


@dataclass(frozen=True)
class AttendAll(RetrievalFilling):
    """Decode attends to every row that is kept."""

    slot = ("retrieval",)
    kind = "all"

    def build(self) -> Retrieval | None:
        return None


@dataclass(frozen=True)
class ChunkLandmarks(RetrievalFilling):
    """Decode scores one landmark a chunk and attends to the best chunks of each KV head (ShadowKV §4.2).

    Attributes:
        chunk: rows a chunk.
        outliers: chunks a KV head whose landmark describes them worst (least cosine); kept exact, never scored.
        budget_tokens: rows that a decode step attends to, at least.
        budget_rate: the same as a share of the prompt; the larger of both counts.
        landmark_bits: 16 keeps landmarks in bfloat16, 8 in int8 with a float16 scale each.
    """

    slot = ("retrieval",)
    kind = "chunks"
    needs_grid: ClassVar[bool] = True

    chunk: int = 8
    outliers: int = 48
    budget_tokens: int = 256
    budget_rate: float = 0.015625
    landmark_bits: int = 16

    def __post_init__(self) -> None:
        check_choice("recipe.retrieval.chunk", self.chunk, (1, 2, 4, 8, 16))
        check_int("recipe.retrieval.outliers", self.outliers, 0, 4096)
        check_int("recipe.retrieval.budget_tokens", self.budget_tokens, 1, 1 << 20)
        check_rate("recipe.retrieval.budget_rate", self.budget_rate)
        check_choice("recipe.retrieval.landmark_bits", self.landmark_bits, (16, 8))
        as_float(self, "budget_rate")

    def selected_chunks(self, num_tokens: int) -> int:
        return -(-max(self.budget_tokens, int(self.budget_rate * num_tokens)) // self.chunk)

    def landmark_specs(self, num_chunks: int, num_kv_heads: int, head_dim: int) -> Specs:
        shape = (num_chunks, num_kv_heads, head_dim)
        if self.landmark_bits == 16:
            return {"means": TensorSpec("bfloat16", shape)}
        return {"codes": TensorSpec("int8", shape), "scale": TensorSpec("float16", shape[:2])}

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
        seal_block: generated rows are sealed in blocks of at least this many, at positions that are multiples of it,
            once at least `local` newer rows exist; 0 = generated rows stay exact for ever.
        dtype: what exact rows are kept in: the model's compute dtype, or bfloat16.
    """

    slot = ("window",)
    kind = "ends"

    sinks: int = 0
    local: int = 0
    seal_block: int = 0
    dtype: Literal["native", "bfloat16"] = "native"

    def __post_init__(self) -> None:
        check_int("recipe.window.sinks", self.sinks, 0, 4096)
        check_int("recipe.window.local", self.local, 0, 65536)
        check_int("recipe.window.seal_block", self.seal_block, 0, 4096)
        check_choice("recipe.window.dtype", self.dtype, ("native", "bfloat16"))
