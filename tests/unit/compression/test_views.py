"""What the batched kernels are told of a cache: memory that it holds, packed as they expect."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from kvsluice.compression import bound_nbytes
from kvsluice.compression.recipe import get_recipe, resolve
from kvsluice.compression.views import FixedPlaces
from kvsluice.kernels.step_attention import View, serves

CHUNKS = {"kind": "chunks", "chunk": 4, "outliers": 3, "budget_tokens": 24, "budget_rate": 0.05, "landmark_bits": 8}
N = 301


def decoded(lab, num_new: int, windows=None, **slots):
    """A cache over a prompt of N tokens with rows appended, and its recipe and shape."""
    shape = lab.make_shape(heads=4, kv_heads=2, dim=32, layers=2, windows=windows)
    slots = {"retrieval": CHUNKS} | slots
    recipe = resolve(get_recipe("sluice-full", json.dumps(slots)), shape, N, lab.PROFILE).recipe
    prompt = lab.make_prompt(shape, N, num_new, 3)
    encoded, _ = lab.prefill(recipe, prompt)
    cache = lab.load(recipe, prompt, encoded)
    lab.decode(cache, prompt, N, N + num_new)
    return cache, recipe, shape


def told(view: View) -> Iterator[torch.Tensor]:
    segments = view.chunks.segments if view.chunks else ()
    for region in (*view.regions, *segments):
        yield from (*region.keys.tensors, *region.values.tensors)
        yield from (t for t in (region.keys.basis, region.values.basis, region.index) if t is not None)
    if view.chunks:
        yield from (*view.chunks.landmarks, *view.chunks.scales)
        yield from () if view.chunks.hidden is None else (view.chunks.hidden,)
    yield from (view.tail.k, view.tail.v)


@pytest.mark.parametrize("windows", [None, (100, None)])
def test_addresses_are_of_memory_that_the_cache_holds_and_is_reserved(lab, windows):
    """Tables keep addresses alone, so a tensor that only the view refers to would be gone when a step reads it."""
    cache, recipe, shape = decoded(lab, 40, windows)
    tensors = [t for one in cache.layers() for t in (*one.shared_tensors(), *one.own_tensors())]
    held = {t.untyped_storage().data_ptr() for t in tensors}
    named = [t for view in cache.views() for t in told(view) if t.numel()]
    assert {t.untyped_storage().data_ptr() for t in named} <= held
    assert any(view.regions[1].index is not None for view in cache.views()) == (windows is not None)
    assert cache.nbytes() <= bound_nbytes(recipe, shape, N, 40, 1, 4)


def test_segments_of_two_dtypes_are_not_read_by_one_kernel(lab):
    """A float32 model's values in its own dtype, beside a bfloat16 tail that is sealed as it is."""
    cache, _, _ = decoded(lab, 40, value_codec={"kind": "native"})
    view = cache.views()[0]
    assert {segment.values.layout.dtype for segment in view.chunks.segments} == {torch.float32, torch.bfloat16}
    assert not serves(cache.views(), 32)
    for slots, alike in (({"value_codec": {"kind": "native"}}, False), ({}, True)):
        early, _, _ = decoded(lab, 1, **slots)
        assert serves(early.views(), 32), "nothing is sealed yet"
        fixed = FixedPlaces.of(early.layers()[0].kit, early.layers())
        assert (fixed is not None) == alike, "what is sealed then is no mere change of numbers"
