"""Weights drawn instead of read."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvsluice.models.config import SHAPES
from kvsluice.models.forward import forward_hidden, forward_tokens
from kvsluice.models.loader import load_model
from kvsluice.models.weights import random_weights

IDS = torch.arange(24) % 32


def test_same_seed_same_model(folder: Path) -> None:
    (folder / "model.safetensors").unlink()  # only the configuration is read
    first, again, other = (load_model(str(folder), random_weights=True, seed=seed) for seed in (1, 1, 2))

    assert torch.equal(forward_tokens(first, IDS), forward_tokens(again, IDS))
    assert not torch.equal(forward_tokens(first, IDS), forward_tokens(other, IDS))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_real_shape_in_half_precision() -> None:
    model = load_model("smollm2-135m", random_weights=True, dtype=torch.bfloat16)

    tensors = [t for layer in model.weights.layers for t in vars(layer).values() if t is not None]
    assert {t.dtype for t in tensors} == {torch.bfloat16}
    assert model.config == SHAPES["smollm2-135m"]
    assert model.weights.nbytes == 2 * 134_515_008


def test_no_wider_copy_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.dtype] = []
    real = torch.empty

    def watched(*args: object, dtype: torch.dtype, **more: object) -> torch.Tensor:
        made.append(dtype)
        return real(*args, dtype=dtype, **more)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", watched)
    config = replace(SHAPES["smollm2-135m"], num_layers=1, layer_windows=(None,), vocab_size=64)

    random_weights(config, torch.float16, torch.device("cpu"), 0)

    assert set(made) == {torch.float16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_keep_their_size_through_depth(dtype: torch.dtype) -> None:
    shape = replace(
        SHAPES["qwen2.5-7b"],
        num_layers=40,
        layer_windows=(None,) * 40,
        hidden_size=128,
        intermediate_size=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        vocab_size=64,
    )
    from kvsluice.models.model import Model

    model = Model(shape, random_weights(shape, dtype, torch.device("cpu"), 0), "")
    logits = model.logits(forward_hidden(model, torch.arange(48)))

    assert bool(logits.isfinite().all())
    assert 0.1 < float(logits.std()) < 10


def test_a_bare_machine_can_draw_weights() -> None:
    # GPU benchmarks run where neither the gguf package nor xxhash is installed
    code = (
        "import sys; sys.modules['gguf'] = sys.modules['xxhash'] = None; from kvsluice.models.loader import load_model;"
        "from kvsluice.models import forward, sampling, tokenizer; load_model('smollm2-135m', random_weights=True)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
