"""Profiles of models."""

from __future__ import annotations

from kvsluice.models.config import SHAPES
from kvsluice.models.profiles import load_profile


def test_calibrated_model() -> None:
    profile = load_profile("smollm2-135m-longctx", SHAPES["smollm2-135m"])

    assert profile == {
        "fastkv_layer": 14,
        "tsp_layer": 19,
        "tsp_rate": 0.2,
        "key_codec": {"kind": "affine", "bits": 4, "axis": "channel", "group": 32},
    }


def test_published_layers() -> None:
    layers = {"llama-3.1-8b": 15, "ministral-8b": 17, "mistral-nemo-12b": 19}
    assert {name: load_profile(name, SHAPES[name])["fastkv_layer"] for name in layers} == layers


def test_defaults_follow_the_shape_and_are_not_shared() -> None:
    shape = SHAPES["qwen2.5-7b"]
    profile = load_profile("some-folder", shape)

    assert profile["fastkv_layer"] == profile["tsp_layer"] == 13
    # 0.156 x 4 x 128
    assert profile["key_codec"] == {"kind": "lowrank", "rank": 80, "bits": 8}
    profile["key_codec"]["rank"] = 1
    assert load_profile("some-folder", shape)["key_codec"]["rank"] == 80


def test_stored_profiles_cannot_be_changed_by_a_caller() -> None:
    load_profile("smollm2-135m", SHAPES["smollm2-135m"])["key_codec"]["bits"] = 2

    assert load_profile("smollm2-135m", SHAPES["smollm2-135m"])["key_codec"]["bits"] == 4
