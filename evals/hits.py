"""Judges prompts that begin alike: the first one fills what they share, the others find it, and each of those also runs
whole, by an engine that shares nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from statistics import fmean
from typing import Any

from ..compression.recipe import ModelShape, Recipe
from ..errors import InvalidRequest
from ..models.model import Model
from .outcomes import Hit, Outcome
from .scoring import CHUNK_TOKENS, Scorer
from .suites import Case


class HitScorer:
    """See `Scorer`; cases have further prompts `apart`.

    Args:
        chunk_tokens: prompt rows of a work item of prefill, and of a chunk that is shared; None = as a service has it.
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
        chunk = chunk_tokens or CHUNK_TOKENS  # longer ones, as other suites take on a GPU, would find less, or nothing
        self._plain = Scorer(model, profile, recipes, chunk)
        self.shape: ModelShape = self._plain.shape
        self._sharing = Scorer(
            model, profile, recipes, chunk, _kept_bytes(self.shape, model, max_tokens, chunk) * len(recipes)
        )
        self._documents = count()

    def score(self, cases: Sequence[Case]) -> list[dict[str, Outcome]]:
        """See `Scorer.score`; the turns are the prompts of a case, and their `hits` those from the second on."""
        return [self._score(case, f"document {next(self._documents)}") for case in cases]

    def _score(self, case: Case, tenant: str) -> dict[str, Outcome]:
        (first,) = self._sharing.score([replace(case, apart=())], tenant)
        hits = self._sharing.score(case.apart, tenant)
        if not any(hit.cached_tokens for row in hits for hit in row.values()):
            raise InvalidRequest("--chunk-tokens", "is more than the prompts have in common", "less")
        misses = self._plain.score(case.apart)
        return {
            label: _joined(one, case, [row[label] for row in hits], [row[label] for row in misses])
            for label, one in first.items()
        }


def _kept_bytes(shape: ModelShape, model: Model, num_tokens: int, chunk: int) -> int:
    """The most that is kept of a document: keys, values and hidden rows, and a float for each row before each chunk in
    each layer and KV head."""
    rows = num_tokens * (shape.bf16_kv_bytes(1) // 2 + model.config.hidden_size) * model.dtype.itemsize
    num_chunks = num_tokens // chunk + 1
    masses = 4 * shape.num_layers * shape.num_kv_heads * chunk * num_chunks * (num_chunks + 1) // 2
    return rows + masses + (1 << 20)  # largest queries, and what is lost to alignment


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
