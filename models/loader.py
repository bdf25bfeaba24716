"""From a name or a path to a `Model`.

What reads weights is imported when weights are read: random weights need neither the `gguf` package nor a hash.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from .checkpoint import Checkpoint, locate, read_hf_config
from .config import SHAPES, ModelConfig, config_from_hf
from .model import Model
from .parallel import Ranks, check_size
from .weights import TensorSource, fill_weights, part_of_weights
from .weights import random_weights as draw_weights

if TYPE_CHECKING:
    from .gguf_file import GgufFile


def load_config(name_or_path: str, *, random_weights: bool = False) -> ModelConfig:
    """The configuration of a model without its weights; arguments and errors as those of `load_model`."""
    if random_weights and name_or_path in SHAPES:
        return SHAPES[name_or_path]
    checkpoint = locate(name_or_path)
    return _read_config(checkpoint, _open_gguf(checkpoint))


def load_model(
    name_or_path: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    random_weights: bool = False,
    seed: int = 0,
    ranks: Ranks | None = None,
) -> Model:
    """Load a model.

    Args:
        name_or_path: a Hugging Face folder, a `.gguf` file, a built-in name, or with `random_weights` also a name of
            `SHAPES`.
        dtype: of the weights and of all computation; None = float32 on a CPU, bfloat16 elsewhere.
        device: where the weights go.
        random_weights: draw weights of the model's shape instead of reading any.
        seed: of random weights.
        ranks: with whom the model is held; None = all of it is here.

    Raises:
        ConfigError: so many ranks do not divide the model.
        UnknownModel: nothing by that name.
        UnsupportedModel: a checkpoint that the forward pass does not cover.
        BrokenCheckpoint: a checkpoint that is incomplete or contradicts itself.
    """
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    if random_weights:
        config = load_config(name_or_path, random_weights=True)
        return _random_model(config, dtype, device, seed, ranks)
    checkpoint = locate(name_or_path)
    file = _open_gguf(checkpoint)
    config = _read_config(checkpoint, file)
    source = _open_source(checkpoint, file, config)
    rank, size = _place(config, ranks)
    weights = fill_weights(config, source, dtype, device, rank, size)
    return Model(config, weights, _fingerprint(config, dtype, source.digest()), ranks)


def _place(config: ModelConfig, ranks: Ranks | None) -> tuple[int, int]:
    if ranks is None:
        return 0, 1
    check_size(config, ranks.size)
    return ranks.rank, ranks.size


def _random_model(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int, ranks: Ranks | None
) -> Model:
    # a CPU and a CUDA generator draw different numbers from one seed
    fingerprint = _fingerprint(config, dtype, f"random {seed} {device.type}")
    rank, size = _place(config, ranks)
    weights = draw_weights(config, dtype, device, seed)
    if size > 1:  # every rank draws the whole, so that its part is the same as in one process
        weights = part_of_weights(config, weights, dtype, device, rank, size)
    return Model(config, weights, fingerprint, ranks)


def _open_gguf(checkpoint: Checkpoint) -> GgufFile | None:
    if not checkpoint.is_gguf:
        return None
    from .gguf_file import GgufFile

    return GgufFile(checkpoint.path)


def _read_config(checkpoint: Checkpoint, file: GgufFile | None) -> ModelConfig:
    if file is None:
        return config_from_hf(read_hf_config(checkpoint.path) | dict(checkpoint.overrides))
    from .gguf_config import config_of_gguf

    return config_from_hf(config_of_gguf(file) | dict(checkpoint.overrides))


def _open_source(checkpoint: Checkpoint, file: GgufFile | None, config: ModelConfig) -> TensorSource:
    from .sources import AdapterSource, GgufSource, SafetensorsSource

    source: TensorSource
    if file is None:
        source = SafetensorsSource(checkpoint.path)
    else:
        source = GgufSource(file, config.num_layers, config.num_heads, config.num_kv_heads)
    return source if checkpoint.adapter is None else AdapterSource(source, checkpoint.adapter)


def _fingerprint(config: ModelConfig, dtype: torch.dtype, weights: str) -> str:
    """32 hex digits over all that a model's logits depend on."""
    return hashlib.sha256(f"{config.digest} {dtype} {weights}".encode()).hexdigest()[:32]
