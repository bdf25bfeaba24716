"""Values in host memory: attention sees the same bits, and both memories hold what was reserved."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

from kvsluice.compression import bound_nbytes, host_pages, make_cache
from kvsluice.compression.placement import host_placement
from kvsluice.compression.recipe import get_recipe, resolve

CHUNKS = '{"retrieval": {"kind": "chunks", "chunk": 4, "outliers": 3, "budget_tokens": 24, "budget_rate": 0.05, '
RECIPES = {
    "shadowkv": "shadowkv:" + CHUNKS + '"landmark_bits": 16}}',
    "sluice": "sluice:" + CHUNKS + '"landmark_bits": 8}}',
    "sluice-full": "sluice-full:" + CHUNKS + '"landmark_bits": 8}}',
    "dense-values": "sluice-full:" + CHUNKS + '"landmark_bits": 8}, "value_codec": {"kind": "dense"}}',
}
STAYING = ("exact", "kivi", "fp8", "lowrank", "xkv", "streaming")


@dataclass
class Pages:
    views: tuple[torch.Tensor, ...]


class Host:
    """Pages without a bound, which counts those that were taken."""

    def __init__(self, page_nbytes: int) -> None:
        self.page_nbytes = page_nbytes
        self.num_taken = 0

    def take(self, num_pages: int) -> Pages:
        self.num_taken += num_pages
        return Pages(tuple(torch.full((self.page_nbytes,), 255, dtype=torch.uint8) for _ in range(num_pages)))


def recipe_of(name: str, lab, shape, num_tokens: int):
    base, _, slots = RECIPES.get(name, name).partition(":")
    resolved = resolve(get_recipe(base, slots), shape, num_tokens, lab.PROFILE | {"tsp_layer": 0})
    assert resolved.fallback_reason is None, resolved.fallback_reason
    return resolved.recipe


def load(lab, recipe, prompt, encoded, host):
    cache = make_cache(recipe, prompt.shape, prompt.num_tokens, lab.rope, host)
    for one in encoded:
        cache.add_layer(one)
    return cache


@pytest.mark.parametrize("page_nbytes", [4096, 1 << 16])
@pytest.mark.parametrize("name", RECIPES)
def test_attention_sees_the_same_bits_wherever_values_lie(name, page_nbytes, lab):
    shape = lab.make_shape(heads=4, kv_heads=2, dim=32, layers=2)
    num_tokens, num_new = 500, 150
    prompt = lab.make_prompt(shape, num_tokens, num_new, 3)
    recipe = recipe_of(name, lab, shape, num_tokens)
    encoded, _ = lab.prefill(recipe, prompt)
    host = Host(page_nbytes)
    near, far = lab.load(recipe, prompt, encoded), load(lab, recipe, prompt, encoded, host)
    assert host.num_taken == host_pages(recipe, shape, num_tokens, 4, page_nbytes) > 0
    assert far.host_nbytes() == host.num_taken * page_nbytes
    assert near.host_nbytes() == 0
    twin = far.fork()
    for one in (far, twin):
        found = lab.decode(one, prompt, num_tokens, num_tokens + num_new, run=16)
        expected = lab.decode(near.fork(), prompt, num_tokens, num_tokens + num_new, run=16)
        for got, want in zip(found, expected, strict=True):
            assert torch.equal(got, want)
    assert far.counter.bytes_read == twin.counter.bytes_read > 0


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_reserved_is_what_is_held(name, lab):
    shape = lab.make_shape(heads=4, kv_heads=2, dim=32, layers=2)
    num_tokens, num_new = 500, 150
    prompt = lab.make_prompt(shape, num_tokens, num_new, 3)
    recipe = recipe_of(name, lab, shape, num_tokens)
    encoded, _ = lab.prefill(recipe, prompt)
    near, far = lab.load(recipe, prompt, encoded), load(lab, recipe, prompt, encoded, Host(4096))
    assert far.nbytes() < near.nbytes()
    forks = [far.fork(), far.fork()]
    for cache in forks:
        lab.decode(cache, prompt, num_tokens, num_tokens + num_new, run=16)
    held = forks[0].shared_nbytes() + sum(cache.own_nbytes() for cache in forks)
    bound = bound_nbytes(recipe, shape, num_tokens, num_new, 2, 4, 4096)
    assert held <= bound < bound_nbytes(recipe, shape, num_tokens, num_new, 2, 4)
    assert bound - held < 0.1 * bound


@pytest.mark.parametrize("name", STAYING)
def test_recipes_that_read_everything_keep_it_on_the_device(name, lab):
    shape = lab.make_shape(heads=4, kv_heads=2, dim=32, layers=2)
    recipe = recipe_of(name, lab, shape, 2000)
    assert host_pages(recipe, shape, 2000, 4, 4096) == 0
    assert bound_nbytes(recipe, shape, 2000, 9, 1, 4, 4096) == bound_nbytes(recipe, shape, 2000, 9, 1, 4)


def test_a_hot_set_that_would_hold_nearly_all_is_not_worth_it(lab):
    shape = lab.make_shape(heads=4, kv_heads=2, dim=32, layers=2)
    recipe = recipe_of("sluice-full", lab, shape, 300)
    places = [host_placement(recipe, shape, n, 0, "float32", 4096) for n in (90, 300)]
    assert [place is None for place in places] == [True, False]
    assert host_placement(recipe, shape, 300, 0, "float32", 64) is None, "a page has no room for a chunk"


def test_a_hot_set_has_no_more_slots_than_their_numbers_reach(lab):
    """At a million tokens a step that attends to a sixteenth, token by token, would want 131,072 of them."""
    shape = lab.make_shape(heads=4, kv_heads=2, dim=32, layers=2)
    wide = {"retrieval": {"kind": "chunks", "chunk": 1, "outliers": 0, "budget_tokens": 32, "budget_rate": 0.0625}}
    recipe = resolve(get_recipe("sluice-full", json.dumps(wide)), shape, 1 << 20, lab.PROFILE).recipe
    places = [host_placement(recipe, shape, n, 0, "bfloat16", 1 << 20) for n in (1 << 17, 1 << 18, 1 << 20)]
    assert [None if place is None else place.num_slots for place in places] == [1 << 14, None, None]
