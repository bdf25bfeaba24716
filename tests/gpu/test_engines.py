"""The engines on a CUDA device: the same answers as transformers in float32, and every recipe in bfloat16."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvsluice.compression.recipe import recipe_names
from kvsluice.evals.pipeline import LocalPipeline
from kvsluice.models.config import SHAPES
from kvsluice.models.loader import load_model
from kvsluice.models.model import Model
from kvsluice.models.sampling import SamplingParams
from kvsluice.models.weights import random_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VOCAB = 101


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random tiny Llama, as transformers saves it. Wide initial values keep top-2 gaps far above fp32 noise."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.3,
        eos_token_id=1,
        bos_token_id=0,
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def random_prompt(length: int, seed: int, vocab: int = VOCAB) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, vocab, (length,), generator=generator).tolist())


@pytest.mark.parametrize("length", [5, 513, 2000])
def test_exact_equals_transformers_generate(folder, length):
    torch.backends.cuda.matmul.allow_tf32 = False
    prompt = random_prompt(length, seed=length)
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda()
    ids = torch.tensor([prompt], device="cuda")
    want = reference.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)[0, length:]
    model = load_model(str(folder), dtype=torch.float32, device="cuda")
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    got = LocalPipeline(model).generate(prompt, "exact", params)
    assert got.token_ids[0] == want.tolist()


@pytest.fixture(scope="module")
def large_heads() -> Model:
    """Four layers with the heads of an 8B model (32 query and 8 KV heads of 128), in bfloat16."""
    from dataclasses import replace

    config = SHAPES["llama-3.1-8b"]
    config = replace(config, num_layers=4, vocab_size=1024, layer_windows=config.layer_windows[:4])
    return Model(config, random_weights(config, torch.bfloat16, torch.device("cuda"), 0), fingerprint="heads-of-8b")


@pytest.mark.parametrize("name", sorted(recipe_names()))
def test_every_recipe_decodes_past_a_seal_block_in_bfloat16(large_heads, name):
    pipeline = LocalPipeline(large_heads, {"tsp_layer": 1, "fastkv_layer": 1, "tsp_rate": 0.2})
    prompts = [random_prompt(length, seed=length, vocab=1024) for length in (4099, 6000)]
    params = SamplingParams(max_tokens=72, temperature=0.0, ignore_eos=True)
    results = pipeline.generate_many([(prompt, name, params) for prompt in prompts])
    for result in results:
        assert result.resolved.fallback_reason is None
        assert len(result.token_ids[0]) == 72
        assert max(result.token_ids[0]) < 1024
    pipeline.decode.check_integrity()
    assert pipeline.decode.num_running == 0
