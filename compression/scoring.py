"""Scorers: how important each row of a finished layer is."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..kernels.window_saliency import window_saliency
from .interfaces import LayerObs
from .slots import SnapScorer


class Scorer(Protocol):
    """Ranks the rows of a layer for each KV head."""

    query_window: int

    def score(self, obs: LayerObs, layer_window: int | None) -> Tensor:
        """float32 [Hkv, n]; +inf for rows that must be kept."""
        ...


class Snap:
    """SnapKV's window attention; the window itself comes first."""

    def __init__(self, spec: SnapScorer) -> None:
        self._spec = spec
        self.query_window = spec.window

    def score(self, obs: LayerObs, layer_window: int | None) -> Tensor:
        """See `Scorer`."""
        saliency = window_saliency(
            obs.q_window[-self._spec.window :],
            obs.k,
            self._spec.kernel,
            self._spec.pool,
            positions=obs.positions,
            window=layer_window,
        )
        scores = saliency.new_full((saliency.shape[0], obs.k.shape[0]), torch.inf)
        scores[:, : saliency.shape[1]] = saliency
        return scores


class Accumulated:
    """H2O's accumulated attention, summed up while the prompt ran."""

    query_window = 0

    def score(self, obs: LayerObs, layer_window: int | None) -> Tensor:
        """See `Scorer`."""
        assert obs.mass is not None, "asked for by `wants_mass`"
        return obs.mass
