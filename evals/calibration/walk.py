"""Rows on their way through a model's layers, as the prefill engine runs them, looked at behind each layer.

The engine runs one recipe a prompt. Here a pass is shared: what only depends on the rows that have passed is computed
once, and whoever chooses among them or packs them comes to see the same layer. Tests hold it against the engine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...compression.interfaces import LayerObs
from ...compression.propagation_slots import MAX_SCORING_WINDOW
from ...kernels.causal_attention import causal_attention
from ...kernels.rms_norm import rms_norm
from ...kernels.rope import apply_rope
from ...models.model import Model


class Walk:
    """Rows of one prompt between two layers.

    Args:
        x: [n, D], rows that enter `layer`.
        positions: int64 [n], ascending.
        num_prompt_tokens: of the whole prompt.
        chunk_tokens: rows whose attention is computed at once.

    Attributes:
        x: [n, D], the rows as they are now.
        layer: the next one.
    """

    def __init__(
        self, model: Model, x: Tensor, positions: Tensor, num_prompt_tokens: int, chunk_tokens: int, layer: int = 0
    ) -> None:
        self.x, self.positions, self.layer = x, positions, layer
        self._model, self._num_prompt_tokens, self._chunk_tokens = model, num_prompt_tokens, chunk_tokens
        self._tables = model.rope_tables(positions, num_prompt_tokens)

    @classmethod
    def begin(cls, model: Model, ids: tuple[int, ...], num_prompt_tokens: int, chunk_tokens: int) -> Walk:
        """The rows of token ids, of which the first `num_prompt_tokens` are the prompt."""
        on_device = torch.tensor(ids, dtype=torch.int64, device=model.device)
        positions = torch.arange(len(ids), dtype=torch.int64, device=model.device)
        return cls(model, model.embed(on_device), positions, num_prompt_tokens, chunk_tokens)

    def step(self) -> LayerObs:
        """Run a layer.

        Returns:
            what a compressor may want of it, but for attention's mass.
        """
        model, layer, count = self._model, self.layer, len(self.x)
        q, k_pre, v = (rows.contiguous() for rows in model.qkv(layer, self.x))  # as the engine's buffers are
        q, k = apply_rope(q, *self._tables), apply_rope(k_pre, *self._tables)
        window, no_gaps = model.config.layer_windows[layer], count == self._num_prompt_tokens
        attended = []
        for begin in range(0, count, self._chunk_tokens):
            end = min(count, begin + self._chunk_tokens)
            seen = (k[:end], v[:end], self.positions[begin:end], self.positions[:end], window)
            attended.append(causal_attention(q[begin:end], *seen, last_rows=True, no_gaps=no_gaps))
        self.x = model.finish_layer(layer, self.x, torch.cat(attended))
        self.layer += 1
        by_head = q.abs().amax(dim=0).float().view(k.shape[1], -1, q.shape[2])
        return LayerObs(
            layer=layer,
            positions=self.positions,
            num_prompt_tokens=self._num_prompt_tokens,
            k_pre=k_pre,
            k=k,
            v=v,
            q_window=q[-MAX_SCORING_WINDOW:],
            query_peak=by_head.amax(dim=1),
            hidden=self.x,
        )

    def finish(self) -> Tensor:
        """Run the layers that are left. Returns the rows [n, D] behind the last one."""
        while self.layer < self._model.config.num_layers:
            self.step()
        return self.x

    def branch(self, selected: Tensor | None) -> Walk:
        """Some of the rows (int64 [n], ascending; None = all), to go on apart from the others."""
        x, positions = self.x, self.positions
        if selected is not None:
            x, positions = x.index_select(0, selected), positions.index_select(0, selected)
        return Walk(self._model, x, positions, self._num_prompt_tokens, self._chunk_tokens, self.layer)


def as_head_reads(model: Model, x: Tensor) -> Tensor:
    """Rows [n, D] behind the last layer -> float32 [n, D] behind the final norm: what the head reads, and what
    transformers calls the last hidden state."""
    return rms_norm(x, model.weights.norm, model.config.rms_norm_eps).float()


def relative_error(rows: Tensor, wanted: Tensor) -> float:
    """How far rows lie from those that are wanted, both [n, D]: the mean of |difference| / |wanted|."""
    return float(((rows - wanted).norm(dim=-1) / wanted.norm(dim=-1)).mean())
