"""What recipes must know of a model, taken from its configuration."""

from __future__ import annotations

from typing import Protocol

from ..compression.recipe import ModelShape


class HasShape(Protocol):
    """The part of a model's configuration that its KV cache depends on."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def layer_windows(self) -> tuple[int | None, ...]: ...
    @property
    def hidden_size(self) -> int: ...


def model_shape(config: HasShape) -> ModelShape:
    """The shape by which recipes are resolved and caches are sized."""
    return ModelShape(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        layer_windows=config.layer_windows,
        hidden_size=config.hidden_size,
    )
