"""Stock transformers over the very same weights, so that both sides of a run fit beside each other on one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..models.config import ModelConfig
from ..models.model import Model
from ..models.weights import slots


def transformers_model(model: Model) -> Any:
    """The causal language model that transformers has for the family, with SDPA; its parameters are views of ours."""
    from transformers import AutoModelForCausalLM

    config = transformers_config(model.config)
    made_by: Any = AutoModelForCausalLM
    with torch.device("meta"):
        other = made_by.from_config(config, dtype=model.dtype, attn_implementation="sdpa")
    other.load_state_dict(_state(model), strict=False, assign=True)
    if model.config.tie_word_embeddings:
        other.tie_weights()
    rotary = other.model.rotary_emb
    # its tables are no parameters, and nothing of a meta tensor can be moved
    with torch.device(model.device):
        other.model.rotary_emb = type(rotary)(config)
    left = [name for name, tensor in (*other.named_parameters(), *other.named_buffers()) if tensor.is_meta]
    assert not left, f"transformers has weights that ours lacks: {left[:3]}"
    return other.eval()


def transformers_config(config: ModelConfig) -> Any:
    """The configuration as transformers spells it."""
    from transformers import AutoConfig

    rope = {name: value for name, value in asdict(config.rope).items() if name in _ROPE[config.rope.kind]}
    windows = {window for window in config.layer_windows if window is not None}
    more: dict[str, Any] = {}
    if config.family in ("qwen2", "qwen3"):
        kinds = ["full_attention" if window is None else "sliding_attention" for window in config.layer_windows]
        more = {"layer_types": kinds, "use_sliding_window": bool(windows)}
    if config.family != "llama":
        more["sliding_window"] = max(windows, default=None)
    else:
        more |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    if config.family == "qwen3":
        more["attention_bias"] = config.qkv_bias
    return AutoConfig.for_model(
        config.family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters={"rope_type": config.rope.kind, "rope_theta": config.rope.theta} | rope,
        **more,
    )


_STRETCHED = {"factor", "original_max_position_embeddings"}
_ROPE = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": _STRETCHED | {"low_freq_factor", "high_freq_factor"},
    "yarn": _STRETCHED | {"beta_fast", "beta_slow", "truncate", "attention_factor"},
}


def _state(model: Model) -> dict[str, Tensor]:
    """Our tensors under Hugging Face names, nothing copied."""
    weights, found = model.weights, {}
    for name, slot in slots(model.config).items():
        whole = getattr(weights if slot.layer is None else weights.layers[slot.layer], slot.attribute)
        found[name] = whole[slot.start : slot.start + slot.shape[0]]
    return found


@torch.inference_mode()
def prefill(other: Any, ids: Tensor) -> Tensor:
    """First tokens int64 [B] of prompts [B, n], waited for; the whole cache is made, as serving needs it."""
    out = other(input_ids=ids, use_cache=True, logits_to_keep=1)
    first: Tensor = out.logits[:, -1].argmax(dim=-1)
    first.tolist()
    return first


def decode_step(other: Any, model: Model, context: int, seed: int) -> Callable[[], Tensor]:
    """A greedy step of one sequence over transformers' dynamic cache, filled with random keys and values.

    Returns:
        an action that runs the next step and gives its token, waited for.
    """
    from transformers import DynamicCache

    config, generator = model.config, torch.Generator(model.device).manual_seed(seed)
    cache = DynamicCache(config=other.config)
    shape = (1, config.num_kv_heads, context, config.head_dim)
    for layer in range(config.num_layers):
        k, v = (torch.empty(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        cache.update(k.normal_(generator=generator), v.normal_(generator=generator), layer)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)

    @torch.inference_mode()
    def step() -> Tensor:
        out = other(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token.copy_(out.logits[:, -1].argmax(dim=-1, keepdim=True))
        token.tolist()
        return token

    return step
