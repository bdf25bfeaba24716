"""The pieces of the forward pass on a CUDA device against the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvsluice.kernels.causal_attention import causal_attention
from kvsluice.models.config import SHAPES
from kvsluice.models.forward import forward_tokens
from kvsluice.models.loader import load_model
from kvsluice.models.model import Model
from kvsluice.models.sampling import SamplerState, SamplingParams
from kvsluice.models.weights import random_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("c", "m"), [(1, 700), (300, 700), (700, 700)])
@pytest.mark.parametrize("last_rows", [True, None])
def test_causal_attention(c: int, m: int, window: int | None, last_rows: bool | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, 64, generator=generator) for n, h in ((c, 8), (m, 2), (m, 2)))
    positions = torch.arange(m)
    expected = causal_attention(q, k, v, positions[m - c :], positions, window)

    for dtype, tolerance in ((torch.float32, 5e-3), (torch.bfloat16, 3e-2)):
        on_gpu = [t.to("cuda", dtype) for t in (q, k, v)]
        where = positions.to("cuda")
        out = causal_attention(*on_gpu, where[m - c :], where, window, last_rows=last_rows)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float().cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", ["llama-3.2-1b", "qwen3-0.6b"])
def test_logits(shape: str) -> None:
    config = replace(SHAPES[shape], num_layers=3, layer_windows=(None, 40, None), vocab_size=1000)
    weights = random_weights(config, torch.float32, torch.device("cpu"), 0)
    reference = Model(config, weights, "")
    ids = torch.randint(0, 1000, (200,), generator=torch.Generator().manual_seed(1))
    expected = forward_tokens(reference, ids)

    for name, tensor in vars(weights).items():
        if name != "layers":
            setattr(weights, name, tensor.cuda())
    for layer in weights.layers:
        vars(layer).update({name: t.cuda() for name, t in vars(layer).items() if t is not None})
    logits = forward_tokens(Model(config, weights, ""), ids.cuda())

    # float32 products on tensor cores may round inputs to 10 bits
    assert float((logits.cpu() - expected).abs().max()) < 1e-2 * float(expected.abs().max())


def test_large_random_model_needs_no_second_copy() -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_model("llama-3.1-8b", random_weights=True, device="cuda")

    assert model.dtype == torch.bfloat16
    assert model.weights.nbytes == 2 * 8_030_261_248
    assert torch.cuda.max_memory_allocated() - before < 1.02 * model.weights.nbytes
    logits = forward_tokens(model, torch.arange(3000, device="cuda"))
    assert bool(logits.isfinite().all()) and 0.1 < float(logits.std()) < 10


def test_sampling_draws_what_the_cpu_draws() -> None:
    logits = torch.randn(50_000, generator=torch.Generator().manual_seed(2))
    params = SamplingParams(
        temperature=0.8, top_p=0.9, top_k=200, min_p=0.001, repetition_penalty=1.1, presence_penalty=0.3, logprobs=3
    )
    tokens = []
    for device in ("cpu", "cuda"):
        state = SamplerState(params, 0, [1, 2, 3], 50_000, (0,))
        tokens.append([state.sample(logits.to(device)).token_id for _ in range(15)])
    assert tokens[0] == tokens[1]
