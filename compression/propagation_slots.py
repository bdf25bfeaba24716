"""The propagation slot: which rows enter the next layer. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from .filling import Filling, as_float, check_choice, check_int, check_odd, check_rate

if TYPE_CHECKING:  # the torch side; never imported at run time here
    from .propagation import Propagation

MAX_SCORING_WINDOW = 512  # last rows whose queries score all others: their scores are window x heads floats a row


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

    def neutral(self) -> TspPropagation:
        return replace(self, rate=1.0)
