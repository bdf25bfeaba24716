"""Propagation: which rows of a finished layer enter the next one."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..kernels.window_saliency import window_saliency
from .budgets import best
from .interfaces import LayerObs
from .slots import TspPropagation


class Propagation(Protocol):
    """Chooses rows between two layers."""

    def query_window(self, layer: int) -> int:
        """Last rows whose queries `select` wants after this layer."""
        ...

    def select(self, obs: LayerObs, layer_window: int | None) -> Tensor | None:
        """Ascending int64 row indices that go on, or None when all do."""
        ...


class Full:
    """Every row goes on."""

    def query_window(self, layer: int) -> int:
        """See `Propagation`."""
        return 0

    def select(self, obs: LayerObs, layer_window: int | None) -> Tensor | None:
        """See `Propagation`."""
        return None


class Tsp:
    """Sinks, the last window and the chunks (of 1 row, as published, or more) that the window attends to most.

    Scores are summed over all heads; a chunk counts as its best row.
    """

    def __init__(self, spec: TspPropagation, chunk: int, sinks: int) -> None:
        assert spec.window is not None, "resolved"
        self._spec, self._window = spec, spec.window
        self._chunk = chunk
        self._sinks = sinks

    def query_window(self, layer: int) -> int:
        """See `Propagation`."""
        return self._window if layer == self._spec.layer else 0

    def select(self, obs: LayerObs, layer_window: int | None) -> Tensor | None:
        """See `Propagation`."""
        spec, chunk, sinks = self._spec, self._chunk, self._sinks
        num_tokens = obs.num_prompt_tokens
        if obs.layer != spec.layer:
            return None
        begin = spec.window_begin(num_tokens, chunk, sinks)
        num_selected = spec.num_selected(num_tokens, chunk, sinks)
        if sinks + num_selected * chunk == begin:
            return None
        saliency = window_saliency(
            obs.q_window[-self._window :], obs.k, spec.kernel, "max", positions=obs.positions, window=layer_window
        )
        scores = saliency.sum(dim=0)[sinks:begin].view(-1, chunk).amax(dim=1)
        chosen = best(scores, num_selected)
        rows = (chosen[:, None] * chunk + torch.arange(chunk, device=chosen.device)).flatten() + sinks
        ends = torch.arange(num_tokens, device=chosen.device)
        return torch.cat((ends[:sinks], rows, ends[begin:]))
