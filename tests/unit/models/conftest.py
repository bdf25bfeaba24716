"""Tiny checkpoints written by hand, so that they can be broken by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kvsluice.models.config import config_from_hf
from kvsluice.models.weights import slots

RAW: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def raw() -> dict[str, Any]:
    """A small llama `config.json`."""
    return dict(RAW)


def tensors_of(raw: dict[str, Any]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    wanted = slots(config_from_hf(raw))
    return {name: torch.randn(slot.shape, generator=generator) for name, slot in wanted.items()}


@pytest.fixture
def folder(tmp_path: Path, raw: dict[str, Any]) -> Path:
    """A sound checkpoint in one file."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    save_file(tensors_of(raw), path / "model.safetensors")
    return path


@pytest.fixture
def sharded(tmp_path: Path, raw: dict[str, Any]) -> Path:
    """The same checkpoint in two shards with an index."""
    path = tmp_path / "sharded"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    tensors = tensors_of(raw)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    place = {name: shards[i % 2] for i, name in enumerate(tensors)}
    for shard in shards:
        save_file({name: tensors[name] for name in tensors if place[name] == shard}, path / shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return path


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """write(fields, tensors) -> a GGUF file; tensors are (float32 array, quantization name) by GGUF name."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    def write(fields: dict[str, Any], tensors: dict[str, tuple[np.ndarray, str]], name: str = "tiny.gguf") -> Path:
        path = tmp_path / name
        writer = GGUFWriter(str(path), fields["general.architecture"])
        for key, value in fields.items():
            if key == "general.architecture":
                continue
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, list):
                writer.add_array(key, value)
            elif isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            else:
                writer.add_uint32(key, value)
        for tensor, (values, kind_name) in tensors.items():
            kind = GGMLQuantizationType[kind_name]
            data = values if values.dtype == np.uint8 else quantize(values, kind)
            writer.add_tensor(tensor, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
