"""The propagation slot: which rows enter the next layer. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from .codec_slots import Affine
from .filling import Filling, as_float, check_choice, check_int, check_number, check_odd, check_rate

if TYPE_CHECKING:  # the torch side; never imported at run time here
    from .propagation import Propagation

MAX_SCORING_WINDOW = 512  # last rows whose queries score all others: their scores are window x heads floats a row
RECALL_GROUP = 64  # columns of a hidden row that share a scale
RECALL_PASS_ROWS = 32  # known rows that recall in one pass, at most
MOST_RECALL_STEP = 64
MOST_JOINING = 128  # rows that join one pass: neighbours wait for it, and its masks and rows are held beside the caches


@dataclass(frozen=True)
class RecallPlan:
    """What may be recalled of one prompt, counted in chunks of the retrieval's size.

    Attributes:
        layer: T; the rows lie behind it, and are recalled into the layers above.
        chunk: rows a chunk.
        num_hidden: chunks that do not go on at first.
        capacity: chunks of them that a sequence has in the deep layers at once.
        a_row: chunks that one row of a step brings back, at most.
        pass_rows: rows that may run in one pass, and be kept together. They bring back no more than `capacity`, so that
            what one of them has brought back is not displaced by another of them.
    """

    layer: int
    chunk: int
    num_hidden: int
    capacity: int
    a_row: int
    pass_rows: int

    @property
    def num_slots(self) -> int:
        """Chunks that there must be room for: what a pass displaces, its earlier rows still attend to."""
        return self.capacity + self.pass_rows * self.a_row

    @property
    def state_nbytes(self) -> int:
        """Bytes of what a device knows of a choice's chunks, see `kernels.step_attention.recalled`."""
        return 8 * (6 + 2 * self.num_slots) + 4 * self.num_slots + self.num_hidden


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

    @property
    def recalls(self) -> bool:
        """Whether rows that do not go on are kept, so that decode may bring them back."""
        return False

    def keeps_hidden(self, layer: int) -> bool:
        """Whether it is this layer behind which they are kept."""
        return False

    @property
    def hidden_codec(self) -> Affine:
        """How they are packed then."""
        raise NotImplementedError

    def recall_plan(self, num_tokens: int, chunk: int, sinks: int) -> RecallPlan | None:
        """What may be recalled of a prompt of `num_tokens`; None = nothing."""
        return None

    def rows_at(self, layer: int, num_tokens: int, chunk: int, sinks: int) -> int:
        """Rows of a prompt of `num_tokens` that pass `layer`."""
        raise NotImplementedError

    def too_short(self, num_tokens: int, chunk: int, sinks: int) -> bool:
        """Whether a prompt is too short to select from."""
        return False

    def build(self, chunk: int, sinks: int) -> Propagation:
        """The torch side."""
        raise NotImplementedError


_OF_RECALL = ("recall_bits", "recall_step")  # fields that say nothing without it


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
        window: the last rows, whose queries score and which always go on. None = from the profile.
        kernel: width of the max-pool over scores.
        chunk_aligned: select whole position-aligned chunks of the retrieval's size instead of single tokens.
        recall: rows that decode may have brought back into the deep layers at once, as a share of the prompt; 0 = none
            are kept for that. None = from the profile, else 0.
        recall_bits: 8 or 4, of which hidden rows that are kept for it are packed.
        recall_step: most rows that one row of a step brings back. Without recall, this and the bits say nothing.
    """

    slot = ("propagation",)
    kind = "tsp"
    selects: ClassVar[bool] = True

    layer: int | None = None
    rate: float | None = None
    # resolved, it is the number that the base declares
    window: int | None = 8  # type: ignore[assignment]
    kernel: int = 7
    chunk_aligned: bool = False
    recall: float | None = 0.0
    recall_bits: int = 8
    recall_step: int = 16

    def __post_init__(self) -> None:
        check_int("recipe.propagation.layer", self.layer, 0, 1023, optional=True)
        check_rate("recipe.propagation.rate", self.rate, optional=True)
        check_int("recipe.propagation.window", self.window, 1, MAX_SCORING_WINDOW, optional=True)
        check_odd("recipe.propagation.kernel", self.kernel, 255)
        check_choice("recipe.propagation.chunk_aligned", self.chunk_aligned, (True, False))
        if self.recall is not None:
            check_number("recipe.propagation.recall", self.recall, 0.0, 1.0)
        check_choice("recipe.propagation.recall_bits", self.recall_bits, (8, 4))
        check_int("recipe.propagation.recall_step", self.recall_step, 1, MOST_RECALL_STEP)
        as_float(self, "rate", "recall")
        if not self.recalls:  # recipes that do the same are equal
            for name in _OF_RECALL:
                object.__setattr__(self, name, getattr(TspPropagation, name))

    @property
    def recalls(self) -> bool:
        return self.recall is None or self.recall > 0

    def keeps_hidden(self, layer: int) -> bool:
        return self.recalls and layer == self.layer

    @property
    def hidden_codec(self) -> Affine:
        return Affine(self.recall_bits, "token", RECALL_GROUP)

    def recall_plan(self, num_tokens: int, chunk: int, sinks: int) -> RecallPlan | None:
        assert self.layer is not None and self.recall is not None
        begin = self.window_begin(num_tokens, chunk, sinks)
        num_hidden = (begin - sinks) // chunk - self.num_selected(num_tokens, chunk, sinks)
        capacity = min(int(num_tokens * self.recall) // chunk, num_hidden)
        if capacity < 1:
            return None
        a_row = min(max(1, self.recall_step // chunk), capacity)
        pass_rows = min(capacity // a_row, RECALL_PASS_ROWS, max(1, MOST_JOINING // (a_row * chunk)))
        return RecallPlan(self.layer, chunk, num_hidden, capacity, a_row, pass_rows)

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if self.recalls or key not in _OF_RECALL}

    def rows_at(self, layer: int, num_tokens: int, chunk: int, sinks: int) -> int:
        assert self.layer is not None
        if layer <= self.layer:
            return num_tokens
        begin = self.window_begin(num_tokens, chunk, sinks)
        return sinks + self.num_selected(num_tokens, chunk, sinks) * chunk + num_tokens - begin

    def window_begin(self, num_tokens: int, chunk: int, sinks: int) -> int:
        """First position of the rows at the end that always go on: the window, extended to a chunk's start."""
        assert self.window is not None
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
