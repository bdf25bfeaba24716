"""Judges prompts that begin alike: the first one fills what they share, the others find it, and each of those also runs
whole, by an engine that shares nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from statistics import fmean
from typing import Any

from ..compression.recipe import ModelShape, Recipe
from ..models.model import Model
from .outcomes import Hit, Outcome
from .scoring import Scorer
from .suites import Case

ROOM = 1.5  # times the keys and values of a document: hidden rows and attention masses lie with them


class HitScorer:
    """See `Scorer`; cases have further prompts `apart`.

    Args:
        max_tokens: of a prompt. What is shared has room for one of each recipe, so that all are found.
    """

    def __init__(
        self,
        model: Model,
        profile: Mapping[str, Any],
        recipes: Mapping[str, Recipe],
        chunk_tokens: int | None,
        max_tokens: int,
    ) -> None:
        self._plain = Scorer(model, profile, recipes, chunk_tokens)
        self.shape: ModelShape = self._plain.shape
        a_document = self.shape.bf16_kv_bytes(max_tokens) * model.dtype.itemsize // 2
        self._sharing = Scorer(model, profile, recipes, chunk_tokens, int(ROOM * a_document) * len(recipes))
        self._documents = count()

    def score(self, cases: Sequence[Case]) -> list[dict[str, Outcome]]:
        """See `Scorer.score`; the turns are the prompts of a case, and their `hits` those from the second on."""
        return [self._score(case, f"document {next(self._documents)}") for case in cases]

    def _score(self, case: Case, tenant: str) -> dict[str, Outcome]:
        (first,) = self._sharing.score([replace(case, apart=())], tenant)
        hits = self._sharing.score(case.apart, tenant)
        misses = self._plain.score(case.apart)
        return {
            label: _joined(one, case, [row[label] for row in hits], [row[label] for row in misses])
            for label, one in first.items()
        }


def _joined(first: Outcome, case: Case, hits: Sequence[Outcome], misses: Sequence[Outcome]) -> Outcome:
    turns = (first.score, *(hit.score for hit in hits))
    beside = tuple(
        Hit(
            hit.cached_tokens,
            len(prompt.prompt_ids),
            hit.prefill_flops,
            miss.prefill_flops,
            hit.predicted == miss.predicted,
        )
        for prompt, hit, miss in zip(case.apart, hits, misses, strict=True)
    )
    return replace(first, score=fmean(turns), turns=turns, hits=beside)
