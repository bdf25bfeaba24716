"""What became of a sample under a recipe, and how its answers are judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from .suites import Case


@dataclass(frozen=True)
class Hit:
    """A prompt whose beginning was found, beside the same prompt run whole.

    Attributes:
        cached_tokens: of it, that were found.
        prompt_tokens: of all of it.
        flops, miss_flops: operations of prefill, and of the prompt that ran whole.
        same: whether the likeliest tokens are those of the prompt that ran whole.
    """

    cached_tokens: int
    prompt_tokens: int
    flops: float
    miss_flops: float
    same: bool


@dataclass(frozen=True)
class Outcome:
    """What became of one sample under one recipe.

    Attributes:
        score: see `suites.Rule`; the mean of the turns'.
        turns: score of each turn.
        payload_bytes: bytes of the frames from prefill to decode.
        resident_bytes: bytes of the prompt's cache on decode, before the answer.
        prefill_flops: operations that the engine counted for the prompt.
        cached_tokens: of the prompt, that were not run.
        fallback: why `exact` ran instead, or None.
        predicted: the likeliest token for every token of the answers, one turn after another; empty under `nll`.
        hits: of each further prompt over the same document, whose scores are `turns` from the second on.
    """

    score: float
    turns: tuple[float, ...]
    payload_bytes: int
    resident_bytes: int
    prefill_flops: float
    cached_tokens: int
    fallback: str | None
    predicted: tuple[int, ...]
    hits: tuple[Hit, ...] = ()


def turn_scores(case: Case, predicted: Sequence[int]) -> tuple[float, ...]:
    """The score of each turn, by the likeliest token at each place of its answer, one answer after another."""
    scores, done = [], 0
    for begin, end in case.answers:
        said, wanted = predicted[done : done + end - begin], case.following_ids[begin:end]
        right = [token == expected for token, expected in zip(said, wanted, strict=True)]
        scores.append(float(all(right)) if case.rule == "all" else sum(right) / len(right))
        done += end - begin
    assert done == len(predicted), "a token for each place of the answers"
    return tuple(scores)


def score_of(case: Case, predicted: Sequence[int]) -> float:
    """The mean of the turns' scores; see `turn_scores`."""
    return fmean(turn_scores(case, predicted))
