"""What a prefill engine's thread does before its first prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.causal_attention import causal_attention
from ...models.model import Model

PLANNED_TOKENS = 131_072


@torch.no_grad()
def plan_attention(model: Model, chunk_tokens: int) -> None:
    """Have a GPU's library plan for whole chunks, as far as prompts go, so that the first prompt does not wait for it.

    One chunk at the end of 2^n chunks meets every span that chunks before it meet, see `causal_attention/pieces.py`.
    Plans belong to the thread that calls. Takes a layer's keys of PLANNED_TOKENS rows of memory for the moment.
    """
    config = model.config
    chunks = max(1, min(config.max_position_embeddings, PLANNED_TOKENS) // chunk_tokens)
    num_rows = chunk_tokens << (chunks.bit_length() - 1)

    def zeros(rows: int, heads: int) -> Tensor:
        return torch.zeros(rows, heads, config.head_dim, dtype=model.dtype, device=model.device)

    q, k = zeros(chunk_tokens, config.num_heads), zeros(num_rows, config.num_kv_heads)
    positions = torch.arange(num_rows, device=model.device)
    causal_attention(q, k, k, positions[num_rows - chunk_tokens :], positions, last_rows=True)
