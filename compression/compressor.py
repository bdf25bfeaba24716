"""A resolved recipe at work during prefill: finished layers in, encoded layers and the rows that go on out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .budgets import others
from .codecs import compact, owned
from .hidden_rows import pack_hidden
from .interfaces import Compressor, EncodedLayer, LayerObs, Part
from .joining import JointRows
from .layout import LayerLayout, basis_name, layer_layout, recall_plan, sinks_are_unrotated, tail_is_unrotated
from .spec import ModelShape, Recipe, Tier

# in which a layer's parts are sent, as in `layout.layer_specs`
_ORDER = (Part.BASIS, Part.KEYS, Part.VALUES, Part.POSITIONS, Part.OUTLIERS, Part.TAIL, Part.HIDDEN)

Rows = Tensor | slice
Tensors = dict[Part, dict[str, Tensor]]


def make_compressor(recipe: Recipe, shape: ModelShape) -> Compressor:
    """A compressor for one prompt.

    Args:
        recipe: resolved for the model and the prompt's length.
    """
    return RecipeCompressor(recipe, shape)


class RecipeCompressor:
    """Encodes each layer as `layout.layer_specs` says. Between layers it holds those of an unfinished group."""

    def __init__(self, recipe: Recipe, shape: ModelShape) -> None:
        tiers = recipe.tiers()
        self.recipe = recipe
        self.wants_unrotated_keys = sinks_are_unrotated(recipe) or any(t.key_codec.domain == "pre_rope" for t in tiers)
        self.wants_mass = recipe.budget.needs_scores and recipe.scorer.wants_mass
        self.wants_query_peak = any(tier.key_codec.wants_query_peak for tier in tiers)
        self._shape = shape
        self._propagation = recipe.propagation.build(recipe.retrieval.chunk, recipe.window.sinks)
        self._scorer = recipe.scorer.build()
        self._budget = recipe.budget.build()
        self._retrieval = recipe.retrieval.build()
        self._waiting: list[tuple[int, Tensors]] = []
        self._joint_keys: JointRows | None = None
        self._joint_values: JointRows | None = None

    def query_window(self, layer: int) -> int:
        """See `Compressor`."""
        wanted = self._propagation.query_window(layer)
        if self._budget is not None and self._scorer is not None:
            wanted = max(wanted, self._scorer.query_window)
        return wanted

    def wants_hidden(self, layer: int) -> bool:
        """See `Compressor`."""
        return self.recipe.propagation.keeps_hidden(layer)

    def finish_layer(self, obs: LayerObs) -> tuple[list[EncodedLayer], Tensor | None]:
        """See `Compressor`."""
        layer, num_layers = obs.layer, self._shape.num_layers
        at = layer_layout(self.recipe, obs.num_prompt_tokens, layer)
        assert len(obs.positions) == at.num_rows, f"layer {layer} got {len(obs.positions)} of {at.num_rows} rows"
        selected = self._propagation.select(obs, self._shape.layer_windows[layer])
        self._waiting.append((layer, self._encode(obs, at)))
        plan = recall_plan(self.recipe, obs.num_prompt_tokens)
        if plan is not None and layer == plan.layer:
            assert obs.hidden is not None and selected is not None, "asked for by `wants_hidden`"
            hidden = others(selected, at.num_rows)
            codec = self.recipe.propagation.hidden_codec
            self._waiting[-1][1][Part.HIDDEN] = pack_hidden(obs.hidden, hidden, codec, plan.chunk)
        if layer != self.recipe.sharing.group(layer, num_layers)[-1]:
            return [], selected
        self._join()
        ready = [
            EncodedLayer(one, {part: tensors[part] for part in _ORDER if tensors.get(part)})
            for one, tensors in self._waiting
        ]
        self._waiting = []
        return ready, selected

    def _encode(self, obs: LayerObs, at: LayerLayout) -> Tensors:
        """The whole layer: first what needs all keys, then the packed keys, and when those are gone the values."""
        tensors = self._encode_ends(obs, at)
        if not at.num_sealed + at.num_demoted:
            return tensors
        kept = self._kept_rows(obs, at)
        if at.per_head:
            tensors[Part.POSITIONS] = {"rows": owned(obs.positions[kept], torch.int32)}
        elif not at.contiguous:
            chunk = self.recipe.retrieval.chunk
            tensors[Part.POSITIONS] = {"chunks": owned(obs.positions[kept][::chunk] // chunk, torch.int32)}
        outliers = None if self._retrieval is None else self._retrieval.outliers(_take(obs.k, kept))
        if outliers is not None:
            tensors[Part.OUTLIERS] = self._encode_outliers(obs, at, outliers)
        rows: list[Rows] = [kept]
        if at.num_demoted:
            assert isinstance(kept, Tensor), "some rows are kept, some are not"
            rows.append(others(kept - at.num_sinks, at.num_sealed + at.num_demoted) + at.num_sinks)
        self._pack(obs, rows, tensors)
        return tensors

    def _pack(self, obs: LayerObs, rows: Sequence[Rows], tensors: Tensors) -> None:
        """Pack the rows of every tier, but those that wait for other layers of the group."""
        tiers = self.recipe.tiers()[: len(rows)]
        layers = len(self.recipe.sharing.group(obs.layer, self._shape.num_layers))
        joins, values_too = self.recipe.sharing.layers > 1, self.recipe.sharing.values
        for part in (Part.BASIS, Part.KEYS, Part.VALUES):
            tensors[part] = {}
        keys = [
            _take(obs.k_pre if tier.key_codec.domain == "pre_rope" else obs.k, one)
            for tier, one in zip(tiers, rows, strict=True)
        ]
        obs.release_keys()
        for tier in tiers:
            if joins:
                self._joint_keys = JointRows.put(self._joint_keys, keys.pop(0), layers)
            else:
                self._encode_rows(tier, False, keys.pop(0), obs.query_peak, tensors)
        for tier, one in zip(tiers, rows, strict=True):
            if joins and values_too:
                self._joint_values = JointRows.put(self._joint_values, _take(obs.v, one), layers)
            else:
                self._encode_rows(tier, True, _take(obs.v, one), None, tensors)

    def _encode_rows(
        self, tier: Tier, of_values: bool, rows: Tensor, query_peak: Tensor | None, tensors: Tensors
    ) -> None:
        codec = (tier.value_codec if of_values else tier.key_codec).build()
        basis = codec.fit(rows, query_peak)
        tensors[Part.BASIS] |= {basis_name(tier, of_values, name): tensor for name, tensor in basis.items()}
        packed = codec.encode(rows, basis)
        tensors[Part.VALUES if of_values else Part.KEYS] |= {tier.prefix + name: t for name, t in packed.items()}

    def _join(self) -> None:
        """Pack what the layers of a group have together: rows go to the first of them, a basis to each."""
        tier = self.recipe.tiers()[0]
        for part, joint, filling in (
            (Part.KEYS, self._joint_keys, tier.key_codec),
            (Part.VALUES, self._joint_values, tier.value_codec),
        ):
            if joint is None:
                continue
            codec = filling.joined(len(self._waiting))
            assert codec is not None, "checked with the recipe"
            packed, bases = joint.encode(codec.build())
            self._waiting[0][1][part] |= packed
            for (_, tensors), basis in zip(self._waiting, bases, strict=True):
                tensors[Part.BASIS] |= {basis_name(tier, part is Part.VALUES, name): t for name, t in basis.items()}
        self._joint_keys = self._joint_values = None

    def _kept_rows(self, obs: LayerObs, at: LayerLayout) -> Rows:
        """Rows of obs that are packed best: one run, int64 [num_sealed], or [num_sealed, Hkv] where heads differ."""
        candidates = slice(at.num_sinks, at.num_rows - at.num_tail)
        if at.num_sealed == candidates.stop - candidates.start:
            return candidates
        assert self._budget is not None and self._scorer is not None
        scores = self._scorer.score(obs, self._shape.layer_windows[obs.layer])
        return self._budget.keep(scores[:, candidates], at.num_sealed, at.num_tail).movedim(0, -1) + at.num_sinks

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

    def _encode_ends(self, obs: LayerObs, at: LayerLayout) -> Tensors:
        dtype = self._exact_dtype(obs.k)
        sink_keys = obs.k_pre if sinks_are_unrotated(self.recipe) else obs.k
        tail_keys = obs.k_pre if tail_is_unrotated(self.recipe, at) else obs.k
        tail_begin = at.num_rows - at.num_tail
        ends = {
            "sink_k": sink_keys[: at.num_sinks],
            "sink_v": obs.v[: at.num_sinks],
            "k": tail_keys[tail_begin:],
            "v": obs.v[tail_begin:],
        }
        return {Part.TAIL: {name: compact(rows.to(dtype)) for name, rows in ends.items() if len(rows)}}

    def _exact_dtype(self, native: Tensor) -> torch.dtype:
        return torch.bfloat16 if self.recipe.window.dtype == "bfloat16" else native.dtype


def _take(x: Tensor, rows: Rows) -> Tensor:
    """Rows of x [n, Hkv, d], the same for all heads (slice or [m]) or one set a head ([m, Hkv])."""
    if isinstance(rows, slice) or rows.dim() == 1:
        return x[rows]
    return x[rows, torch.arange(x.shape[1], device=x.device)]
