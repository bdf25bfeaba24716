"""A layer's cache as the batched decode kernels read it: regions of packed rows, named by where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.step_attention import Chunks, Layout, Packed, Region, View
from ..kernels.step_attention import Tail as TailView
from .layout import sinks_are_unrotated
from .segment import Segment, Tail

if TYPE_CHECKING:
    from .host_values import HotChunks
    from .layer_cache import LayerCache


def layer_view(layer: LayerCache) -> View:
    """What queries at positions from the tail's begin on attend to. Valid until rows are sealed or the tail moves."""
    kit, regions = layer.kit, []
    if layer.sinks is not None:
        regions.append(_sinks(layer))
    segments = [segment for segment in (layer.base, layer.demoted, layer.grown) if segment is not None]
    chunks = None
    if kit.retrieval is None:
        regions += [_region(segment) for segment in segments]
    elif segments:
        chunks = _chunks(layer, segments)
        if layer.outliers:
            regions.append(_outliers(layer))
    regions.append(_tail(layer.tail, layer.tail_is_unrotated))
    k, v = layer.tail.room()
    return View(
        regions=tuple(regions),
        chunks=chunks,
        chunk=kit.recipe.retrieval.chunk,
        window=layer.window,
        tail=TailView(k, v, layer.tail.begin, layer.tail_is_unrotated),
    )


def dense(rows: Tensor) -> Packed:
    """Rows [n, Hkv, d] as they are."""
    return Packed(Layout("dense", dtype=rows.dtype), (rows,))


def _region(segment: Segment, hot: HotChunks | None = None) -> Region:
    return Region(
        segment.key_reader.packed(),
        segment.value_reader.packed() if hot is None else hot.packed,
        segment.num_rows,
        segment.begin,
        segment.index,
        rotates=segment.rotates,
    )


def _sinks(layer: LayerCache) -> Region:
    assert layer.sinks is not None
    k, v = layer.sinks
    moved = sinks_are_unrotated(layer.kit.recipe)
    return Region(dense(k), dense(v), len(k), layer.tail.begin - len(k) if moved else 0, rotates=moved)


def _outliers(layer: LayerCache) -> Region:
    k, v = layer.outliers["k"], layer.outliers["v"]
    # they are rotated already, so where they lie matters to a sliding window only
    return Region(dense(k), dense(v), len(k), 0, None if layer.window is None else layer.outlier_positions())


def _tail(tail: Tail, unrotated: bool) -> Region:
    k, v = tail.room()
    return Region(dense(k), dense(v), len(k), tail.begin, rotates=unrotated, grows=True)


def _chunks(layer: LayerCache, segments: Sequence[Segment]) -> Chunks:
    kit = layer.kit
    landmarks, scales = [], []
    for segment in segments:
        landmarks.append(segment.summary.get("means", segment.summary.get("codes", torch.empty(0))))
        if "scale" in segment.summary:
            scales.append(segment.summary["scale"])
    regions = [_region(segment, layer.hot if segment is layer.base else None) for segment in segments]
    return Chunks(
        segments=tuple(regions),
        landmarks=tuple(landmarks),
        scales=tuple(scales),
        num_chosen=kit.recipe.retrieval.selected_chunks(kit.num_prompt_tokens),
        hidden=layer.outliers.get("chunks"),
        hot=None if layer.hot is None else layer.hot.view(),
        kept=None if layer.kept is None else layer.kept.view(),
    )
