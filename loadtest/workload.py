"""What is asked and when: conversations of one or more turns, made one after another from a seed.

Each is made while the one before it is waited for, so that a long run holds no more than what is under way. The same
seed gives the same conversations in the same order, whatever the service does with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from .arrivals import RateProfile, arrival_times
from .lengths import Distribution, Fixed, draw_tokens
from .traces import MOONCAKE_BLOCK, Prompt, TraceRow
from .vocabulary import Vocabulary

ONE, NOTHING = Fixed(1), Fixed(0)

# streams of random numbers: what one draws more does not move the others; none is 0, as NumPy takes [seed, 0] for the
# seed alone, which a service under test may use as well
_ARRIVALS, _LENGTHS, _TOKENS, _CHOICES, _KEEP, _PREFIXES, _BLOCKS = range(1, 8)


@dataclass(frozen=True, slots=True)
class Turn:
    """One request.

    Attributes:
        index: in order of the conversations, from 0; what a conversation's turns share their warm-up by.
        prompt: text, token ids or chat messages; of the new turn alone.
        think_s: from the end of the turn before it to this one; 0 for the first.
        cancel_after_s: from when it is sent until it is cancelled, or None.
    """

    index: int
    prompt: Prompt
    input_tokens: int | None
    max_tokens: int
    recipe: str
    think_s: float = 0.0
    cancel_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that follow one another.

    Attributes:
        arrival_s: when the first turn is due, since the start of the run.
        session_id: "" for a single request.
        warm_up: whether it is left out of the figures.
    """

    arrival_s: float
    turns: tuple[Turn, ...]
    session_id: str
    warm_up: bool


@dataclass(frozen=True)
class Mix:
    """What every kind of load can be told.

    Attributes:
        recipes: name to weight; "" = the server's default.
        turns: number of turns of a conversation.
        think_s: seconds between two turns.
        cancel_rate: share of requests that are cancelled.
        cancel_after_s: when, in seconds from sending.
        text: prompts are text, not token ids.
    """

    recipes: Mapping[str, float] = field(default_factory=lambda: {"": 1.0})
    turns: Distribution = ONE
    think_s: Distribution = NOTHING
    cancel_rate: float = 0.0
    cancel_after_s: Distribution = NOTHING
    text: bool = False


class Workload:
    """Conversations in order of their arrival. Iterating begins anew each time, with the same ones.

    Args:
        count: requests altogether; a conversation's turns count each.
        num_warmups: requests in front of them that are left out of the figures.
        most_tokens: of prompt and answer together; longer ones are left out and counted in `num_left_out`. None = any.
        run_id: makes names of sessions unlike those of other runs.
    """

    def __init__(
        self,
        source: Lengths | Trace,
        mix: Mix,
        vocabulary: Vocabulary | None,
        *,
        seed: int,
        count: int,
        num_warmups: int = 0,
        most_tokens: int | None = None,
        run_id: str = "",
    ) -> None:
        self._source, self._mix, self._vocabulary = source, mix, vocabulary
        self._seed, self._count, self._num_warmups = seed, count, num_warmups
        self._most_tokens, self._run_id = most_tokens, run_id
        self.num_left_out = 0

    @property
    def total(self) -> int:
        return self._count + self._num_warmups

    def __iter__(self) -> Iterator[Conversation]:
        self.num_left_out = 0
        tokens, choices = _generator(self._seed, _TOKENS), _generator(self._seed, _CHOICES)
        made = 0
        for asked in self._source.asked(self._seed, self._mix):
            if made >= self.total:
                return
            fitting = [one for one in asked.turns if self._fits(one)]
            self.num_left_out += len(asked.turns) - len(fitting)
            fitting = fitting[: self.total - made]
            if not fitting:
                continue
            turns = tuple(self._turn(made + place, one, place, tokens, choices) for place, one in enumerate(fitting))
            session = f"load-{self._run_id}-{made}" if len(turns) > 1 else ""
            yield Conversation(asked.arrival_s, turns, session, made < self._num_warmups)
            made += len(turns)

    def _fits(self, row: TraceRow) -> bool:
        total = (row.input_tokens or 0) + (row.output_tokens or 0)
        return self._most_tokens is None or total <= self._most_tokens

    def _turn(
        self, index: int, row: TraceRow, place: int, tokens: np.random.Generator, choices: np.random.Generator
    ) -> Turn:
        names, weights = list(self._mix.recipes), np.array(list(self._mix.recipes.values()))
        recipe = row.recipe or names[int(choices.choice(len(names), p=weights / weights.sum()))]
        cancelled = choices.random() < self._mix.cancel_rate
        cancel_after_s = self._mix.cancel_after_s.draw(choices) if cancelled else None
        think_s = self._mix.think_s.draw(choices) if place else 0.0
        assert row.output_tokens is not None
        prompt = self._prompt(row, tokens) if row.prompt is None else row.prompt
        return Turn(index, prompt, row.input_tokens, row.output_tokens, recipe, think_s, cancel_after_s)

    def _prompt(self, row: TraceRow, tokens: np.random.Generator) -> Prompt:
        assert self._vocabulary is not None and row.input_tokens is not None
        block = self._source.block_tokens
        parts = [
            self._vocabulary.draw(block, np.random.default_rng([self._seed, _BLOCKS, hash_id]))
            for hash_id in row.block_ids
        ]
        missing = row.input_tokens - block * len(parts)
        if missing > 0:
            parts.append(self._vocabulary.draw(missing, tokens))
        ids = [index for part in parts for index in part.tolist()][: row.input_tokens]
        return self._vocabulary.text(ids) if self._mix.text else tuple(ids)


