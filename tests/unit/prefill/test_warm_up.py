"""Before the first prompt every shape of attention that whole chunks need has been asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvsluice.kernels.causal_attention import pieces
from kvsluice.models.config import config_from_hf
from kvsluice.models.model import Model
from kvsluice.models.weights import random_weights
from kvsluice.services.prefill import warm_up


@pytest.fixture(scope="module")
def model() -> Model:
    config = config_from_hf(
        {
            "model_type": "llama",
            "num_hidden_layers": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 16,
            "max_position_embeddings": 5000,
        }
    )
    return Model(config, random_weights(config, torch.float32, torch.device("cpu"), 0), fingerprint="f" * 32)


def shapes(c: int, m: int) -> set[tuple[int, int, bool]]:
    asked = set()

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> pieces.Partial:
        asked.add((len(q), len(k), causal))
        return q, q.new_zeros(q.shape[1], len(q))

    q, k = torch.zeros(c, 1, 1), torch.zeros(m, 1, 1)
    pieces.lower_right(q, k, k, attend, lambda partials, dtype: partials[0])
    return asked


@pytest.mark.parametrize(("chunk", "reach"), [(128, 5000), (512, 5000), (4096, 5000), (8192, 5000), (256, 100)])
def test_one_call_meets_all_shapes_of_whole_chunks(monkeypatch, model: Model, chunk: int, reach: int) -> None:
    calls = []
    monkeypatch.setattr(warm_up, "causal_attention", lambda q, k, *args, **options: calls.append((len(q), len(k))))
    monkeypatch.setattr(model, "config", replace(model.config, max_position_embeddings=reach))
    warm_up.plan_attention(model, chunk)
    ((c, m),) = calls
    assert c == chunk and m <= max(reach, chunk)
    needed = set().union(*(shapes(chunk, end) for end in range(chunk, m + 1, chunk)))
    assert shapes(c, m) >= needed - {(chunk, m, False)}


def test_it_is_a_call_that_attention_takes(model: Model) -> None:
    warm_up.plan_attention(model, 512)
