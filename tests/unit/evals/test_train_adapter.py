"""Adapter training on a model of a few thousand weights: steps run, the loss falls, and PEFT reads the result."""

from __future__ import annotations

import copy
import re
import zlib
from random import Random

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from kvsluice.evals.reference_model import merge_adapter
from kvsluice.evals.tasks import TaskMaker
from kvsluice.evals.train_adapter import (
    LORA_SCALE,
    TARGETS,
    Settings,
    accuracy,
    add_lora,
    learning_rate,
    lora_tensors,
    pad,
    save_adapter,
    train,
)

VOCAB = 97


def encode(text: str) -> list[int]:
    return [zlib.crc32(piece.encode()) % VOCAB for piece in re.findall(r"<\|\w+\|>|\w+|[^\w\s]", text)]


@pytest.fixture
def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def texts() -> list[list[int]]:
    random = Random(0)
    return [[random.randrange(VOCAB) for _ in range(3000)] for _ in range(2)]


SETTINGS = Settings(
    seconds=600, step_tokens=1024, rank=4, learning_rate=3e-2, lengths=(512,), max_steps=12, num_workers=0
)


def test_training_moves_only_the_adapter(tiny, texts):
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    history = train(tiny, encode, texts, SETTINGS)
    assert len(history) == 12
    assert sum(history[-3:]) < sum(history[:3])
    after = {name.replace(".linear.", "."): tensor for name, tensor in tiny.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    updates = lora_tensors(tiny)
    assert len(updates) == 2 * 2 * len(TARGETS)
    assert all(tensor.abs().sum() > 0 for tensor in updates.values())


# peft asks transformers for a property under its old name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_and_merging_read_what_training_wrote(tiny, texts, tmp_path):
    base = copy.deepcopy(tiny)
    train(tiny, encode, texts, SETTINGS)
    with torch.no_grad():
        for module in tiny.modules():
            # the file holds bfloat16; compare what it holds
            if hasattr(module, "down"):
                module.down.copy_(module.down.bfloat16().float())
                module.up.copy_(module.up.bfloat16().float())
    save_adapter(tmp_path, tiny, SETTINGS.rank)
    ids = torch.arange(40)[None] % VOCAB
    with torch.no_grad():
        trained = tiny(ids).logits
        by_peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(ids).logits
        merge_adapter(base, tmp_path)
        merged = base(ids).logits
    # fp32 with the product of two factors rounded once: a few units in the last place of logits around 1
    torch.testing.assert_close(by_peft, trained, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-5)


def test_a_fresh_adapter_changes_nothing(tiny):
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = tiny(ids).logits
        add_lora(tiny, 4)
        assert torch.equal(tiny(ids).logits, before)
    assert LORA_SCALE == 2.0


def test_padding_marks_the_places_that_predict_the_answer():
    ids, answers = pad([([5, 6, 7, 8], 2), ([9, 10], 1)])
    assert ids.tolist() == [[5, 6, 7, 8], [9, 10, 2, 2]]
    assert answers.tolist() == [[False, True, True, False], [True, False, False, False]]


def test_the_learning_rate_warms_up_and_falls():
    rates = [learning_rate(Settings(), step, step / 1000) for step in range(1001)]
    assert rates[0] < rates[49]
    assert rates[50] > rates[500] > rates[1000] > 0


def test_accuracy_counts_whole_answers(tiny, texts):
    maker = TaskMaker(encode, texts)
    assert accuracy(tiny, maker, "niah_single_1", 512, 2) == 0.0
    assert 0.0 <= accuracy(tiny, maker, "quote", 512, 2) < 0.5
