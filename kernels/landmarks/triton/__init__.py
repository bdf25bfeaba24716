"""Landmarks are scored and chunks chosen by compiled kernels; building landmarks runs as the reference does."""

from __future__ import annotations

from ..reference import chunk_means, min_cosine_outliers
from .choose import select_chunks
from .score import score_landmarks

__all__ = ["chunk_means", "min_cosine_outliers", "score_landmarks", "select_chunks"]
