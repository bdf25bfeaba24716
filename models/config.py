"""Model configurations: how one is read from a checkpoint, and the shapes of published models. Free of torch.

`SHAPES` serves runs with random weights; its values are those of each model's published `config.json`.
"""

from __future__ import annotations

from typing import Any

from .hf_config import FAMILIES, ModelConfig, config_from_hf, supported
from .rope_config import ROPE_KINDS, RopeConfig, RopeKind

__all__ = ["FAMILIES", "ROPE_KINDS", "SHAPES", "ModelConfig", "RopeConfig", "RopeKind", "config_from_hf", "supported"]

_LLAMA_3_1 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA_3_2 = _LLAMA_3_1 | {"factor": 32.0}


def _shape(
    family: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> ModelConfig:
    raw = {
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }
    return config_from_hf(raw | more)


def _llama3(
    layers: int, hidden: int, intermediate: int, heads: int, scaling: dict[str, Any] | None, **more: Any
) -> ModelConfig:
    rope = {} if scaling is None else {"rope_scaling": {"rope_type": "llama3"} | scaling}
    ids = {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}
    numbers = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072}
    return _shape("llama", layers, hidden, intermediate, heads, 8, 128256, **(numbers | ids | rope | more))


def _mistral(layers: int, hidden: int, intermediate: int, vocab: int, **more: Any) -> ModelConfig:
    numbers = {"rms_norm_eps": 1e-5, "head_dim": 128, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": None}
    return _shape("mistral", layers, hidden, intermediate, 32, 8, vocab, **(numbers | more))


def _qwen(
    family: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> ModelConfig:
    numbers = {"rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768}
    ids = {"bos_token_id": 151643, "eos_token_id": [151645, 151643]}
    return _shape(family, layers, hidden, intermediate, heads, kv_heads, vocab, **(numbers | ids | more))


SHAPES: dict[str, ModelConfig] = {
    "llama-3-8b": _llama3(32, 4096, 14336, 32, None, max_position_embeddings=8192),
    # Gradient's continuation to a million tokens, on which ShadowKV was evaluated
    "llama-3-8b-1m": _llama3(32, 4096, 14336, 32, None, rope_theta=3580165449.0, max_position_embeddings=1048576),
    "llama-3.1-8b": _llama3(32, 4096, 14336, 32, _LLAMA_3_1),
    "llama-3.1-70b": _llama3(80, 8192, 28672, 64, _LLAMA_3_1),
    "llama-3.2-1b": _llama3(16, 2048, 8192, 32, _LLAMA_3_2, head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b": _llama3(28, 3072, 8192, 24, _LLAMA_3_2, head_dim=128, tie_word_embeddings=True),
    "mistral-7b-v0.1": _mistral(
        32, 4096, 14336, 32000, rope_theta=10000.0, max_position_embeddings=32768, sliding_window=4096
    ),
    "mistral-7b-v0.3": _mistral(32, 4096, 14336, 32768, rope_theta=1000000.0, max_position_embeddings=32768),
    "mistral-nemo-12b": _mistral(40, 5120, 14336, 131072, rope_theta=1000000.0, max_position_embeddings=131072),
    "ministral-8b": _mistral(
        36, 4096, 12288, 131072, rope_theta=100000000.0, max_position_embeddings=32768, sliding_window=32768
    ),
    "qwen2.5-0.5b": _qwen("qwen2", 24, 896, 4864, 14, 2, 151936, tie_word_embeddings=True),
    "qwen2.5-7b": _qwen("qwen2", 28, 3584, 18944, 28, 4, 152064),
    "qwen3-0.6b": _qwen(
        "qwen3", 28, 1024, 3072, 16, 8, 151936, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True
    ),
    "qwen3-8b": _qwen("qwen3", 36, 4096, 12288, 32, 8, 151936, head_dim=128, max_position_embeddings=40960),
    "smollm2-135m": _shape(
        "llama",
        30,
        576,
        1536,
        9,
        3,
        49152,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
