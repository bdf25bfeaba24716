"""A tiny model's configuration: its weights are drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from kvsluice.benchmarks.bench_results import BenchResults
from kvsluice.benchmarks.options import parse_options
from kvsluice.benchmarks.progress import Progress
from kvsluice.benchmarks.runner import run
from kvsluice.models.config import config_from_hf
from kvsluice.models.model import Model
from kvsluice.models.weights import random_weights


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """The shape of a Llama of four layers."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model() -> Model:
    """A Llama of four layers in float32, its weights drawn at random."""
    raw = {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,
        "max_position_embeddings": 4096,
    }
    config = config_from_hf(raw)
    return Model(config, random_weights(config, torch.float32, torch.device("cpu"), 0), fingerprint="tiny")


@pytest.fixture
def bench(tiny_folder) -> Callable[..., BenchResults]:
    """bench(part, context="512") -> the results of a run over the tiny model, with few repetitions."""

    def make(part: str, **given: object) -> BenchResults:
        base: dict[str, object] = {
            "model": str(tiny_folder),
            "random_weights": True,
            "device": "cpu",
            "context": "512",
            "warmup": "1",
            "repeats": "2",
            "steps": "3",
            "commit": "some-commit",
        }
        return run(parse_options(part, base | given), Progress(lambda line: None))

    return make
