"""The retrieval slot: what decode attends to. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ..errors import InvalidRecipe
from .codec_slots import Specs, TensorSpec
from .filling import Filling, as_float, check_choice, check_int, check_rate, shown

if TYPE_CHECKING:  # the torch side; never imported at run time here
    from .retrieval import Retrieval


class RetrievalFilling(Filling):
    """What every retrieval declares.

    Attributes:
        needs_grid: sealed rows must be whole position-aligned chunks, the same for all KV heads.
        chunk: rows a chunk.
        outliers: chunks a KV head that stay exact.
        select_every: positions that share a choice, the first one's.
        chooses: a step attends to some of the rows that are held, and could attend to all.
    """

    chooses: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False
    chunk: int = 1
    outliers: int = 0
    select_every: int = 1

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
        chunk: rows a chunk. None = from the model's profile.
        outliers: chunks a KV head whose landmark describes them worst (least cosine); kept exact, never scored. None =
            from the profile.
        budget_tokens: rows that a decode step attends to, at least.
        budget_rate: the same as a share of the prompt; the larger of both counts.
        landmark_bits: 16 keeps landmarks in bfloat16, 8 in int8 with a float16 scale each.
        select_every: 1 chooses chunks anew in every decode step; N makes N positions share the choice of the first of
            them, so that landmarks are read once in N steps.
    """

    slot = ("retrieval",)
    kind = "chunks"
    chooses: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True

    # resolved, they are the numbers that the base declares
    chunk: int | None = 8  # type: ignore[assignment]
    outliers: int | None = 48  # type: ignore[assignment]
    budget_tokens: int = 256
    budget_rate: float = 0.015625
    landmark_bits: int = 16
    select_every: int = 1

    def __post_init__(self) -> None:
        if self.chunk is not None:
            check_choice("recipe.retrieval.chunk", self.chunk, (1, 2, 4, 8, 16))
        check_int("recipe.retrieval.outliers", self.outliers, 0, 4096, optional=True)
        check_int("recipe.retrieval.budget_tokens", self.budget_tokens, 1, 1 << 20)
        check_rate("recipe.retrieval.budget_rate", self.budget_rate)
        check_choice("recipe.retrieval.landmark_bits", self.landmark_bits, (16, 8))
        check_choice("recipe.retrieval.select_every", self.select_every, (1, 2, 4, 8, 16))
        if self.chunk == 1 and self.outliers:
            # every landmark is its row, so rounding alone would say which describe theirs worst
            raise InvalidRecipe("recipe.retrieval.outliers", shown(self.outliers), "0 where chunk is 1")
        as_float(self, "budget_rate")

    def selected_chunks(self, num_tokens: int) -> int:
        assert self.chunk is not None
        return -(-max(self.budget_tokens, int(self.budget_rate * num_tokens)) // self.chunk)

    def landmark_specs(self, num_chunks: int, num_kv_heads: int, head_dim: int) -> Specs:
        shape = (num_chunks, num_kv_heads, head_dim)
        if self.landmark_bits == 16:
            return {"means": TensorSpec("bfloat16", shape)}
        return {"codes": TensorSpec("int8", shape), "scale": TensorSpec("float16", shape[:2])}

    def build(self) -> Retrieval | None:
        from .retrieval import Landmarks

        return Landmarks(self)

    def neutral(self) -> ChunkLandmarks:
        return replace(self, budget_rate=1.0, budget_tokens=1 << 20)
