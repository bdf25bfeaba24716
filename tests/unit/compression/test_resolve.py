"""Resolution: open numbers filled, misfits with the model refused, short prompts told why they run `exact`."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsluice.compression import slots as s
from kvsluice.compression.layout import NEVER, layer_layout, layer_specs, rows_until_seal, sealed_end
from kvsluice.compression.recipe import ModelShape, Recipe, default_rank, fill, get_recipe, recipe_names, resolve
from kvsluice.errors import InvalidRecipe

SMOLLM = ModelShape(30, 9, 3, 64, 8192, (None,) * 30)
LATE = replace(get_recipe("fastkv"), propagation=s.TspPropagation(layer=29, rate=0.2))
WIDE = {"kind": "affine", "axis": "channel", "group": 64}
LLAMA = ModelShape(32, 32, 8, 128, 131072, (None,) * 32)


def test_rank_is_the_papers_share_of_the_width() -> None:
    assert default_rank(LLAMA) == 160 and default_rank(SMOLLM) == 30
    assert resolve(get_recipe("shadowkv"), LLAMA, 131072, {}).recipe.key_codec == s.LowRank(rank=160, bits=16)
    assert resolve(get_recipe("shadowkv"), LLAMA, 131072, {}).recipe.retrieval.selected_chunks(131072) == 256


def test_open_numbers_come_from_the_profile_else_from_the_shape() -> None:
    profile = {
        "tsp_layer": 19,
        "fastkv_layer": 14,
        "tsp_rate": 0.25,
        "key_codec": {"kind": "affine", "axis": "channel"},
    }
    sluice = resolve(get_recipe("sluice"), SMOLLM, 4096, profile).recipe
    assert sluice.propagation == s.TspPropagation(layer=19, rate=0.25, window=64, chunk_aligned=True)
    assert (sluice.retrieval.chunk, sluice.retrieval.outliers) == (4, 0)
    assert sluice.key_codec == s.Affine(bits=4, axis="channel", group=32)
    fastkv = resolve(get_recipe("fastkv"), SMOLLM, 4096, profile).recipe
    assert fastkv.propagation == s.TspPropagation(layer=14, rate=0.2, window=8), "as published, whatever tsp_rate says"
    bare = resolve(get_recipe("sluice"), LLAMA, 4096, {}).recipe
    assert (bare.propagation.layer, bare.propagation.rate) == (15, 0.2)
    assert bare.key_codec == s.LowRank(rank=160, bits=8)


def test_presets_resolve_through_the_profile() -> None:
    profile = {
        "tsp_layer": 12,
        "tsp_rate": 0.3,
        "tsp_window": 128,
        "tsp_recall": 0.05,
        "fastkv_layer": 9,
        "fastkv_rate": 0.4,
        "fastkv_window": 32,
        "key_codec": {"kind": "lowrank", "rank": 40, "bits": 8},
        "chunk": 2,
        "outliers": 16,
    }
    shape = replace(SMOLLM, hidden_size=576)
    balanced = resolve(get_recipe("balanced"), shape, 8192, profile).recipe
    assert balanced.propagation == s.TspPropagation(layer=12, rate=0.3, window=128, chunk_aligned=True, recall=0.05)
    assert balanced.key_codec == s.LowRank(rank=40, bits=8)
    assert (balanced.retrieval.chunk, balanced.retrieval.outliers) == (2, 16)
    assert resolve(get_recipe("sluice-full"), SMOLLM, 8192, profile).recipe.retrieval == balanced.retrieval
    fast = resolve(get_recipe("fast"), SMOLLM, 8192, profile).recipe
    assert fast.propagation == s.TspPropagation(layer=9, rate=0.4, window=32)
    assert resolve(get_recipe("exact"), SMOLLM, 8192, profile).recipe == get_recipe("exact")


def test_a_number_that_is_given_is_not_the_profiles() -> None:
    slots = {
        "propagation": {"kind": "tsp", "window": 64, "chunk_aligned": True},
        "retrieval": {"kind": "chunks", "chunk": 4, "outliers": None},
    }
    profile = {"tsp_window": 128, "chunk": 2, "outliers": 16, "tsp_recall": 0.05}
    recipe = resolve(get_recipe("sluice", json.dumps(slots)), SMOLLM, 8192, profile).recipe
    assert (recipe.propagation.window, recipe.propagation.recall, recipe.retrieval.chunk) == (64, 0.0, 4)
    assert recipe.retrieval.outliers == 16


@pytest.mark.parametrize("name", recipe_names())
def test_a_resolved_recipe_has_no_open_number(name: str) -> None:
    resolved = resolve(get_recipe(name), SMOLLM, 4096, {})
    assert resolved.fallback_reason is None and resolved.requested == name == resolved.recipe.name
    assert "null" not in resolved.recipe.to_json() and "profile" not in resolved.recipe.to_json()
    assert resolve(resolved.recipe, SMOLLM, 4096, {"tsp_layer": 3}).recipe == resolved.recipe


@pytest.mark.parametrize(
    ("recipe", "field"),
    [
        (get_recipe("fastkv"), "recipe.propagation.layer"),
        (replace(get_recipe("fastkv"), propagation=s.TspPropagation(layer=3)), "recipe.propagation.rate"),
        (get_recipe("shadowkv"), "recipe.key_codec.rank"),
        (replace(get_recipe("exact"), key_codec=s.ProfileKeys()), "recipe.key_codec.kind"),
    ],
)
def test_an_open_number_is_named(recipe: Recipe, field: str) -> None:
    with pytest.raises(InvalidRecipe) as caught:
        recipe.check_resolved()
    assert caught.value.field == field
    fill(recipe, SMOLLM, {}).check_resolved()


@pytest.mark.parametrize("name", recipe_names())
def test_a_prompt_too_short_for_a_recipe_runs_exact_and_says_why(name: str) -> None:
    shortest = min(n for n in range(1, 2000) if resolve(get_recipe(name), SMOLLM, n, {}).fallback_reason is None)
    for n in {1, max(1, shortest - 1)} - {shortest}:
        resolved = resolve(get_recipe(name), SMOLLM, n, {})
        assert resolved.recipe == get_recipe("exact") and str(n) in (resolved.fallback_reason or "")
        assert resolved.requested == name
    for n in range(shortest, shortest + 200):
        resolved = resolve(get_recipe(name), SMOLLM, n, {})
        if resolved.fallback_reason is None:
            at = [layer_layout(resolved.recipe, n, layer) for layer in (0, 29)]
            left = sum(one.num_rows - one.num_sinks - one.num_sealed - one.num_tail for one in at)
            assert left > 0 if resolved.recipe.budget.fixed else all(one.num_sealed > 0 for one in at)
    if name != "exact":
        assert shortest > 8


@pytest.mark.parametrize("num_tokens", [365, 600, 900, 1100, 1300])
def test_no_layer_packs_fewer_rows_than_the_rank(num_tokens: int) -> None:
    few = s.ChunkLandmarks(chunk=4, outliers=0, budget_tokens=64)
    resolved = resolve(replace(get_recipe("sluice"), retrieval=few), LLAMA, num_tokens, {})
    if resolved.fallback_reason is None:
        assert layer_layout(resolved.recipe, num_tokens, 31).num_sealed >= resolved.recipe.key_codec.min_rows() == 160
    else:
        assert num_tokens < 1300 and "the rank, 160" in resolved.fallback_reason


@pytest.mark.parametrize(
    ("recipe", "profile", "field", "allowed"),
    [
        (
            replace(get_recipe("fastkv"), propagation=s.TspPropagation(layer=29, rate=0.2)),
            {},
            "recipe.propagation.layer",
            "0 to 28",
        ),
        (get_recipe("fastkv"), {"fastkv_layer": 30}, "recipe.propagation.layer", "0 to 28"),
        (get_recipe("sluice"), {"tsp_layer": "19"}, "recipe.propagation.layer", "0 to 28"),
        (get_recipe("sluice"), {"tsp_rate": 7}, "recipe.propagation.rate", "at most 1"),
        (get_recipe("sluice"), {"tsp_window": 32}, "recipe.propagation.window", "at least 64"),
        (get_recipe("sluice"), {"chunk": 3}, "recipe.retrieval.chunk", "1, 2, 4, 8, 16"),
        (get_recipe("sluice"), {"chunk": 8}, "recipe.window.sinks", "a multiple of the chunk, 8"),
        (get_recipe("sluice"), {"outliers": -1}, "recipe.retrieval.outliers", "0 to 4096"),
        (get_recipe("sluice"), {"key_codec": {"kind": "profile"}}, "recipe.key_codec", "lowrank"),
        (
            get_recipe("sluice"),
            {"key_codec": {"kind": "affine", "axis": "channel", "group": 64}},
            "recipe.propagation.window",
            "96",
        ),
        (replace(get_recipe("shadowkv"), key_codec=s.LowRank(rank=193)), {}, "recipe.key_codec.rank", "1 to 192"),
    ],
)
def test_slots_that_do_not_fit_the_model(recipe: object, profile: dict[str, object], field: str, allowed: str) -> None:
    with pytest.raises(InvalidRecipe) as caught:
        resolve(recipe, SMOLLM, 4096, profile)
    assert caught.value.field == field and allowed in caught.value.allowed


def test_layers_are_joined_up_to_a_width_that_prefill_can_factor() -> None:
    full = replace(get_recipe("xkv"), key_codec=s.LowRank(share=1.0), sharing=s.LayerGroups(layers=16))
    assert resolve(full, LLAMA, 131072, {}).fallback_reason is None
    assert resolve(replace(full, sharing=s.LayerGroups(layers=64)), SMOLLM, 131072, {}).fallback_reason is None
    with pytest.raises(InvalidRecipe) as caught:
        resolve(replace(full, sharing=s.LayerGroups(layers=17)), LLAMA, 131072, {})
    assert caught.value.field == "recipe.sharing.layers" and "1 to 16" in caught.value.allowed


def test_a_share_of_a_short_prompt_that_is_no_window_runs_exact() -> None:
    streaming = get_recipe("streaming")
    assert "199 tokens leave 15 local rows" in (resolve(streaming, SMOLLM, 199, {}).fallback_reason or "")
    assert resolve(streaming, SMOLLM, 200, {}).fallback_reason is None
    no_sinks = replace(streaming, window=s.ExactEnds(local_rate=0.001, seal_block=1))
    assert "0 local rows" in (resolve(no_sinks, SMOLLM, 336, {}).fallback_reason or "")
    for window in (s.ExactEnds(sinks=4, seal_block=16), s.ExactEnds(local=2, seal_block=16)):  # as asked for
        assert resolve(replace(streaming, window=window), SMOLLM, 64, {}).fallback_reason is None


def test_a_model_of_one_layer_cannot_propagate_selectively() -> None:
    one = replace(SMOLLM, num_layers=1, layer_windows=(None,))
    with pytest.raises(InvalidRecipe, match="full"):
        resolve(get_recipe("fastkv"), one, 4096, {})
    assert resolve(get_recipe("shadowkv"), one, 4096, {}).fallback_reason is None


def test_shape_survives_json() -> None:
    shape = replace(SMOLLM, layer_windows=(None, 512) * 15)
    assert ModelShape.from_json(shape.to_json()) == shape
    assert SMOLLM.bf16_kv_bytes(1) == 2 * 2 * 30 * 192


@settings(max_examples=150, deadline=None)
@given(
    num_tokens=st.integers(1, 5000),
    sinks=st.sampled_from([0, 4, 8]),
    local=st.integers(0, 40),
    seal_block=st.sampled_from([0, 8, 32]),
    chunk=st.sampled_from([2, 4]),
    rate=st.floats(0.05, 1.0),
)
def test_regions_lie_on_one_grid_and_add_up(
    num_tokens: int, sinks: int, local: int, seal_block: int, chunk: int, rate: float
) -> None:
    recipe = replace(
        get_recipe("sluice"),
        propagation=s.TspPropagation(layer=3, rate=rate, window=80, chunk_aligned=True),
        key_codec=s.Affine(bits=4, axis="channel", group=32),
        retrieval=s.ChunkLandmarks(chunk=chunk, outliers=0),
        window=s.ExactEnds(sinks=sinks, local=local, seal_block=seal_block),
    )
    resolved = resolve(recipe, SMOLLM, num_tokens, {})
    if resolved.fallback_reason is not None:
        return
    low, deep = (layer_layout(recipe, num_tokens, layer) for layer in (0, 20))
    assert low.sealed_end == deep.sealed_end == sealed_end(recipe, num_tokens, num_tokens)
    assert low.sealed_end % recipe.block == 0 and num_tokens - low.sealed_end >= local
    for at in (low, deep):
        assert at.num_sinks + at.num_sealed + at.num_tail == at.num_rows <= num_tokens
        assert at.num_sealed % chunk == 0 and at.num_sealed > 0
    assert low.num_rows == num_tokens
    # the window is extended to a chunk's start, so up to chunk - 1 rows more than the rate may go on
    assert deep.num_rows <= max(int(num_tokens * rate), 80 + sinks + chunk) + chunk


@settings(max_examples=100, deadline=None)
@given(num_tokens=st.integers(600, 3000), steps=st.lists(st.integers(1, 90), min_size=1, max_size=12))
def test_seals_are_due_at_the_same_positions_however_rows_arrive(num_tokens: int, steps: list[int]) -> None:
    recipe = fill(get_recipe("sluice"), SMOLLM, {})
    due = [
        p
        for p in range(num_tokens + 1, num_tokens + 1300)
        if sealed_end(recipe, num_tokens, p) > sealed_end(recipe, num_tokens, p - 1)
    ]
    position, hit = num_tokens, []
    for step in steps:
        position += min(step, rows_until_seal(recipe, num_tokens, position))
        if position in due:
            hit.append(position)
    assert hit == [p for p in due if p <= position]
    assert rows_until_seal(fill(get_recipe("exact"), SMOLLM, {}), num_tokens, num_tokens) == NEVER


@pytest.mark.parametrize("name", recipe_names())
def test_every_specified_tensor_can_be_sliced_along_its_first_axis(name: str, lab: SimpleNamespace) -> None:
    recipe = resolve(get_recipe(name), SMOLLM, 4096, {}).recipe
    for layer in (0, 29):
        for group in layer_specs(recipe, SMOLLM, 4096, layer, "bfloat16").values():
            assert group and all(spec.shape[0] > 0 and spec.nbytes > 0 for spec in group.values())
