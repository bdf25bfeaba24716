"""Tiny checkpoints as transformers writes them, and a cache that keeps everything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvsluice.kernels.causal_attention import causal_attention
from kvsluice.models.model import Model


class DenseCache:
    """All keys and values of one sequence, in order."""

    def __init__(self, model: Model) -> None:
        self._windows = model.config.layer_windows
        self._rows: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in self._windows]

    def append(self, layer: int, k_pre: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> None:
        self._rows[layer].append((k, v, positions))

    def attend(self, layer: int, q: Tensor, positions: Tensor) -> Tensor:
        k, v, k_positions = (torch.cat(parts) for parts in zip(*self._rows[layer], strict=True))
        return causal_attention(q, k, v, positions, k_positions, self._windows[layer])

    def recall(self, layer: int, like: Tensor) -> None:
        """Nothing was left behind."""


@pytest.fixture
def dense_cache() -> Callable[[Model], DenseCache]:
    return DenseCache


TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """make(family, **config) -> (saved folder, the transformers model with every parameter random)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(family: str, **changes: Any) -> tuple[Path, Any]:
        config = AutoConfig.for_model(family, **(TINY | changes))
        generator = torch.Generator().manual_seed(7)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # wide enough that attention is far from uniform and norms and biases matter
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.3 * noise if "norm" in name else noise * 0.25)
        folder = tmp_path / family
        model.save_pretrained(folder)
        return folder, model

    return make
