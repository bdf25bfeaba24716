"""A resolved recipe at work during prefill: finished layers in, encoded layers and the rows that go on out."""

from __future__ import annotations

import torch
from torch import Tensor

from .codecs import compact, owned
from .interfaces import Compressor, EncodedLayer, LayerObs, Part
from .layout import LayerLayout, layer_layout, tail_is_unrotated
from .spec import ModelShape, Recipe

# in which a layer's parts are sent, as in `layout.layer_specs`
_ORDER = (Part.BASIS, Part.KEYS, Part.VALUES, Part.POSITIONS, Part.OUTLIERS, Part.TAIL)


def make_compressor(recipe: Recipe, shape: ModelShape) -> Compressor:
    """A compressor for one prompt.

    Args:
        recipe: resolved for the model and the prompt's length.
    """
    return RecipeCompressor(recipe, shape)


class RecipeCompressor:
    """Encodes each layer as `layout.layer_specs` says. Holds nothing between layers."""

    def __init__(self, recipe: Recipe, shape: ModelShape) -> None:
        self.recipe = recipe
        self.wants_unrotated_keys = recipe.key_codec.domain == "pre_rope"
        self._shape = shape
        self._propagation = recipe.propagation.build(recipe.retrieval.chunk, recipe.window.sinks)
        self._scorer = recipe.scorer.build()
        self._budget = recipe.budget.build()
        self._key_codec = recipe.key_codec.build()
        self._value_codec = recipe.value_codec.build()
        self._retrieval = recipe.retrieval.build()

    def query_window(self, layer: int) -> int:
        """See `Compressor`."""
        wanted = self._propagation.query_window(layer)
        if self._budget is not None and self._scorer is not None:
            wanted = max(wanted, self._scorer.query_window)
        return wanted

    def finish_layer(self, obs: LayerObs) -> tuple[EncodedLayer, Tensor | None]:
        """See `Compressor`."""
        at = layer_layout(self.recipe, obs.num_prompt_tokens, obs.layer)
        assert len(obs.positions) == at.num_rows, f"layer {obs.layer} got {len(obs.positions)} of {at.num_rows} rows"
        selected = self._propagation.select(obs, self._shape.layer_windows[obs.layer])
        tensors = self._encode_sealed(obs, at) if at.num_sealed else self._encode_ends(obs, at)
        return EncodedLayer(obs.layer, {part: tensors[part] for part in _ORDER if tensors.get(part)}), selected

    def _encode_sealed(self, obs: LayerObs, at: LayerLayout) -> dict[Part, dict[str, Tensor]]:
        """The whole layer: first what needs all keys, then the packed keys, and when those are gone the values."""
        kept = self._kept_rows(obs, at)
        tensors = self._encode_ends(obs, at)
        if at.per_head:
            tensors[Part.POSITIONS] = {"rows": owned(obs.positions[kept], torch.int32)}
        elif not at.contiguous:
            chunk = self.recipe.retrieval.chunk
            tensors[Part.POSITIONS] = {"chunks": owned(obs.positions[kept][::chunk] // chunk, torch.int32)}
        outliers = None if self._retrieval is None else self._retrieval.outliers(_take(obs.k, kept))
        if outliers is not None:
            tensors[Part.OUTLIERS] = self._encode_outliers(obs, at, outliers)
        keys = _take(obs.k_pre if self.wants_unrotated_keys else obs.k, kept)
        obs.release_keys()
        tensors[Part.BASIS] = self._key_codec.fit(keys)
        tensors[Part.KEYS] = self._key_codec.encode(keys, tensors[Part.BASIS])
        del keys
        tensors[Part.VALUES] = self._value_codec.encode(_take(obs.v, kept), {})
        return tensors

    def _kept_rows(self, obs: LayerObs, at: LayerLayout) -> Tensor | slice:
        """Rows of obs that are sealed: one run for all heads, or int64 [num_sealed, Hkv]."""
        candidates = slice(at.num_sinks, at.num_rows - at.num_tail)
        if not at.per_head:
            return candidates
        assert self._budget is not None and self._scorer is not None
        scores = self._scorer.score(obs, self._shape.layer_windows[obs.layer])
        return self._budget.keep(scores[:, candidates], at.num_sealed).T + at.num_sinks

    def _encode_outliers(self, obs: LayerObs, at: LayerLayout, outliers: Tensor) -> dict[str, Tensor]:
        chunk = self.recipe.retrieval.chunk
        within = torch.arange(chunk, device=outliers.device)[None, :, None]
        rows = (outliers[:, None] * chunk + within).flatten(0, 1) + at.num_sinks
        dtype = self._exact_dtype(obs.k)
        return {
            "chunks": owned(outliers, torch.int32),
            "k": owned(_take(obs.k, rows), dtype),
            "v": owned(_take(obs.v, rows), dtype),
        }

    def _encode_ends(self, obs: LayerObs, at: LayerLayout) -> dict[Part, dict[str, Tensor]]:
        dtype = self._exact_dtype(obs.k)
        tail_keys = obs.k_pre if tail_is_unrotated(self.recipe) else obs.k
        tail_begin = at.num_rows - at.num_tail
        ends = {
            "sink_k": obs.k[: at.num_sinks],
            "sink_v": obs.v[: at.num_sinks],
            "k": tail_keys[tail_begin:],
            "v": obs.v[tail_begin:],
        }
        return {Part.TAIL: {name: compact(rows.to(dtype)) for name, rows in ends.items() if len(rows)}}

    def _exact_dtype(self, native: Tensor) -> torch.dtype:
        return torch.bfloat16 if self.recipe.window.dtype == "bfloat16" else native.dtype


def _take(x: Tensor, rows: Tensor | slice) -> Tensor:
    """Rows of x [n, Hkv, d], the same for all heads (slice) or one set a head ([m, Hkv])."""
    if isinstance(rows, slice):
        return x[rows]
    return x[rows, torch.arange(x.shape[1], device=x.device)]
