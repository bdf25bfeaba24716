"""Blocks that are packed together on a GPU: the bits that each gets alone, and what packing layer by layer gives."""

from __future__ import annotations

import pytest
import torch

from kvsluice.benchmarks.synthetic import SyntheticLayers
from kvsluice.compression import make_cache
from kvsluice.compression.recipe import ModelShape, get_recipe, resolve
from kvsluice.compression.sealing import prepare_seals, settle_tails
from kvsluice.kernels.rope import apply_rope

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = ModelShape(2, 32, 8, 128, 1 << 30, (None, None))
TOKENS, LAST = 2048, 2048 + 200
CHUNKS = '{"retrieval": {"kind": "chunks", "chunk": 4, "outliers": 0, "budget_tokens": 256, "landmark_bits": 8}, '
RECIPES = {
    "lowrank": ("sluice-full", CHUNKS + '"key_codec": {"kind": "lowrank", "rank": 160, "bits": 8}}'),
    "channel": ("sluice-full", CHUNKS + '"key_codec": {"kind": "affine", "bits": 4, "group": 32, "axis": "channel"}}'),
    "float8": ("sluice-full", CHUNKS + '"key_codec": {"kind": "float8"}}'),
    "kivi": ("kivi", ""),
}


def angles(positions, lengths=None):
    turned = positions[:, None].float() * 1e-3 ** (torch.arange(64, device="cuda") / 64)
    turned = torch.cat((turned, turned), dim=-1)
    return turned.cos(), turned.sin()


def caches(recipe, count):
    """Caches of the same rows, with a block that is due."""
    made = SyntheticLayers(recipe, SHAPE, TOKENS, torch.bfloat16, torch.Generator("cuda").manual_seed(0))
    encoded = [made.layer(layer) for layer in range(SHAPE.num_layers)]
    out = [make_cache(recipe, SHAPE, TOKENS, lambda x, at: apply_rope(x, *angles(at))) for _ in range(count)]
    left = out[0].rows_until_seal(TOKENS)
    generator = torch.Generator("cuda").manual_seed(1)
    for one in encoded:
        rows = torch.randn(left, 8, 128, device="cuda", generator=generator).bfloat16()
        for cache in out:
            cache.add_layer(one)
            cache.append(one.layer, rows, rows, rows, None)
    return out, TOKENS + left


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("name", RECIPES)
@torch.inference_mode()
def test_blocks_are_packed_without_a_wait_and_as_each_would_be(name):
    recipe = resolve(get_recipe(*RECIPES[name]), SHAPE, TOKENS, {}).recipe
    (by_layer, ahead, due, company), position = caches(recipe, 4)
    by_layer._may_share = False
    assert by_layer.sealing() is None and ahead.sealing() is not None
    prepare_seals([due, company], [0, LAST], 1000, angles, [])  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        prepare_seals([ahead, company], [LAST, LAST], 1000, angles, [])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for cache in (by_layer, ahead, due):
        cache.seal(position)
    settle_tails([ahead, due])
    for one, other, late in zip(by_layer.layers(), ahead.layers(), due.layers(), strict=True):
        assert torch.equal(one.tail.rows()[0], other.tail.rows()[0])
        for part in ("keys", "values", "summary"):
            for key, want in getattr(one.grown, part).items():
                got = getattr(other.grown, part)[key]
                assert torch.equal(got.view(torch.uint8), getattr(late.grown, part)[key].view(torch.uint8))
                if name != "lowrank" and part != "summary":
                    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
        wanted, found = (segment.rotated_keys().float() for segment in (one.grown, other.grown))
        assert float((wanted - found).norm() / wanted.norm()) < 2e-3
