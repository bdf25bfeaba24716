"""Recipes as values: JSON in and out, fingerprints, names, and what is refused with which words."""

from __future__ import annotations

import contextlib
import json
import string
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsluice.compression import slots as s
from kvsluice.compression.filling import SLOT_NAMES
from kvsluice.compression.recipe import MAX_RECIPE_JSON, PRESETS, Recipe, get_recipe, recipe_names, register
from kvsluice.errors import InvalidRecipe

SNAP, CHUNKS = {"kind": "snap"}, {"kind": "chunks"}
GRID = {
    "retrieval": {"kind": "chunks", "chunk": 4},
    "propagation": {"kind": "tsp", "window": 64, "chunk_aligned": True},
}


@pytest.mark.parametrize("name", recipe_names())
def test_json_round_trip_is_canonical(name: str) -> None:
    recipe = get_recipe(name)
    text = recipe.to_json()
    assert Recipe.from_json(text) == recipe
    assert Recipe.from_json(json.dumps(json.loads(text), indent=3)).to_json() == text
    assert len(text) < MAX_RECIPE_JSON


def test_fingerprint_is_of_the_slots_and_not_of_the_name() -> None:
    prints = {get_recipe(name).fingerprint for name in recipe_names()}
    assert len(prints) == len(recipe_names()) and all(len(p) == 32 and int(p, 16) >= 0 for p in prints)
    assert replace(get_recipe("sluice"), name="other").fingerprint == get_recipe("sluice").fingerprint
    assert Recipe("a", budget=s.KeepAll()).fingerprint == get_recipe("exact").fingerprint


def test_whole_numbers_given_for_rates_change_no_fingerprint() -> None:
    one = Recipe.from_json('{"name":"a","propagation":{"kind":"tsp","rate":1,"recall":0}}')
    other = Recipe.from_json('{"name":"a","propagation":{"kind":"tsp","rate":1.0,"recall":0.0}}')
    assert one == other and one.fingerprint == other.fingerprint


def test_names_and_presets() -> None:
    assert set(recipe_names()) >= {"exact", "fastkv", "shadowkv", "sluice"}
    for preset, name in PRESETS.items():
        assert get_recipe(preset) is get_recipe(name)
    assert PRESETS["balanced"] == "sluice" and PRESETS["fast"] == "fastkv"
    with pytest.raises(InvalidRecipe) as caught:
        get_recipe("shadowvk")
    assert caught.value.field == "recipe.name" and "shadowkv" in caught.value.allowed
    with pytest.raises(ValueError, match="taken"):
        register(Recipe(name="exact"))
    with pytest.raises(ValueError, match="taken"):
        register(Recipe(name="balanced"))


def test_slots_of_a_request_replace_those_of_the_named_recipe() -> None:
    recipe = get_recipe("sluice", '{"value_codec": {"kind": "affine", "bits": 2, "group": 32}}')
    assert recipe.value_codec == s.Affine(bits=2, group=32)
    assert recipe.retrieval == get_recipe("sluice").retrieval and recipe.name == "sluice-custom"
    assert get_recipe("sluice", "{}") is get_recipe("sluice", "")


def test_the_torch_free_side_loads_no_torch() -> None:
    code = "import sys, kvsluice.compression.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], timeout=60).returncode == 0


