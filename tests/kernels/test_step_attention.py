"""A step's kernels over the caches of many sequences, against what each cache computes by itself."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvsluice.compression import make_cache
from kvsluice.compression.recipe import get_recipe, resolve
from kvsluice.kernels.step_attention import StepAttention, sequence_block, serves, step_tables

_PATH = Path(__file__).parent.parent / "unit" / "compression" / "conftest.py"
_SPEC = importlib.util.spec_from_file_location("compression_lab", _PATH)
assert _SPEC is not None and _SPEC.loader is not None
lab = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = lab
_SPEC.loader.exec_module(lab)

CHUNKS = '{"retrieval": {"kind": "chunks", "chunk": 4, "outliers": 3, "budget_tokens": 48, "budget_rate": 0.05, '
RECIPES = {
    "exact": "exact",
    "fastkv": "fastkv",
    "kivi": "kivi",
    "kivi-2bit": "kivi-2bit",
    "mikv": 'mikv:{"budget": {"kind": "uniform", "rate": 0.4, "recent": 0.5}}',
    "fp8": "fp8",
    "streaming": "streaming",
    "lowrank": "lowrank",
    "xkv-kv": "xkv-kv",
    "pyramidkv": "pyramidkv",
    "shadowkv": "shadowkv:" + CHUNKS + '"landmark_bits": 16}}',
    "sluice": "sluice:" + CHUNKS + '"landmark_bits": 8}}',
    "sluice-every4": "sluice:" + CHUNKS + '"landmark_bits": 8, "select_every": 4}}',
    "sluice-channel": "sluice-full:" + CHUNKS + '"landmark_bits": 8}, "key_codec": {"kind": "affine", "bits": 4, '
    '"group": 32, "axis": "channel"}}',
    "sluice-lowrank": "sluice-full:" + CHUNKS + '"landmark_bits": 8}, "key_codec": {"kind": "lowrank", "share": 0.5, '
    '"bits": 8}}',
}


def recipe_of(name: str, shape, num_tokens: int):
    base, _, slots = RECIPES[name].partition(":")
    resolved = resolve(get_recipe(base, slots), shape, num_tokens, {"tsp_layer": 0, "fastkv_layer": 0, "tsp_rate": 0.3})
    assert resolved.fallback_reason is None, resolved.fallback_reason
    return resolved.recipe


class Host:
    """Pages of host memory without a bound."""

    page_nbytes = 4096

    def take(self, num_pages: int) -> SimpleNamespace:
        return SimpleNamespace(views=tuple(torch.zeros(4096, dtype=torch.uint8) for _ in range(num_pages)))


def both(recipe, prompt):
    encoded, _ = lab.prefill(recipe, prompt)
    return lab.load(recipe, prompt, encoded), lab.load(recipe, prompt, encoded)


def frequencies(dim: int, device) -> torch.Tensor:
    """Those of the lab's RoPE."""
    return lab.frequencies(dim).to(device)


def run_step(caches, prompts, positions, shape, device) -> list[torch.Tensor]:
    """Append and attend one row of every sequence through the kernels; per layer [rows, H, d]."""
    blocks = []
    for cache, prompt in zip(caches, prompts, strict=True):
        cache.reserve(1, prompt.k[0][:1])
        blocks.append(sequence_block(cache.views()))
        assert serves(cache.views(), shape.head_dim)
    tables = step_tables(blocks).padded(len(blocks) + 1).to(device)
    step = StepAttention(tables, shape.num_kv_heads, frequencies(shape.head_dim, device), 1.0)
    at = torch.tensor([*positions, 0], device=device)
    outs = []
    for layer in range(shape.num_layers):
        rows = [
            torch.stack([getattr(p, name)[layer][i] for p, i in zip((*prompts, prompts[0]), at.tolist(), strict=True)])
            for name in ("k_pre", "k", "v", "q")
        ]
        step.append(layer, *rows[:3], at)
        out = step.attend(layer, rows[3], at, shape.layer_windows[layer])
        assert not out[-1].any(), "an idle row attends to nothing"
        outs.append(out[:-1])
    for cache in caches:
        cache.advance(1)
    return outs


@pytest.mark.parametrize("name", RECIPES)
def test_a_batch_gives_what_each_cache_gives(name, device):
    if device.type == "cuda":
        pytest.skip("the lab's caches lie on the CPU; tests/gpu runs engines")
    shape = lab.make_shape(heads=6, kv_heads=2, dim=32, layers=2)
    prompts = [lab.make_prompt(shape, n, 41, seed) for seed, n in enumerate((300, 345))]
    pairs = [both(recipe_of(name, shape, prompt.num_tokens), prompt) for prompt in prompts]
    positions = [prompt.num_tokens + 40 for prompt in prompts]
    expected = []
    for pair, prompt, at in zip(pairs, prompts, positions, strict=True):
        for cache in pair:
            lab.decode(cache, prompt, prompt.num_tokens, at, run=64)
        expected.append(lab.step(pair[0], prompt, at, at + 1))
    found = run_step([other for _, other in pairs], prompts, positions, shape, device)
    for layer in range(shape.num_layers):
        want = torch.cat([one[layer] for one in expected])
        torch.testing.assert_close(found[layer], want, atol=1e-4, rtol=1e-3)
    for own, other in pairs:
        assert own.counter.bytes_read >= other.counter.bytes_read > 0


