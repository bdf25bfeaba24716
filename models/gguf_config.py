"""The configuration of a GGUF file in Hugging Face terms. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import BrokenCheckpoint, UnsupportedModel
from .gguf_file import GgufFile
from .hf_config import supported

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_FREQUENCY_FACTORS = "rope_freqs.weight"
# keys that change what a model computes and that the forward pass does not know, with the values that change nothing
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "attention.sliding_window": (0,),
    "attention.scale": (0,),
    "attention.output_scale": (0, 1),
    "attention.temperature_scale": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.causal": (True,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "use_parallel_residual": (False,),
    "rope.scale_linear": (0, 1),
    "rope.scaling.alpha": (0,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
}


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
    for name, neutral in _NEUTRAL.items():
        read.refuse(name, *neutral)
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
        "eos_token_id": end_of_text_ids(file),
    }
    scaling = _rope_scaling(file, read, head_dim, float(raw["rope_theta"]))
    if scaling is not None:
        raw["rope_scaling"] = scaling
    if architecture == "llama":
        raw["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    return raw


def end_of_text_ids(file: GgufFile) -> list[int]:
    """Ids that end a text: of the text itself, of a turn, of a message. Empty when the file names none.

    Raises:
        BrokenCheckpoint: one is not an id.
    """
    found: dict[int, None] = {}
    for name in ("eos", "eot", "eom"):
        index = file.fields.get(f"tokenizer.ggml.{name}_token_id")
        if index is None:
            continue
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise BrokenCheckpoint(f"{file.name}: tokenizer.ggml.{name}_token_id is not a token id")
        found[index] = None
    return list(found)


def _vocab_size(file: GgufFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise BrokenCheckpoint(f"{file.name}: tensor token_embd.weight is missing")
    return embedding.shape[0]


def _rope_scaling(file: GgufFile, read: _Metadata, head_dim: int, theta: float) -> dict[str, Any] | None:
    if _FREQUENCY_FACTORS in file.tensors:
        return _llama3_scaling(file, head_dim, theta)
    # as llama.cpp reads them: a factor without a type is linear
    kind = read.text("rope.scaling.type", "linear" if read.has("rope.scaling.factor") else "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UnsupportedModel(
            f"{file.name}: RoPE scaling {kind[:64]!r} is not supported; supported: none, linear, yarn"
        )
    scaling: dict[str, Any] = {"rope_type": kind, "factor": float(read.number("rope.scaling.factor"))}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = read.number("rope.scaling.original_context_length")
        scaling["beta_fast"] = read.number("rope.scaling.yarn_beta_fast", 32.0)
        scaling["beta_slow"] = read.number("rope.scaling.yarn_beta_slow", 1.0)
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

    def has(self, name: str) -> bool:
        return f"{self._architecture}.{name}" in self._file.fields

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

    def refuse(self, name: str, *allowed: object) -> None:
        value = self._file.fields.get(f"{self._architecture}.{name}", allowed[0])
        if value not in allowed:
            raise UnsupportedModel(
                f"{self._file.name}: {self._architecture}.{name} = {str(value)[:64]} is not supported; "
                f"supported: {', '.join(map(str, allowed))}"
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
