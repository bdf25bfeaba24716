"""Checks and dispatch of the landmark ops (ShadowKV, arXiv 2410.21465 §4)."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import REFERENCE, TRITON, Modules, backend, require

_IMPLEMENTATIONS = Modules(__package__, REFERENCE, TRITON)


def chunk_means(k: Tensor, chunk: int) -> Tensor:
    """Mean of every chunk's post-RoPE keys: k [n * chunk, Hkv, d] -> float32 [n, Hkv, d].

    Raises:
        ValueError: rows that are no whole chunks.
    """
    require(k.shape[0] % chunk == 0, f"{k.shape[0]} rows are no whole chunks of {chunk}")
    return backend(k.device, _IMPLEMENTATIONS).chunk_means(k, chunk)


def min_cosine_outliers(k: Tensor, chunk: int, num_outliers: int) -> Tensor:
    """The chunks of each KV head whose mean has the least cosine with one of their keys.

    Args:
        k: [n * chunk, Hkv, d], post-RoPE.

    Returns:
        int64 [min(num_outliers, n), Hkv], ascending; ties go to the lower chunk.

    Raises:
        ValueError: rows that are no whole chunks.
    """
    require(k.shape[0] % chunk == 0, f"{k.shape[0]} rows are no whole chunks of {chunk}")
    return backend(k.device, _IMPLEMENTATIONS).min_cosine_outliers(k, chunk, min(num_outliers, k.shape[0] // chunk))


def score_landmarks(q: Tensor, landmarks: Tensor, scale: Tensor | None = None) -> Tensor:
    """q . landmark / sqrt(d).

    Args:
        q: [Q, H, d], post-RoPE.
        landmarks: [n, Hkv, d], floating point or int8.
        scale: [n, Hkv], by which int8 landmarks are multiplied.

    Returns:
        float32 [Q, H, n]. A row's numbers do not depend on the other rows.

    Raises:
        ValueError: shapes that do not fit together.
    """
    require(q.shape[2] == landmarks.shape[2], f"q {tuple(q.shape)} does not fit landmarks {tuple(landmarks.shape)}")
    require(q.shape[1] % landmarks.shape[1] == 0, f"{q.shape[1]} heads, {landmarks.shape[1]} KV heads")
    require(scale is None or scale.shape == landmarks.shape[:2], "scale must be [n, Hkv]")
    return backend(q.device, _IMPLEMENTATIONS).score_landmarks(q, landmarks, scale)


def select_chunks(
    scores: Tensor, num_kv_heads: int, num_chunks: int, hidden: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Softmax over the chunks per query head, maximum over the GQA group, the best chunks per KV head.

    Args:
        scores: float32 [Q, H, n].
        num_chunks: how many to choose.
        hidden: bool [Q or 1, Hkv, n], chunks that must not be chosen, or None.

    Returns:
        chunks: int64 [Q, Hkv, min(num_chunks, n)], ascending among the valid ones; ties go to the lower chunk.
        valid: bool of that shape; False where fewer could be chosen (those entries hold some hidden chunk). None when
            nothing was hidden.

    Raises:
        ValueError: shapes that do not fit together.
    """
    require(scores.shape[1] % num_kv_heads == 0, f"{scores.shape[1]} heads, {num_kv_heads} KV heads")
    require(hidden is None or hidden.shape[1:] == (num_kv_heads, scores.shape[2]), "hidden must be [Q or 1, Hkv, n]")
    return backend(scores.device, _IMPLEMENTATIONS).select_chunks(
        scores, num_kv_heads, min(num_chunks, scores.shape[2]), hidden
    )