JOINED = {"sharing": {"kind": "groups"}, "key_codec": {"kind": "lowrank"}}
RANKED = {"budget": {"kind": "uniform"}, "scorer": {"kind": "snap"}}
BAD_SLOTS: list[tuple[dict[str, Any], str, str]] = [
    ({"key_codec": {"kind": "zip"}}, "recipe.key_codec.kind", "affine"),
    ({"key_codec": {"kind": ["affine"]}}, "recipe.key_codec", "lowrank"),
    ({"key_codec": "affine"}, "recipe.key_codec", "affine"),
    ({"value_codec": {"kind": "profile"}}, "recipe.value_codec.kind", "affine"),
    ({"key_codec": {"kind": "affine", "bits": 3}}, "recipe.key_codec.bits", "8, 4, 2"),
    ({"key_codec": {"kind": "affine", "bits": True}}, "recipe.key_codec.bits", "8, 4, 2"),
    ({"key_codec": {"kind": "affine", "bits": 4.0}}, "recipe.key_codec.bits", "8, 4, 2"),
    ({"key_codec": {"kind": "affine", "axis": "row"}}, "recipe.key_codec.axis", "channel, token"),
    ({"key_codec": {"kind": "affine", "group": 48}}, "recipe.key_codec.group", "32"),
    ({"key_codec": {"kind": "affine", "scale": 1}}, "recipe.key_codec", "bits"),
    ({"key_codec": {"kind": "dense", "dtype": "float8"}}, "recipe.key_codec.dtype", "bfloat16"),
    ({"key_codec": {"kind": "lowrank", "rank": 0}}, "recipe.key_codec.rank", "1 to"),
    ({"key_codec": {"kind": "lowrank", "rank": 10**400}}, "recipe.key_codec.rank", "1 to"),
    ({"key_codec": {"kind": "lowrank", "bits": 2}}, "recipe.key_codec.bits", "16, 8, 4"),
    ({"propagation": {"kind": "tsp", "rate": 0}}, "recipe.propagation.rate", "above 0"),
    ({"propagation": {"kind": "tsp", "rate": -0.5}}, "recipe.propagation.rate", "above 0"),
    ({"propagation": {"kind": "tsp", "rate": 10**400}}, "recipe.propagation.rate", "at most 1"),
    ({"propagation": {"kind": "tsp", "rate": 1.5}}, "recipe.propagation.rate", "at most 1"),
    ({"propagation": {"kind": "tsp", "rate": "0.2"}}, "recipe.propagation.rate", "number"),
    ({"propagation": {"kind": "tsp", "layer": -1}}, "recipe.propagation.layer", "0 to"),
    ({"propagation": {"kind": "tsp", "layer": 2.0}}, "recipe.propagation.layer", "integer"),
    ({"propagation": {"kind": "tsp", "window": 0}}, "recipe.propagation.window", "1 to"),
    ({"propagation": {"kind": "tsp", "window": 513}}, "recipe.propagation.window", "to 512"),
    ({"scorer": {"kind": "snap", "window": 513}}, "recipe.scorer.window", "to 512"),
    ({"propagation": {"kind": "tsp", "kernel": 4}}, "recipe.propagation.kernel", "odd"),
    ({"propagation": {"kind": "tsp", "recall": 1.5}}, "recipe.propagation.recall", "from 0 to 1"),
    ({"propagation": {"kind": "tsp", "recall": True}}, "recipe.propagation.recall", "from 0 to 1"),
    ({"propagation": {"kind": "tsp", "recall": 0.1, "recall_bits": 2}}, "recipe.propagation.recall_bits", "8, 4"),
    ({"propagation": {"kind": "tsp", "recall": 0.1, "recall_step": 0}}, "recipe.propagation.recall_step", "1 to"),
    ({"propagation": {"kind": "tsp", "recall": 0.1, "recall_step": 65}}, "recipe.propagation.recall_step", "to 64"),
    (
        GRID | {"propagation": GRID["propagation"] | {"recall": 0.1, "recall_step": 6}},
        "recipe.propagation.recall_step",
        "multiple of the chunk, 4",
    ),
    (
        {
            "budget": {"kind": "uniform", "rate": 0.1},
            "scorer": {"kind": "snap"},
            "propagation": {"kind": "tsp", "rate": 0.2, "recall": 0.1},
        },
        "recipe.propagation.recall",
        "budget = all",
    ),
    ({"scorer": {"kind": "snap", "pool": "median"}}, "recipe.scorer.pool", "max, avg"),
    ({"scorer": {"kind": "snap", "kernel": 2}}, "recipe.scorer.kernel", "odd"),
    ({"budget": {"kind": "uniform", "rate": None}}, "recipe.budget.rate", "above 0"),
    ({"budget": {"kind": "uniform"}}, "recipe.scorer", "snap"),
    (
        {"budget": {"kind": "uniform"}, "scorer": {"kind": "snap"}, "key_codec": {"kind": "lowrank"}},
        "recipe.key_codec",
        "native, dense, affine",
    ),
    (
        {
            "budget": {"kind": "uniform", "rate": 0.3},
            "scorer": {"kind": "snap"},
            "propagation": {"kind": "tsp", "rate": 0.2},
        },
        "recipe.budget.rate",
        "0.2",
    ),
    (
        {"budget": {"kind": "uniform"}, "scorer": {"kind": "snap"}, "retrieval": {"kind": "chunks"}},
        "recipe.budget",
        "all",
    ),
    ({"retrieval": {"kind": "chunks", "chunk": 3}}, "recipe.retrieval.chunk", "1, 2, 4, 8, 16"),
    ({"retrieval": {"kind": "chunks", "budget_rate": 0}}, "recipe.retrieval.budget_rate", "above 0"),
    ({"retrieval": {"kind": "chunks", "chunk": 1}}, "recipe.retrieval.outliers", "0 where chunk is 1"),
    ({"retrieval": {"kind": "chunks", "budget_tokens": 0}}, "recipe.retrieval.budget_tokens", "1 to"),
    ({"retrieval": {"kind": "chunks", "landmark_bits": 4}}, "recipe.retrieval.landmark_bits", "16, 8"),
    ({"retrieval": {"kind": "chunks"}, "propagation": {"kind": "tsp"}}, "recipe.propagation.chunk_aligned", "true"),
    ({"propagation": {"kind": "tsp", "chunk_aligned": True}}, "recipe.retrieval", "chunks"),
    (GRID | {"window": {"kind": "ends", "sinks": 6}}, "recipe.window.sinks", "multiple of the chunk, 4"),
    (GRID | {"window": {"kind": "ends", "local": 40, "seal_block": 32}}, "recipe.propagation.window", "at least 72"),
    (
        {"window": {"kind": "ends", "seal_block": 4095}, "retrieval": CHUNKS},
        "recipe.window.seal_block",
        "4096",
    ),
    ({"window": {"kind": "ends", "dtype": "int8"}}, "recipe.window.dtype", "bfloat16"),
    ({"window": {"kind": "ends", "local": 1 << 40}}, "recipe.window.local", "0 to"),
    ({"sharing": {"kind": "svd"}}, "recipe.sharing.kind", "none"),
    ({"evicted": {"kind": "merge"}}, "recipe.evicted.kind", "drop"),
    ({"windows": {}}, "recipe.slots", "window"),
    ({"value_codec": {"kind": "affine", "balanced": True}}, "recipe.value_codec", "native"),
    ({"key_codec": {"kind": "affine", "axis": "channel", "balanced": True}}, "recipe.key_codec.balanced", "false"),
    ({"key_codec": {"kind": "lowrank", "share": 0}}, "recipe.key_codec.share", "above 0"),
    ({"sharing": {"kind": "groups"}, "key_codec": {"kind": "dense"}}, "recipe.key_codec", "lowrank"),
    ({"sharing": {"kind": "groups", "layers": 0}}, "recipe.sharing.layers", "1 to 64"),
    (
        {"sharing": {"kind": "groups", "values": True}, "key_codec": {"kind": "lowrank"}},
        "recipe.value_codec",
        "lowrank",
    ),
    (JOINED | {"window": {"kind": "ends", "seal_block": 32}}, "recipe.window.seal_block", "0"),
    (JOINED | {"propagation": {"kind": "tsp"}}, "recipe.propagation", "full"),
    (JOINED | RANKED, "recipe.budget", "all"),
    ({"key_codec": {"kind": "lowrank"}} | RANKED, "recipe.key_codec", "budget.heads = shared"),
    ({"budget": {"kind": "uniform"}, "scorer": {"kind": "none"}}, "recipe.scorer", "accumulated, snap"),
    ({"budget": {"kind": "uniform", "recent": 2}}, "recipe.budget.recent", "0 to 1"),
    ({"budget": {"kind": "uniform", "heads": "all"}}, "recipe.budget.heads", "own, shared"),
    ({"budget": {"kind": "pyramid", "beta": 0.5}}, "recipe.budget.beta", "1 to 1000"),
    ({"budget": {"kind": "ends"}}, "recipe.window.seal_block", "1 to 4096"),
    ({"window": {"kind": "ends", "positions": "cache"}}, "recipe.window.positions", "original"),
    ({"window": {"kind": "ends", "local_rate": -0.1}}, "recipe.window.local_rate", "0 to 1"),
    ({"evicted": {"kind": "demote"}}, "recipe.budget", "pyramid, uniform"),
    ({"evicted": {"kind": "demote", "key_bits": 3}}, "recipe.evicted.key_bits", "8, 4, 2"),
    (
        RANKED | {"evicted": {"kind": "demote", "key_axis": "channel", "balanced": True}},
        "recipe.evicted.balanced",
        "false",
    ),
    ({"budget": {"kind": "ends"}, "window": {"kind": "ends", "seal_block": 16}}, "recipe.window", "sinks or local"),
    (
        RANKED | {"evicted": {"kind": "demote"}, "propagation": {"kind": "tsp", "rate": 0.5}},
        "recipe.propagation",
        "full",
    ),
]


