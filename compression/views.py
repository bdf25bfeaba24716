"""A layer's cache as the batched decode kernels read it: regions of packed rows, named by where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..kernels.step_attention import Chunks, Layout, Packed, RecallView, Region, Shift, View
from ..kernels.step_attention import Tail as TailView
from .layout import sinks_are_unrotated
from .rooms import Numbers, seal_key
from .segment import Kit, Segment, Tail

if TYPE_CHECKING:
    from .host_values import HotChunks
    from .layer_cache import LayerCache
    from .recall import Recall
    from .sealing import Sealing


def layer_view(layer: LayerCache, recalled: Region | None = None) -> View:
    """What queries at positions from the tail's begin on attend to. Valid until rows are sealed or the tail moves.

    Args:
        recalled: rows that came back, where there may be some.
    """
    kit, regions = layer.kit, [] if recalled is None else [recalled]
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


def recalled_views(layers: Sequence[LayerCache], recall: Recall) -> list[View]:
    """What rows that came back attend to, of every layer, and where they go: nothing in those up to T. They are of the
    prompt, so they see neither the tail nor blocks that were sealed from it."""
    views, chunk = [], layers[0].kit.recipe.retrieval.chunk
    for number, layer in enumerate(layers):
        region = recall.region(number)
        if region is None:
            nowhere = layer.tail.room()
            views.append(View((), None, chunk, layer.window, TailView(*nowhere, -1, False)))
            continue
        regions = [region]
        if layer.sinks is not None:
            regions.append(_sinks(layer))
        if layer.outliers:
            regions.append(_outliers(layer))
        chunks = None if layer.base is None else _chunks(layer, [layer.base], keeps=False)
        tail = TailView(region.keys.tensors[0], region.values.tensors[0], 0, False)
        views.append(View(tuple(regions), chunks, chunk, layer.window, tail))
    return views


def recall_view(layers: Sequence[LayerCache], recall: Recall) -> RecallView:
    """What a step may bring back, as kernels read and change it."""
    hidden, plan, own = recall.hidden, recall.plan, recall.chunks.on_device
    assert own is not None, "reserved before"
    return RecallView(
        plan.layer,
        plan.chunk,
        plan.a_row,
        plan.capacity,
        own.state,
        own.ids,
        own.here,
        hidden.chunks,
        hidden.first,
        hidden.packed,
        None if hidden.host is None else hidden.host.pages,
        0 if hidden.host is None else hidden.host.place.page_chunks,
        hidden.codec.bits,
        hidden.codec.group,
        hidden.width,
        recalled_views(layers, recall),
    )


def recalls_in_steps(layers: Sequence[LayerCache], recall: Recall) -> bool:
    """Whether kernels bring rows back within a step. They choose by what chunks were chosen for, and a hot set is no
    place for several rows of a sequence."""
    deep = layers[recall.plan.layer + 1 :]
    return bool(deep) and layers[0].kit.retrieval is not None and not any(layer.hot is not None for layer in deep)


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
    return Region(dense(k), dense(v), len(k), 0, layer.outlier_index)


def _tail(tail: Tail, unrotated: bool) -> Region:
    k, v = tail.room()
    return Region(dense(k), dense(v), len(k), tail.begin, rotates=unrotated, grows=True)


def _seals_alike(layer: LayerCache) -> bool:
    """Whether blocks get the dtypes of the prompt's rows: those in the model's own are sealed in that of the tail."""
    assert layer.base is not None and layer.tail.dtype is not None
    region, key = _region(layer.base, layer.hot), seal_key(layer.kit, layer.grown_tier, layer.tail.dtype)
    own = (region.keys.layout.dtype, region.values.layout.dtype)
    return key is None or own == (key.keys.dtype, key.values.dtype)


def _chunks(layer: LayerCache, segments: Sequence[Segment], keeps: bool = True) -> Chunks:
    """Without `keeps` every row chooses for itself."""
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
        kept=None if layer.kept is None or not keeps else layer.kept.view(),
    )


@dataclass(frozen=True)
class FixedPlaces:
    """What sealing does not change in what `layer_view` shows of all layers.

    Attributes:
        tails, sinks: int64 [L], addresses of the keys; sinks only where their positions move with the tails'.
        num_sinks: rows.
        bases: int64 [L], rows of the prompt's segment, of which parts are read; or None.
    """

    tails: Numbers
    sinks: Numbers | None
    num_sinks: int
    bases: Numbers | None

    @classmethod
    def of(cls, kit: Kit, layers: Sequence[LayerCache]) -> FixedPlaces | None:
        """None where sealing changes more than `Shift` says: there is no prompt's segment, it has so few rows that all
        are chosen, or blocks are packed otherwise."""
        recipe, bases = kit.recipe, None
        if kit.retrieval is not None:
            bases = np.array([0 if layer.base is None else layer.base.num_rows for layer in layers])
            chosen = recipe.retrieval.selected_chunks(kit.num_prompt_tokens) + recipe.retrieval.outliers
            if bases.min() < chosen * recipe.retrieval.chunk or any(layer.demoted is not None for layer in layers):
                return None
            if not _seals_alike(layers[0]):
                return None
        tails = np.array([layer.tail.room_addresses()[0] for layer in layers])
        sinks = [layer.sinks[0] for layer in layers if layer.sinks is not None]
        if not sinks or not sinks_are_unrotated(recipe):
            return cls(tails, None, 0, bases)
        return cls(tails, np.array([k.data_ptr() for k in sinks]), len(sinks[0]), bases)

    def shift(self, layer: LayerCache, sealing: Sealing | None) -> Shift | None:
        """What the tables say now; None where they are to be made anew. `layer` is any of them."""
        kit, first = layer.kit, layer.tail.begin
        if kit.recipe.budget.fixed:
            return Shift(self.tails, first, self.sinks, first - self.num_sinks)
        if sealing is None or not sealing.num_rows or sealing.places is None:
            return None
        places, rows, begin, chunk = sealing.places, sealing.num_rows, sealing.begin, kit.recipe.retrieval.chunk
        if self.bases is None:
            return Shift(self.tails, first, num_grown=rows, grown=places[:, 0])
        starts = np.full((len(places), 1), begin)
        counts = np.broadcast_to([rows // chunk, begin // chunk], (len(places), 2))
        return Shift(
            self.tails,
            first,
            num_grown=rows,
            second=np.concatenate((starts, places[:, :6]), axis=1),
            choices=np.concatenate((places[:, 6:], counts), axis=1),
            most_chunks=int(self.bases.max() + rows) // chunk,
        )
