"""Retrieval: which sealed chunks a decode step attends to, and what it scores to find them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels.landmarks import chunk_means, min_cosine_outliers, score_landmarks, select_chunks
from .codecs import Tensors, owned
from .slots import ChunkLandmarks


class Choice(NamedTuple):
    """What rows attend to.

    Attributes:
        scores: float32 [Q, H, n] of all chunks.
        chunks: int64 [Q, Hkv, K].
        valid: bool of that shape, or None where all of them count.
    """

    scores: Tensor
    chunks: Tensor
    valid: Tensor | None

    def chosen_scores(self) -> Tensor:
        """The scores, -inf of chunks that were not chosen for a head."""
        num_rows, num_heads, count = self.scores.shape
        num_kv_heads = self.chunks.shape[1]
        counts = torch.ones_like(self.chunks) if self.valid is None else self.valid.long()
        times = self.chunks.new_zeros(num_rows, num_kv_heads, count).scatter_add_(-1, self.chunks, counts)
        return self.scores.masked_fill((times == 0).repeat_interleave(num_heads // num_kv_heads, dim=1), -torch.inf)


class Retrieval(Protocol):
    """Scores chunks for a query."""

    def outliers(self, k: Tensor) -> Tensor | None:
        """Chunks of the sealed post-RoPE prompt keys [n * chunk, Hkv, d] that stay exact: int64 [O, Hkv] or None."""
        ...

    def summarize(self, k: Tensor) -> dict[str, Tensor]:
        """What is scored instead of decoded post-RoPE keys [n * chunk, Hkv, d]; axis 0 is chunks."""
        ...

    def score(self, q: Tensor, summary: Tensors) -> Tensor:
        """q [Q, H, d] -> float32 [Q, H, n]."""
        ...

    def select(
        self, scores: Tensor, num_kv_heads: int, hidden: Tensor | None, num_tokens: int
    ) -> tuple[Tensor, Tensor | None]:
        """scores [Q, H, n], hidden bool [Q, Hkv, n] or None -> chunks int64 [Q, Hkv, K] and which of them are valid,
        bool of that shape, or None when all are."""
        ...


class Landmarks:
    """Means of chunks, in bfloat16 or in int8 with a float16 scale each."""

    def __init__(self, spec: ChunkLandmarks) -> None:
        assert spec.chunk is not None and spec.outliers is not None, "resolved"
        self._spec, self._chunk, self._outliers = spec, spec.chunk, spec.outliers

    def outliers(self, k: Tensor) -> Tensor | None:
        """See `Retrieval`."""
        if not self._outliers or not len(k):
            return None
        return min_cosine_outliers(k, self._chunk, self._outliers)

    def summarize(self, k: Tensor) -> dict[str, Tensor]:
        """See `Retrieval`."""
        means = chunk_means(k, self._chunk)
        if self._spec.landmark_bits == 16:
            return {"means": owned(means, torch.bfloat16)}
        # the scale is rounded to float16 first, and away from 0, so that codes fit what they are multiplied by
        scale = (means.abs().amax(dim=-1) * ((1 + 2.0**-10) / 127)).clamp(2.0**-24, 65504.0).half()
        codes = (means / scale.float()[..., None]).round_().clamp_(-127, 127)
        return {"codes": codes.to(torch.int8), "scale": scale}

    def score(self, q: Tensor, summary: Tensors) -> Tensor:
        """See `Retrieval`."""
        if self._spec.landmark_bits == 16:
            return score_landmarks(q, summary["means"])
        return score_landmarks(q, summary["codes"], summary["scale"])

    def select(
        self, scores: Tensor, num_kv_heads: int, hidden: Tensor | None, num_tokens: int
    ) -> tuple[Tensor, Tensor | None]:
        """See `Retrieval`."""
        return select_chunks(scores, num_kv_heads, self._spec.selected_chunks(num_tokens), hidden)