@pytest.mark.parametrize(
    "names", [("sluice", "shadowkv", "exact"), ("shadowkv", "sluice", "fp8"), ("pyramidkv", "exact")], ids="+".join
)
def test_rows_of_different_recipes_do_not_meet(names, device):
    """Memory that is not written holds NaN, and layers with fewer items than others leave some idle."""
    if device.type == "cuda":
        pytest.skip("the lab's caches lie on the CPU; tests/gpu runs engines")
    shape = lab.make_shape(heads=6, kv_heads=2, dim=32, layers=2)
    lengths = (1400 if names[0] == "pyramidkv" else 300, 345, 280)
    prompts = [lab.make_prompt(shape, n, 1, seed) for seed, n in enumerate(lengths[: len(names)])]
    pairs = [both(recipe_of(name, shape, p.num_tokens), p) for name, p in zip(names, prompts, strict=True)]
    positions = [prompt.num_tokens for prompt in prompts]
    expected = []
    for pair, prompt, at in zip(pairs, prompts, positions, strict=True):
        for cache in pair:
            cache.seal(at)
        expected.append(lab.step(pair[0], prompt, at, at + 1))
    torch.use_deterministic_algorithms(True)
    try:
        found = run_step([other for _, other in pairs], prompts, positions, shape, device)
    finally:
        torch.use_deterministic_algorithms(False)
    for layer in range(shape.num_layers):
        want = torch.cat([one[layer] for one in expected])
        torch.testing.assert_close(found[layer], want, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 64), (8, 2, 128), (8, 1, 96)])
@pytest.mark.parametrize("name", ["exact", "kivi", "sluice-lowrank"])
def test_groups_and_head_sizes(name, heads, kv_heads, dim, device):
    if device.type == "cuda":
        pytest.skip("the lab's caches lie on the CPU; tests/gpu runs engines")
    shape = lab.make_shape(heads=heads, kv_heads=kv_heads, dim=dim, layers=1)
    prompt = lab.make_prompt(shape, 290, 1, 3)
    one, other = both(recipe_of(name, shape, 290), prompt)
    one.seal(290)
    other.seal(290)
    want = lab.step(one, prompt, 290, 291)
    found = run_step([other], [prompt], [290], shape, device)
    torch.testing.assert_close(found[0], want[0], atol=1e-4, rtol=1e-3)


def test_steps_that_attend_to_what_an_earlier_one_chose(device):
    """Steps through the kernels, and the same rows through the reference in one run."""
    if device.type == "cuda":
        pytest.skip("the lab's caches lie on the CPU; tests/gpu runs engines")
    shape = lab.make_shape(heads=4, kv_heads=2, dim=32, layers=2)
    prompt = lab.make_prompt(shape, 343, 7, 3)
    one, other = both(recipe_of("sluice-every4", shape, 343), prompt)
    expected = lab.decode(one, prompt, 343, 350, run=64)
    for ahead in range(7):
        other.seal(343 + ahead)
        found = run_step([other], [prompt], [343 + ahead], shape, device)
        for layer, rows in enumerate(found):
            torch.testing.assert_close(rows[0], expected[layer][ahead], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("sluice",), marks=pytest.mark.acceptance, id="sluice"),
        pytest.param(("shadowkv", "sluice", "exact"), id="shadowkv+sluice+exact"),
    ],
)
def test_values_in_host_memory_give_the_same_bits(names, device):
    """The hot set has two slots a chosen chunk, so chunks come, go and come again; some rows are sealed on the way."""
    if device.type == "cuda":
        pytest.skip("the lab's caches lie on the CPU; tests/gpu runs engines")
    shape = lab.make_shape(heads=4, kv_heads=2, dim=32, layers=2)
    num_new = 2 if len(names) > 1 else 6
    prompts = [lab.make_prompt(shape, 420 + 31 * i, num_new, i) for i in range(len(names))]
    near, far = [], []
    for name, prompt in zip(names, prompts, strict=True):
        recipe = recipe_of(name, shape, prompt.num_tokens)
        encoded, _ = lab.prefill(recipe, prompt)
        near.append(lab.load(recipe, prompt, encoded))
        far.append(make_cache(recipe, shape, prompt.num_tokens, lab.rope, Host()))
        for one in encoded:
            far[-1].add_layer(one)
    assert sum(cache.host_nbytes() > 0 for cache in far) == len([name for name in names if name != "exact"])
    for ahead in range(num_new):
        positions = [prompt.num_tokens + ahead for prompt in prompts]
        for cache, at in zip((*near, *far), positions * 2, strict=True):
            cache.seal(at)
        want = run_step(near, prompts, positions, shape, device)
        for found, expected in zip(run_step(far, prompts, positions, shape, device), want, strict=True):
            assert torch.equal(found, expected)
    assert [cache.counter.bytes_read for cache in far] == [cache.counter.bytes_read for cache in near]


def test_rows_that_lie_elsewhere_than_kernels_look_are_not_served(device):
    shape = lab.make_shape(heads=6, kv_heads=2, dim=32, layers=1)
    prompt = lab.make_prompt(shape, 290, 1, 3)
    _, cache = both(recipe_of("exact", shape, 290), prompt)
    cache.reserve(1, prompt.k[0][:1])
    (view,) = cache.views()
    assert serves([view], 32)
    (rows,) = view.regions[0].keys.tensors
    shifted = torch.empty(rows.numel() + 1, dtype=rows.dtype)[1:].view(rows.shape)
    for other in (shifted, rows.transpose(1, 2).contiguous().transpose(1, 2)):
        region = replace(view.regions[0], keys=replace(view.regions[0].keys, tensors=(other,)))
        assert not serves([replace(view, regions=(region, *view.regions[1:]))], 32)
