"""A tiny random model with a tokenizer of bytes, small texts, and the real model where only that will do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from kvsluice.evals.options import EvalOptions, parse_options
from kvsluice.evals.texts import python_topics, token_ids
from kvsluice.models.checkpoint import DEFAULT_MODEL
from kvsluice.models.loader import load_model
from kvsluice.models.tokenizer import load_tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def save_tiny(folder: Path, num_layers: int) -> Path:
    """A random Llama, as transformers saves it, with a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(SPECIAL))
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(alphabet) + len(SPECIAL),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A model of two layers."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", 2)


@pytest.fixture(scope="session")
def deep_folder(tmp_path_factory) -> Path:
    """One of four layers, so that there are several behind which rows may be selected."""
    return save_tiny(tmp_path_factory.mktemp("models") / "deep", 4)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """Held-out texts of random words."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "heldout").mkdir()
    words = "sun moon river stone bread light seven never under walks sings holds".split()
    for name in ("bible", "python", "debian"):
        text = " ".join(Random(name).choices(words, k=2000))
        (folder / "heldout" / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture
def options(tiny_folder, text_folder, tmp_path) -> Callable[..., EvalOptions]:
    """Checked options over the tiny model; `options(suite="niah")`."""

    def make(**given: object) -> EvalOptions:
        base: dict[str, object] = {
            "suite": "ppl",
            "model": str(tiny_folder),
            "texts": str(text_folder),
            "recipe": "exact,kivi",
            "context": "300",
            "samples": "2",
            "json": str(tmp_path / "results.json"),
            "commit": "some-commit",
        }
        if given.get("suite", "ppl") == "ppl":
            base["scored_tokens"] = "40"
        return parse_options(base | given)

    return make


@pytest.fixture(scope="session")
def longctx():
    """The default model on the CPU."""
    return load_model(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def encode():
    """The default model's tokenizer."""
    return load_tokenizer(DEFAULT_MODEL).encode


@pytest.fixture(scope="session")
def topics(encode) -> dict[str, list[int]]:
    """Token ids of a part of Python's help."""
    return {"python-topics": token_ids(encode, python_topics()[:200_000])}