@pytest.mark.parametrize(("slots", "field", "allowed"), BAD_SLOTS, ids=[str(i) for i in range(len(BAD_SLOTS))])
def test_bad_slots_are_refused_by_name(slots: dict[str, Any], field: str, allowed: str) -> None:
    with pytest.raises(InvalidRecipe) as caught:
        get_recipe("exact", json.dumps(slots))
    assert caught.value.field == field
    assert allowed in caught.value.allowed, caught.value.allowed
    assert len(caught.value.message) < 600


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "3",
        '"exact"',
        "{",
        "{}",
        '{"name": 3}',
        '{"name": "Exact"}',
        '{"name": "' + "a" * 65 + '"}',
        '{"name": "a", "name": "b"}',
        '{"name": "a", "extra": 1}',
        '{"name": "a", "budget": {"kind": "uniform", "rate": NaN}}',
        '{"name": "a", "budget": {"kind": "uniform", "rate": 1e999}}',
        '{"name": "a", "budget": {"kind": "uniform", "rate": ' + "9" * 5000 + "}}",
        "[" * 16000,
        '{"a":' * 3000,
        '{"name": "a"}' + " " * MAX_RECIPE_JSON,
        "\ud800",
    ],
)
def test_texts_that_are_no_recipe(text: str) -> None:
    with pytest.raises(InvalidRecipe):
        Recipe.from_json(text)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_a_recipe_or_refused(text: str) -> None:
    for parse in (Recipe.from_json, lambda t: get_recipe("sluice", t)):
        with contextlib.suppress(InvalidRecipe):
            assert isinstance(parse(text), Recipe)


