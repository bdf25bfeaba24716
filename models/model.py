"""One decoder layer at a time: the pieces of the forward pass that prefill and decode put together."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.rms_norm import add_rms_norm, rms_norm
from ..kernels.rope import apply_rope
from ..kernels.swiglu import swiglu
from .hf_config import ModelConfig
from .parallel import Ranks, part_of
from .rope import RotaryEmbedding
from .weights import LayerWeights, Weights

# bounds the feed-forward block's largest intermediate, whatever the number of rows
MLP_CHUNK_BYTES = 128 << 20


class Model:
    """Weights and the operations on rows of hidden states; it holds no KV and no state between calls.

    Letters: n rows, D hidden size, H query heads, Hkv KV heads, d head size, V vocabulary size.

    Args:
        config: the model's shape.
        weights: its tensors, all of one dtype on one device.
        fingerprint: hex digits that name configuration, weights and dtype.
        ranks: the processes that hold the model together; None = this one holds all of it. `weights` are then a part,
            and H, Hkv and the feed-forward block's size are those of the part.

    Attributes:
        config: by which this process computes: of its part.
        whole: of all ranks together; by it recipes are resolved and frames are made.
        dtype, device: of the weights and of all hidden rows.
    """

    def __init__(self, config: ModelConfig, weights: Weights, fingerprint: str, ranks: Ranks | None = None) -> None:
        self.whole = config
        self.config = config = config if ranks is None else part_of(config, ranks.size)
        self.ranks = ranks
        self.weights = weights
        self.fingerprint = fingerprint
        self.dtype = weights.embed.dtype
        self.device = weights.embed.device
        self._rotary = RotaryEmbedding(config.rope, config.head_dim, self.device)
        row_bytes = 2 * config.intermediate_size * weights.embed.element_size()
        self._mlp_rows = max(64, MLP_CHUNK_BYTES // row_bytes)
        self._head_counts = [config.num_heads, config.num_kv_heads, config.num_kv_heads]

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids int64 [n] -> hidden rows [n, D]."""
        return F.embedding(ids, self.weights.embed)

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input norm, projections, biases and per-head norms; before RoPE.

        Args:
            layer: index of the layer.
            x: [n, D].

        Returns:
            q [n, H, d], k [n, Hkv, d], v [n, Hkv, d]. They may be views of one buffer.
        """
        w, config = self.weights.layers[layer], self.config
        fused = F.linear(rms_norm(x, w.input_norm, config.rms_norm_eps), w.qkv, w.qkv_bias)
        heads = fused.view(len(x), sum(self._head_counts), config.head_dim)
        q, k, v = torch.split(heads, self._head_counts, dim=1)
        if w.q_norm is not None and w.k_norm is not None:
            q, k = rms_norm(q, w.q_norm, config.rms_norm_eps), rms_norm(k, w.k_norm, config.rms_norm_eps)
        return q, k, v

    def rope_tables(self, positions: Tensor, num_prompt_tokens: int | Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [..., d], for positions int64 [...]; what `rotate` uses, for callers that rotate often.

        Args:
            positions: int64 [n] or [n, heads].
            num_prompt_tokens: length of the prompt, or int64 like positions where rows belong to several prompts.
                Matters for dynamic RoPE only: a row at p uses the base for length max(num_prompt_tokens, p + 1).
        """
        return self._rotary.tables(positions, num_prompt_tokens)

    @property
    def fixed_frequencies(self) -> tuple[Tensor, float] | None:
        """Angles of RoPE at position 1, float32 [d / 2], and the factor of its cos and sin; None where they depend on
        a prompt's length."""
        rope = self.config.rope
        return None if rope.kind == "dynamic" else (self._rotary.inverse_frequencies, rope.attention_factor)

    def rotate(self, x: Tensor, positions: Tensor, num_prompt_tokens: int) -> Tensor:
        """Apply RoPE to x [n, heads, d] at positions int64 [n] or [n, heads]; see `rope_tables`."""
        cos, sin = self.rope_tables(positions, num_prompt_tokens)
        return apply_rope(x, cos, sin)

    def finish_layer(self, layer: int, x: Tensor, attn: Tensor) -> Tensor:
        """Output projection, residual, post-attention norm, feed-forward block, residual.

        Args:
            layer: index of the layer.
            x: [n, D], the layer's input rows.
            attn: [n, H, d], attention's output for them.

        Returns:
            [n, D], the next layer's input. The feed-forward block runs in bounded chunks of rows.
        """
        w = self.weights.layers[layer]
        out = self.summed(F.linear(attn.flatten(1), w.o, w.o_bias))
        y, x = add_rms_norm(out, x, w.post_norm, self.config.rms_norm_eps)
        for start in range(0, len(x), self._mlp_rows):
            stop = start + self._mlp_rows
            # x is the sum that was made here, so its memory may take the result
            x[start:stop] += self.summed(self._mlp(w, y[start:stop]))
        return x

    @property
    def over_ranks(self) -> Callable[[Tensor], Tensor] | None:
        """Adds up in place what every rank has a part of; None where there are no others."""
        return None if self.ranks is None else self.ranks.sum

    def summed(self, x: Tensor) -> Tensor:
        """What every rank has a part of, added up in place."""
        return x if self.ranks is None else self.ranks.sum(x)

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and head: rows [n, D] after the last layer -> float32 [n, V]."""
        return F.linear(rms_norm(x, self.weights.norm, self.config.rms_norm_eps), self.weights.head).float()

    def _mlp(self, w: LayerWeights, y: Tensor) -> Tensor:
        gate, up = F.linear(y, w.gate_up, w.gate_up_bias).chunk(2, -1)
        return F.linear(swiglu(gate, up), w.down, w.down_bias)