@dataclass(frozen=True, slots=True)
class Asked:
    """A conversation before its tokens are drawn."""

    arrival_s: float
    turns: tuple[TraceRow, ...]


@dataclass(frozen=True)
class Lengths:
    """Requests whose times and lengths are drawn.

    Attributes:
        burstiness: as `arrival_times` has it.
        prefix_tokens: of a prompt, shared with others of the same prefix.
        num_prefixes: how many different ones there are.
    """

    rate: RateProfile
    burstiness: float
    input_tokens: Distribution
    output_tokens: Distribution
    prefix_tokens: int = 0
    num_prefixes: int = 1

    @property
    def block_tokens(self) -> int:
        return self.prefix_tokens

    def asked(self, seed: int, mix: Mix) -> Iterator[Asked]:
        lengths, prefixes = _generator(seed, _LENGTHS), _generator(seed, _PREFIXES)
        for arrival_s in arrival_times(self.rate, self.burstiness, _generator(seed, _ARRIVALS)):
            turns = []
            for place in range(draw_tokens(mix.turns, lengths)):
                own = draw_tokens(self.input_tokens, lengths)
                # later turns bring what is new alone
                shared = self.prefix_tokens if place == 0 else 0
                blocks = (int(prefixes.integers(self.num_prefixes)),) if shared else ()
                turns.append(TraceRow(None, shared + own, draw_tokens(self.output_tokens, lengths), blocks))
            yield Asked(arrival_s, tuple(turns))


@dataclass(frozen=True)
class Trace:
    """Recorded requests, scaled; one after the other where they have no times, as `rate` has it.

    Attributes:
        speed: how much faster than recorded.
        keep: share of requests that are kept, drawn by the seed; the shape of the load stays.
        length_scale: of prompts, answers and shared blocks.
        output_tokens: of rows that do not say.
    """

    rows: Sequence[TraceRow]
    rate: RateProfile
    burstiness: float
    output_tokens: Distribution
    speed: float = 1.0
    keep: float = 1.0
    length_scale: float = 1.0

    @property
    def block_tokens(self) -> int:
        return max(1, round(MOONCAKE_BLOCK * self.length_scale))

    def asked(self, seed: int, mix: Mix) -> Iterator[Asked]:
        lengths, keep = _generator(seed, _LENGTHS), _generator(seed, _KEEP)
        kept = (row for row in self.rows if self.keep >= 1 or keep.random() < self.keep)
        times = arrival_times(self.rate, self.burstiness, _generator(seed, _ARRIVALS))
        for row in kept:
            arrival_s = next(times) if row.time_s is None else row.time_s / self.speed
            output: int | None = draw_tokens(self.output_tokens, lengths)
            if row.output_tokens is not None:
                output = row.output_tokens if row.prompt is not None else self._scaled(row.output_tokens)
            yield Asked(
                arrival_s,
                (TraceRow(None, self._scaled(row.input_tokens), output, row.block_ids, row.prompt, row.recipe),),
            )

    def _scaled(self, num_tokens: int | None) -> int | None:
        return None if num_tokens is None else max(1, round(num_tokens * self.length_scale))


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, stream])


def mean_rate(workload: Workload) -> float | None:
    """Requests a second that are meant, over the counted ones; None for fewer than two, or all at once."""
    times = [one.arrival_s for one in islice(iter(workload), 100_000) for _ in one.turns if not one.warm_up]
    span_s = times[-1] - times[0] if len(times) > 1 else 0.0
    return (len(times) - 1) / span_s if span_s > 0 else None
