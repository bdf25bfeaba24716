"""The default model as transformers runs it: the oracle for tokens, and what the adapter is trained on.

Nothing here goes through the project's own reading of weights or forward pass, so an agreement says something about
both. Only where the files lie is asked of `models`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..models.checkpoint import DEFAULT_MODEL, locate

LONG_CONTEXT_THETA = 500_000.0
LONG_CONTEXT_LENGTH = 32_768
BASE_MODEL = "smollm2-135m"
PEFT_PREFIX = "base_model.model."


def load_base(dtype: torch.dtype = torch.float32) -> Any:
    """SmolLM2-135M-Instruct as a transformers LlamaForCausalLM on the CPU."""
    from transformers import AutoModelForCausalLM

    weights = locate(BASE_MODEL).path
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(weights.parent), gguf_file=weights.name, dtype=dtype, attn_implementation="sdpa"
    )
    model.eval()
    return model


def extend_context(model: Any, theta: float = LONG_CONTEXT_THETA) -> None:
    """Give the model the RoPE base that the adapter is trained with, in place."""
    rotary = model.model.rotary_emb
    exponents = torch.arange(0, model.config.head_dim, 2, dtype=torch.float32, device=rotary.inv_freq.device)
    rotary.inv_freq = theta ** -(exponents / model.config.head_dim)
    model.config.max_position_embeddings = LONG_CONTEXT_LENGTH


def merge_adapter(model: Any, folder: Path) -> None:
    """Add a PEFT LoRA adapter to the weights, in place: W += alpha / rank * B A, in fp32."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    tensors: dict[str, Tensor] = load_file(folder / "adapter_model.safetensors")
    modules = dict(model.named_modules())
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            up = tensors[name.replace(".lora_A.", ".lora_B.")]
            weight = modules[name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight")].weight
            with torch.no_grad():
                weight += (scale * up.float() @ down.float()).to(weight.dtype)


def load_long_context(dtype: torch.dtype = torch.float32) -> Any:
    """The default model, smollm2-135m-longctx: base, adapter merged in fp32 and rounded once, longer RoPE."""
    model = load_base()
    adapter = locate(DEFAULT_MODEL).adapter
    assert adapter is not None
    merge_adapter(model, adapter)
    model = model.to(dtype)
    extend_context(model)  # after the cast, which would round the RoPE frequencies
    return model
