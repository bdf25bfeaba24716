"""The scorer and budget slots: how important a token is, and how many of them each layer and head keeps. Free of
torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from .filling import Filling, as_float, check_choice, check_int, check_number, check_odd, check_rate
from .propagation_slots import MAX_SCORING_WINDOW

if TYPE_CHECKING:  # the torch side; never imported at run time here
    from .budgets import Budget
    from .scoring import Scorer

Heads = Literal["own", "shared"]


# --- scorer: how important a token is ----------------------------------------------------------------------


class ScorerFilling(Filling):
    """What every scorer declares.

    Attributes:
        scores: it ranks tokens, so that a budget that ranks can stand beside it.
        window: last rows whose queries it wants and which it ranks first.
        wants_mass: it needs the attention that each row has received from every query of the prompt.
    """

    scores: ClassVar[bool] = False
    wants_mass: ClassVar[bool] = False
    window: int = 0

    def build(self) -> Scorer | None:
        """The torch side."""
        raise NotImplementedError


@dataclass(frozen=True)
class NoScorer(ScorerFilling):
    """Nothing is scored, because nothing is ranked."""

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


@dataclass(frozen=True)
class AccumulatedScorer(ScorerFilling):
    """Attention that a row has received from all queries of the prompt, summed over the GQA group (H2O, arXiv
    2306.14048 §4). Costs a second pass over the keys of every layer while the prompt runs."""

    slot = ("scorer",)
    kind = "accumulated"
    scores: ClassVar[bool] = True
    wants_mass: ClassVar[bool] = True

    def build(self) -> Scorer | None:
        from .scoring import Accumulated

        return Accumulated()


# --- budget: how many tokens each layer and head keeps -----------------------------------------------------


class BudgetFilling(Filling):
    """What every budget declares.

    Attributes:
        evicts: rows that reached a layer may be missing from its cache.
        needs_scores: which rows are kept is decided by a scorer.
        heads: `own` = each KV head keeps rows of its own, `shared` = all keep the same.
        fixed: rows that generation appends are forgotten once they are due to be sealed.
    """

    evicts: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = False
    fixed: ClassVar[bool] = False
    heads: Heads = "shared"

    def kept_rows(self, layer: int, num_rows: int, num_tokens: int, window: int) -> int:
        """Rows, exact ends included, that each KV head keeps of `num_rows` that reached a layer, in a prompt of
        `num_tokens` whose last `window` rows are kept anyway."""
        return num_rows

    def build(self) -> Budget | None:
        """The torch side."""
        raise NotImplementedError

    def neutral(self) -> Filling:
        return KeepAll()


@dataclass(frozen=True)
class KeepAll(BudgetFilling):
    """Every row that reaches a layer is kept."""

    slot = ("budget",)
    kind = "all"

    def build(self) -> Budget | None:
        return None


@dataclass(frozen=True)
class EndsBudget(BudgetFilling):
    """Nothing between the exact rows at both ends is kept, neither of the prompt nor of what is generated
    (StreamingLLM, arXiv 2309.17453 §3.2)."""

    slot = ("budget",)
    kind = "ends"
    evicts: ClassVar[bool] = True
    fixed: ClassVar[bool] = True

    def kept_rows(self, layer: int, num_rows: int, num_tokens: int, window: int) -> int:
        return 0

    def build(self) -> Budget | None:
        return None


@dataclass(frozen=True)
class UniformBudget(BudgetFilling):
    """Every layer and KV head keeps the same number of rows, a share of the prompt, the scorer's window included.

    Attributes:
        rate: the share.
        recent: share of the kept rows that goes to the last ones, whatever their scores (H2O keeps half each).
        heads: see `BudgetFilling`; `shared` ranks by the scores summed over the heads.
    """

    slot = ("budget",)
    kind = "uniform"
    evicts: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = True

    rate: float = 0.1
    recent: float = 0.0
    heads: Heads = "own"

    def __post_init__(self) -> None:
        check_rate("recipe.budget.rate", self.rate)
        check_number("recipe.budget.recent", self.recent, 0.0, 1.0)
        check_choice("recipe.budget.heads", self.heads, ("own", "shared"))
        as_float(self, "rate", "recent")

    def kept_rows(self, layer: int, num_rows: int, num_tokens: int, window: int) -> int:
        return min(num_rows, int(num_tokens * self.rate))

    def build(self) -> Budget | None:
        from .budgets import Ranked

        return Ranked(self.recent, self.heads == "shared")

    def neutral(self) -> UniformBudget:
        return replace(self, rate=1.0)


@dataclass(frozen=True)
class PyramidBudget(BudgetFilling):
    """Budgets that fall linearly from the first layer to the last and average to a share of the prompt (PyramidKV,
    arXiv 2406.02069 §3.2). With C = rate x prompt, w = the scorer's window and m = C - w, the last layer keeps
    w + m / beta rows and the first w + 2 m - m / beta, but no layer more than the prompt has.

    Attributes:
        rate: the share, averaged over the layers, window included.
        beta: how steep; 1 = uniform.
        heads: see `UniformBudget`.
        num_layers: of the model. None = filled in when the recipe is resolved.
    """

    slot = ("budget",)
    kind = "pyramid"
    evicts: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = True

    rate: float = 0.1
    beta: float = 20.0
    heads: Heads = "own"
    num_layers: int | None = None

    def __post_init__(self) -> None:
        check_rate("recipe.budget.rate", self.rate)
        check_number("recipe.budget.beta", self.beta, 1.0, 1000.0)
        check_choice("recipe.budget.heads", self.heads, ("own", "shared"))
        check_int("recipe.budget.num_layers", self.num_layers, 2, 1024, optional=True)
        as_float(self, "rate", "beta")

    def kept_rows(self, layer: int, num_rows: int, num_tokens: int, window: int) -> int:
        assert self.num_layers is not None
        mean = int(num_tokens * self.rate) - window
        if mean <= 0:
            return min(num_rows, window)
        least = mean / self.beta
        most = 2 * mean - least
        if most > num_tokens - window:
            most = float(num_tokens - window)
            least = 2 * mean - most
        # rounding is symmetric around the middle layer, so the layers' budgets add up to num_layers x mean
        return min(num_rows, window + round(most - layer * (most - least) / (self.num_layers - 1)))

    def build(self) -> Budget | None:
        from .budgets import Ranked

        return Ranked(0.0, self.heads == "shared")

    def neutral(self) -> PyramidBudget:
        return replace(self, rate=1.0)
