"""One landmark a chunk of keys: building, the chunks it describes badly, scoring, choosing."""

from __future__ import annotations

from .op import chunk_means, min_cosine_outliers, score_landmarks, select_chunks

__all__ = ["chunk_means", "min_cosine_outliers", "score_landmarks", "select_chunks"]
