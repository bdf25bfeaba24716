"""What the forward pass must know of a checkpoint, read from its `config.json`. Free of torch.

Supported: the families `FAMILIES` with the RoPE kinds `ROPE_KINDS`. Everything that would compute something else is
refused, never ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import BrokenCheckpoint, UnsupportedModel
from .rope_config import ROPE_KINDS, RopeConfig, rope_from_hf

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# keys that change what a model computes and that no supported family has; harmless when null, false, 0 or 1 as listed
_REFUSED: Mapping[str, tuple[object, ...]] = {
    "quantization_config": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1, 1.0),
    "no_rope_layers": (None,),
    "attention_chunk_size": (None,),
}
_MAX_DIMENSION = 1 << 20


@dataclass(frozen=True)
class ModelConfig:
    """Shape and features of one decoder-only model.

    Attributes:
        family: one of `FAMILIES`.
        head_dim: size of a head; `num_heads * head_dim` need not be `hidden_size`.
        max_position_embeddings: longest sequence the checkpoint promises.
        qkv_bias, o_bias, mlp_bias: which projections have biases.
        qk_norm: whether queries and keys are normalised per head before RoPE (Qwen3).
        layer_windows: sliding-window width of each layer, the row's own position included; None = sees everything.
        eos_token_ids: ids that end a text; empty when the checkpoint names none.
    """

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    layer_windows: tuple[int | None, ...]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def digest(self) -> str:
        """Hex digits over everything that changes logits; token ids that start or end a text do not."""
        numbers = {k: v for k, v in asdict(self).items() if k not in ("bos_token_id", "eos_token_ids")}
        return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


def supported() -> str:
    """The supported families and features in words, for error messages."""
    return (
        "dense decoder-only checkpoints of the families llama (also SmolLM2), mistral, qwen2 (also Qwen2.5), qwen3, "
        f"with RoPE {'/'.join(ROPE_KINDS)}, SiLU gates and unquantized safetensors or GGUF weights"
    )


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face `config.json`.

    Args:
        raw: its parsed content.

    Raises:
        UnsupportedModel: a family or feature that is not covered; the message lists what is.
        BrokenCheckpoint: a value that is missing, of the wrong type, out of range or contradicts another.
    """
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedModel(f"model_type {str(family)[:64]!r} is not supported; supported: {supported()}")
    _refuse_features(raw)
    read = _Fields(raw)
    hidden_size, num_heads = read.whole("hidden_size"), read.whole("num_attention_heads")
    num_kv_heads = read.whole("num_key_value_heads", default=8 if family == "mistral" else num_heads)
    head_dim = read.whole("head_dim", default=_default_head_dim(raw, str(family), hidden_size, num_heads))
    if num_heads % num_kv_heads:
        raise BrokenCheckpoint(
            f"config.json: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    if head_dim % 2:
        raise BrokenCheckpoint(f"config.json: head_dim {head_dim} is odd")
    num_layers = read.whole("num_hidden_layers")
    max_positions = read.whole("max_position_embeddings", default=_DEFAULT_POSITIONS[str(family)])
    attention_bias = read.flag("attention_bias", False)
    vocab_size = read.whole("vocab_size")
    return ModelConfig(
        family=str(family),
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=read.whole("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        rms_norm_eps=read.epsilon("rms_norm_eps"),
        rope=rope_from_hf(raw, max_positions),
        max_position_embeddings=max_positions,
        tie_word_embeddings=read.flag("tie_word_embeddings", False),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=family != "qwen2" and attention_bias,
        mlp_bias=read.flag("mlp_bias", False),
        qk_norm=family == "qwen3",
        layer_windows=_layer_windows(raw, read, str(family), num_layers),
        bos_token_id=read.token("bos_token_id"),
        eos_token_ids=read.tokens("eos_token_id"),
    )


_DEFAULT_POSITIONS = {"llama": 2048, "mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768}


def _default_head_dim(raw: Mapping[str, Any], family: str, hidden_size: int, num_heads: int) -> int:
    if family == "qwen3":
        return 128
    if raw.get("head_dim") is None and hidden_size % num_heads:
        raise BrokenCheckpoint(
            f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}"
        )
    return hidden_size // num_heads


def _refuse_features(raw: Mapping[str, Any]) -> None:
    for name, harmless in _REFUSED.items():
        value = raw.get(name)
        if value not in harmless:
            raise UnsupportedModel(f"config.json: {name} is not supported; supported: {supported()}")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModel(
            f"config.json: hidden_act {str(raw['hidden_act'])[:64]!r} is not supported; supported: silu"
        )
    family = raw["model_type"]
    if family in ("mistral", "qwen2") and raw.get("attention_bias") not in (None, family == "qwen2"):
        raise UnsupportedModel(f"config.json: attention_bias of a {family} model is fixed; supported: {supported()}")
    if family != "llama" and raw.get("mlp_bias"):
        raise UnsupportedModel(f"config.json: mlp_bias of a {family} model is not supported; supported: {supported()}")


def _layer_windows(raw: Mapping[str, Any], read: _Fields, family: str, num_layers: int) -> tuple[int | None, ...]:
    """Sliding-window width of each layer, as transformers applies it."""
    layer_types = raw.get("layer_types")
    if layer_types is not None:
        _check_layer_types(layer_types, num_layers)
    if family in ("qwen2", "qwen3"):
        window = read.whole("sliding_window", default=4096) if read.flag("use_sliding_window", False) else None
        if raw.get("sliding_window", 4096) is None:
            window = None
        if layer_types is None:
            first = read.whole("max_window_layers", default=28, low=0)
            layer_types = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
            return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
        if window is None and "sliding_attention" in layer_types:
            raise BrokenCheckpoint("config.json: layer_types has sliding_attention but no sliding window is in use")
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    window = None
    if family == "mistral" and raw.get("sliding_window", 4096) is not None:
        window = read.whole("sliding_window", default=4096)
    if family == "llama" and raw.get("sliding_window") is not None:
        raise UnsupportedModel(
            "config.json: sliding_window of a llama model is not supported; supported: mistral, qwen2"
        )
    kind = "full_attention" if window is None else "sliding_attention"
    if layer_types is not None and set(layer_types) != {kind}:
        raise UnsupportedModel(
            f"config.json: layer_types of a {family} model must all be {kind}; "
            "mixed layers are supported for qwen2, qwen3"
        )
    return (window,) * num_layers


def _check_layer_types(layer_types: object, num_layers: int) -> None:
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise BrokenCheckpoint(f"config.json: layer_types does not name {num_layers} layers")
    unknown = {str(kind)[:64] for kind in layer_types} - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModel(
            f"config.json: layer type {sorted(unknown)[0]!r} is not supported; "
            "supported: full_attention, sliding_attention"
        )


@dataclass(frozen=True)
class _Fields:
    """Typed, bounded reading of a `config.json`."""

    raw: Mapping[str, Any]

    def whole(self, name: str, default: int | None = None, low: int = 1) -> int:
        value = self.raw.get(name)
        if value is None:
            value = default
        if value is None:
            raise BrokenCheckpoint(f"config.json: {name} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= _MAX_DIMENSION * 64:
            raise BrokenCheckpoint(f"config.json: {name} is not an integer of at least {low}: {value!r}"[:200])
        return value

    def epsilon(self, name: str) -> float:
        value = self.raw.get(name, 1e-6)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise BrokenCheckpoint(f"config.json: {name} is not a number between 0 and 1")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise BrokenCheckpoint(f"config.json: {name} is not a boolean")
        return value

    def token(self, name: str) -> int | None:
        ids = self.tokens(name)
        return ids[0] if ids else None

    def tokens(self, name: str) -> tuple[int, ...]:
        value = self.raw.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise BrokenCheckpoint(f"config.json: {name} is not a token id or a list of them")
        return tuple(ids)
