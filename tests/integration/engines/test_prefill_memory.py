"""What prefill holds at its peak: a hidden row and one layer's KV a token, whatever the depth."""

from __future__ import annotations

import gc
import json
from dataclasses import replace

import pytest
import torch

from kvsluice.benchmarks import prefill_memory
from kvsluice.benchmarks.live_bytes import LiveBytes
from kvsluice.benchmarks.prefill_memory import Measurement, measure
from kvsluice.compression import codecs, lowrank
from kvsluice.compression import slots as s
from kvsluice.compression.recipe import get_recipe, recipe_names
from kvsluice.errors import KvsluiceError, StoreUnavailable
from kvsluice.kernels.landmarks import reference as landmarks
from kvsluice.kernels.quantize import reference as quantize
from kvsluice.kernels.window_saliency import reference as window_saliency
from kvsluice.models.config import SHAPES, config_from_hf

CHUNK, PACK = 16, 32


POSITION_BYTES = 8
MASK_BYTES = 5 * CHUNK  # attention's explicit mask on CPU, as booleans and as float32
MASS_BYTES = 2 * 32  # accumulated scores of a row and the rows that they rank, for each of two KV heads


def extra_row_bytes(recipe: str, num_heads: int, num_layers: int) -> int:
    """What a row takes beside its hidden row and one layer's Q, K and V."""
    made = get_recipe(recipe)
    # with as many KV heads as heads, keys before RoPE take exactly the place of the queries
    total = POSITION_BYTES + MASK_BYTES if num_heads == 2 else 0
    total += MASS_BYTES if made.scorer.wants_mass else 0
    if made.sharing.layers > 1:  # rows of a whole group of layers
        kv_row_bytes = 2 * (128 // num_heads) * 4
        total += min(made.sharing.layers, num_layers) * kv_row_bytes * (1 + made.sharing.values)
    return total


def run(num_tokens: int, num_layers: int, recipe: str, num_heads: int = 8) -> Measurement:
    config = config_from_hf(
        {
            "model_type": "llama",
            "num_hidden_layers": num_layers,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_attention_heads": num_heads,
            "num_key_value_heads": 2,
            "vocab_size": 97,
            "max_position_embeddings": 4096,
        }
    )
    made = get_recipe(recipe)
    if isinstance(made.retrieval, s.ChunkLandmarks):  # fewer rows than the prompts here have
        made = replace(made, retrieval=replace(made.retrieval, budget_tokens=256))
    return measure(config, num_tokens, made, CHUNK, PACK, torch.device("cpu"))


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Encoders that work in blocks much shorter than the prompts here, as they are in earnest."""
    for module in (codecs, lowrank, landmarks, quantize, window_saliency):
        monkeypatch.setattr(module, "BLOCK_ROWS", 64)


@pytest.mark.parametrize("num_heads", [8, 2], ids=["GQA", "MHA"])
@pytest.mark.parametrize("recipe", recipe_names())
def test_a_token_takes_one_hidden_row_and_one_layers_qkv(small_blocks, recipe: str, num_heads: int) -> None:
    short, long = run(800, 3, recipe, num_heads), run(1400, 3, recipe, num_heads)
    assert short.recipe == long.recipe == recipe
    assert (long.peak_bytes - short.peak_bytes) / 600 <= long.row_bytes + extra_row_bytes(recipe, num_heads, 3)


def test_what_does_not_grow_with_the_prompt_is_a_few_packs() -> None:
    long = run(800, 4, "exact")
    assert long.recipe == "exact"
    # what does not grow with the prompt: some rows a pack, each several times as wide as a hidden row
    assert long.peak_bytes <= 800 * long.row_bytes + 8 * PACK * long.row_bytes


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_peak_does_not_grow_with_the_depth(small_blocks, recipe: str) -> None:
    # two groups of layers at least: the last layer of all computes a single row, that of an earlier group all of them
    shallow, deep = run(800, 8, recipe), run(800, 16, recipe)
    assert deep.recipe == recipe
    assert deep.peak_bytes <= 1.02 * shallow.peak_bytes
    assert deep.peak_bytes < deep.kv_cache_bytes


@pytest.mark.parametrize("where", ["qkv", "finish_layer", "logits"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, StoreUnavailable])
def test_a_prompt_that_fails_leaves_no_tensor_behind(
    monkeypatch, model, prefill, prompt, sink, where: str, error: type[Exception]
) -> None:
    def fault(*args):
        held = [torch.ones(1000), *(arg * 2 for arg in args if isinstance(arg, torch.Tensor))]
        raise error(f"no room beside {len(held)} tensors")

    engine, outs = prefill.engine(chunk=16, pack=64), [sink("a"), sink("b")]
    gc.collect()
    gc.disable()  # memory must not wait for the garbage collector
    try:
        with LiveBytes() as counter:
            for out in outs:
                engine.submit(prefill.job(out.name, prompt(30)), out)
            engine.step()
            assert counter.live_bytes > 0
            monkeypatch.setattr(type(model), where, fault)
            prefill.run(engine)
            for out in outs:
                assert isinstance(out.error, KvsluiceError) and out.num_ends == 1
                out.layers.clear()
            assert counter.live_bytes == 0
    finally:
        gc.enable()


def test_live_bytes_counts_what_is_alive() -> None:
    outside = torch.ones(50)
    with LiveBytes() as counter:
        a = torch.ones(100)
        view = a[10:20]
        b = a + 1
        assert counter.live_bytes == 800
        del a
        assert counter.live_bytes == 800, "a view keeps its storage alive"
        del view
        assert counter.live_bytes == 400
        outside.mul_(2)
        b.add_(outside[:1])
        assert counter.live_bytes == 400, "what was made before does not count"
        del b
    assert (counter.live_bytes, counter.peak_bytes) == (0, 800)


def test_the_command_prints_a_line_a_run(monkeypatch, capsys) -> None:
    tiny = config_from_hf(
        {
            "model_type": "llama",
            "num_hidden_layers": 3,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 11,
        }
    )
    monkeypatch.setitem(SHAPES, "tiny", tiny)
    prefill_memory.main("--model tiny --tokens 40 80 --layers 2 3 --chunk-tokens 16 --device cpu".split())
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["num_layers"], line["num_tokens"]) for line in lines] == [(2, 40), (2, 80), (3, 40), (3, 80)]
    assert [line["bytes_per_token"] is None for line in lines] == [True, False, True, False]
