"""The configuration of a GGUF file in Hugging Face terms. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import BrokenCheckpoint, UnsupportedModel
from .gguf_file import GgufFile
from .hf_config import supported

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_FREQUENCY_FACTORS = "rope_freqs.weight"


def config_of_gguf(file: GgufFile) -> dict[str, Any]:
    """Metadata of a GGUF file as the `config.json` it was made from.

    Raises:
        UnsupportedModel: an architecture or feature that is not covered.
        BrokenCheckpoint: a key is missing.
    """
    architecture = file.fields.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModel(
            f"{file.name}: architecture {str(architecture)[:64]!r} is not supported; supported: {supported()}"
        )
    read = _Metadata(file, str(architecture))
    heads, hidden = read.number("attention.head_count"), read.number("embedding_length")
    head_dim = read.number("attention.key_length", hidden // heads if heads else 0)
    read.refuse("expert_count", 0)
    read.refuse("attention.sliding_window", 0)
    read.refuse("attention.value_length", head_dim)
    read.refuse("rope.dimension_count", head_dim)
    raw: dict[str, Any] = {
        "model_type": architecture,
        "num_hidden_layers": read.number("block_count"),
        "hidden_size": hidden,
        "intermediate_size": read.number("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": read.number("context_length"),
        "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": read.number("rope.freq_base", 10000.0),
        "vocab_size": _vocab_size(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.fields.get("tokenizer.ggml.eos_token_id"),
    }
    scaling = _rope_scaling(file, read, head_dim, float(raw["rope_theta"]))
    if scaling is not None:
        raw["rope_scaling"] = scaling
    if architecture == "llama":
        raw["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    return raw


def _vocab_size(file: GgufFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise BrokenCheckpoint(f"{file.name}: tensor token_embd.weight is missing")
    return embedding.shape[0]


def _rope_scaling(file: GgufFile, read: _Metadata, head_dim: int, theta: float) -> dict[str, Any] | None:
    if _FREQUENCY_FACTORS in file.tensors:
        return _llama3_scaling(file, head_dim, theta)
    kind = read.text("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UnsupportedModel(
            f"{file.name}: RoPE scaling {kind[:64]!r} is not supported; supported: none, linear, yarn"
        )
    scaling: dict[str, Any] = {"rope_type": kind, "factor": float(read.number("rope.scaling.factor"))}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = read.number("rope.scaling.original_context_length")
    return scaling


def _llama3_scaling(file: GgufFile, head_dim: int, theta: float) -> dict[str, Any]:
    """Recognise the published scaling of Llama 3.1 (factor 8) and 3.2 (factor 32) by the divisors in the file."""
    import torch

    from .rope import RotaryEmbedding
    from .rope_config import RopeConfig

    stored = torch.from_numpy(file.dequantize(_FREQUENCY_FACTORS).copy())
    plain = RotaryEmbedding(RopeConfig("default", theta), head_dim, torch.device("cpu")).inverse_frequencies
    for factor in (8.0, 32.0):
        numbers: dict[str, Any] = {
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        scaled = RotaryEmbedding(RopeConfig("llama3", theta, **numbers), head_dim, torch.device("cpu"))
        ratio = plain / scaled.inverse_frequencies
        if stored.shape == ratio.shape and torch.allclose(stored, ratio, rtol=1e-4):
            return {"rope_type": "llama3"} | numbers
    raise UnsupportedModel(
        f"{file.name}: {_FREQUENCY_FACTORS} is not supported; "
        "supported: those of Llama 3.1 (factor 8) and 3.2 (factor 32)"
    )


class _Metadata:
    """Typed reading of the keys `<architecture>.<name>`."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self._file = file
        self._architecture = architecture

    def number(self, name: str, default: float | None = None) -> Any:
        value = self._file.fields.get(f"{self._architecture}.{name}", default)
        if value is None:
            raise BrokenCheckpoint(f"{self._file.name}: key {self._architecture}.{name} is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UnsupportedModel(
                f"{self._file.name}: {self._architecture}.{name} is not one number; supported: the same in every layer"
            )
        return value

    def text(self, name: str, default: str) -> str:
        return str(self._file.fields.get(f"{self._architecture}.{name}", default))

    def refuse(self, name: str, allowed: object) -> None:
        value = self._file.fields.get(f"{self._architecture}.{name}", allowed)
        if value != allowed:
            raise UnsupportedModel(
                f"{self._file.name}: {self._architecture}.{name} = {str(value)[:64]} is not supported; "
                f"supported: {allowed}"
            )


def hf_names(num_layers: int) -> Mapping[str, str]:
    """Hugging Face tensor name -> GGUF tensor name, for every tensor that the supported families may have."""
    blocks = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for layer in range(num_layers):
        for hf, gguf in blocks.items():
            for suffix in ("weight", "bias"):
                names[f"model.layers.{layer}.{hf}.{suffix}"] = f"blk.{layer}.{gguf}.{suffix}"
    return names
