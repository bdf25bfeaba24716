"""The pieces of a layer: shapes, what they leave alone, and that chunks of rows do not matter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvsluice.models import model as model_module
from kvsluice.models.config import SHAPES
from kvsluice.models.model import Model
from kvsluice.models.weights import random_weights

CONFIG = replace(
    SHAPES["qwen3-8b"],
    num_layers=2,
    layer_windows=(None, None),
    hidden_size=48,
    intermediate_size=64,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=40,
)


def make(dtype: torch.dtype = torch.float32) -> Model:
    return Model(CONFIG, random_weights(CONFIG, dtype, torch.device("cpu"), 0), "f")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_shapes_and_dtypes(n: int, dtype: torch.dtype) -> None:
    model = make(dtype)
    x = model.embed(torch.arange(n))
    q, k, v = model.qkv(1, x)
    rotated = model.rotate(k, torch.arange(n), n)
    out = model.finish_layer(1, x, q)
    logits = model.logits(out)

    assert [tuple(t.shape) for t in (x, q, k, v)] == [(n, 48), (n, 6, 16), (n, 2, 16), (n, 2, 16)]
    assert rotated.shape == k.shape and out.shape == x.shape and logits.shape == (n, 40)
    assert {t.dtype for t in (x, q, k, v, rotated, out)} == {dtype}
    assert logits.dtype == torch.float32


def test_inputs_are_left_alone() -> None:
    model = make()
    x, attn = torch.randn(5, 48), torch.randn(5, 6, 16)
    before = x.clone(), attn.clone()

    model.qkv(0, x)
    model.rotate(attn, torch.arange(5), 5)
    model.finish_layer(0, x, attn)
    model.logits(x)

    assert torch.equal(x, before[0]) and torch.equal(attn, before[1])


def test_rotation_of_heads_at_positions_of_their_own() -> None:
    model = make()
    x = torch.randn(3, 2, 16)
    positions = torch.tensor([[0, 4], [9, 9], [70, 2]])

    rotated = model.rotate(x, positions, 80)

    for head in range(2):
        alone = model.rotate(x[:, head : head + 1], positions[:, head], 80)
        assert torch.equal(rotated[:, head : head + 1], alone)
    assert torch.equal(rotated[0, 0], x[0, 0])


def test_chunks_of_the_feed_forward_block_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, attn = torch.randn(200, 48), torch.randn(200, 6, 16)
    whole = make().finish_layer(0, x, attn)
    monkeypatch.setattr(model_module, "MLP_CHUNK_BYTES", 1)
    # the least chunk is 64 rows, so the last of 200 is a partial one
    chunked = make().finish_layer(0, x, attn)

    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)
