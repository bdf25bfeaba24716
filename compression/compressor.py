"""A resolved recipe at work during prefill: finished layers in, encoded layers and the rows that go on out."""

from __future__ import annotations

import torch
from torch import Tensor

from .codecs import owned
from .interfaces import Compressor, EncodedLayer, LayerObs, Part, Rope
from .layout import LayerLayout, layer_layout, tail_is_unrotated
from .spec import ModelShape, Recipe


def make_compressor(recipe: Recipe, shape: ModelShape, rope: Rope) -> Compressor:
    """A compressor for one prompt.

    Args:
        recipe: resolved for the model and the prompt's length.
        rope: the prompt's rotation.
    """
    return RecipeCompressor(recipe, shape)


class RecipeCompressor:
    """Encodes each layer as `layout.layer_specs` says. Holds nothing between layers."""

    def __init__(self, recipe: Recipe, shape: ModelShape) -> None:
        self.recipe = recipe
        self._shape = shape
        self._propagation = recipe.propagation.build(recipe.retrieval.chunk, recipe.window.sinks)
        self._scorer = recipe.scorer.build()
        self._budget = recipe.budget.build()
        self._key_codec = recipe.key_codec.build("key")
        self._value_codec = recipe.value_codec.build("value")
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
        tensors: dict[Part, dict[str, Tensor]] = {}
        if at.num_sealed:
            tensors = self._encode_sealed(obs, at)
        tail = self._encode_ends(obs, at)
        if tail:
            tensors[Part.TAIL] = tail
        selected = self._propagation.select(obs, self._shape.layer_windows[obs.layer])
        return EncodedLayer(obs.layer, tensors), selected

    def _encode_sealed(self, obs: LayerObs, at: LayerLayout) -> dict[Part, dict[str, Tensor]]:
        kept = self._kept_rows(obs, at)
        keys = obs.k_pre if self.recipe.key_codec.domain == "pre_rope" else obs.k
        keys = _take(keys, kept)
        basis = self._key_codec.fit(keys)
        tensors: dict[Part, dict[str, Tensor]] = {Part.BASIS: basis} if basis else {}
        tensors[Part.KEYS] = self._key_codec.encode(keys, basis)
        tensors[Part.VALUES] = self._value_codec.encode(_take(obs.v, kept), {})
        if at.per_head:
            tensors[Part.POSITIONS] = {"rows": owned(obs.positions[kept], torch.int32)}
        elif not at.contiguous:
            chunk = self.recipe.retrieval.chunk
            tensors[Part.POSITIONS] = {"chunks": owned(obs.positions[kept][::chunk] // chunk, torch.int32)}
        outliers = None if self._retrieval is None else self._retrieval.outliers(_take(obs.k, kept))
        if outliers is not None:
            tensors[Part.OUTLIERS] = self._encode_outliers(obs, at, outliers)
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

    def _encode_ends(self, obs: LayerObs, at: LayerLayout) -> dict[str, Tensor]:
        dtype = self._exact_dtype(obs.k)
        tail_keys = obs.k_pre if tail_is_unrotated(self.recipe) else obs.k
        tail_begin = at.num_rows - at.num_tail
        ends = {
            "sink_k": obs.k[: at.num_sinks],
            "sink_v": obs.v[: at.num_sinks],
            "k": tail_keys[tail_begin:],
            "v": obs.v[tail_begin:],
        }
        return {name: owned(rows, dtype) for name, rows in ends.items() if len(rows)}

    def _exact_dtype(self, native: Tensor) -> torch.dtype:
        return torch.bfloat16 if self.recipe.window.dtype == "bfloat16" else native.dtype


def _take(x: Tensor, rows: Tensor | slice) -> Tensor:
    """Rows of x [n, Hkv, d], the same for all heads (slice) or one set a head ([m, Hkv])."""
    if isinstance(rows, slice):
        return x[rows]
    return x[rows, torch.arange(x.shape[1], device=x.device)]