KINDS = [
    "full",
    "tsp",
    "snap",
    "none",
    "all",
    "uniform",
    "drop",
    "native",
    "dense",
    "affine",
    "lowrank",
    "chunks",
    "ends",
]
KEYS = [
    "layer",
    "rate",
    "window",
    "kernel",
    "chunk",
    "outliers",
    "bits",
    "rank",
    "group",
    "axis",
    "sinks",
    "local",
    "dtype",
]
values = st.one_of(
    st.sampled_from([None, True, False, [], {}, "token", "max", "bfloat16", ""]), st.integers(), st.floats()
)
fillings = st.builds(
    lambda kind, rest: {"kind": kind} | rest,
    st.sampled_from(KINDS),
    st.dictionaries(st.sampled_from(KEYS), values, max_size=3),
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(SLOT_NAMES), st.one_of(fillings, values), max_size=4))
def test_any_object_is_a_recipe_or_refused(raw: dict[str, Any]) -> None:
    try:
        recipe = Recipe.from_json(json.dumps(raw | {"name": "fuzz"}))
    except InvalidRecipe as exc:
        assert exc.field.startswith("recipe") and exc.allowed
        return
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_fields_of_an_error_are_bounded_whatever_was_sent() -> None:
    for value in ("x" * 10000, list(range(5000)), {c: c for c in string.ascii_letters}):
        with pytest.raises(InvalidRecipe) as caught:
            get_recipe("exact", json.dumps({"key_codec": {"kind": "affine", "bits": value}})[:MAX_RECIPE_JSON])
        assert len(caught.value.message) < 400
