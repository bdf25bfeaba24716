"""Profiles of models."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from kvsluice.errors import ConfigError
from kvsluice.models.config import SHAPES
from kvsluice.models.profiles import Profile, load_profile, read_profile, stored_profile


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


WHOLE = {
    "fastkv_layer": 14,
    "fastkv_rate": 0.25,
    "fastkv_window": 32,
    "tsp_layer": 19,
    "tsp_rate": 0.2,
    "tsp_window": 64,
    "tsp_recall": 0.0,
    "key_codec": {"kind": "lowrank", "rank": 30, "bits": 8},
    "chunk": 2,
    "outliers": 0,
    "source": "measured",
}


def test_a_profile_is_read_as_it_was_written(tmp_path) -> None:
    assert set(WHOLE) == {field.name for field in fields(Profile)}
    profile, path = Profile(**WHOLE), tmp_path / "a.json"
    path.write_text(profile.to_json())
    assert read_profile(path) == profile
    assert json.loads(path.read_text()) == WHOLE, "a zero is a number, and is said"
    assert Profile.from_json("{}").to_json() == "{}\n"


def test_a_file_takes_the_place_of_what_ships(tmp_path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"tsp_layer": 3, "source": "measured"}))
    profile = load_profile("smollm2-135m", SHAPES["smollm2-135m"], path)
    assert (profile["tsp_layer"], profile["fastkv_layer"]) == (3, 14), "what it does not say comes from the shape"
    assert profile["key_codec"]["kind"] == "lowrank"
    assert "source" not in profile, "recipes are resolved by numbers"


def test_a_model_is_found_by_the_last_part_of_its_path() -> None:
    named = stored_profile("smollm2-135m-longctx")
    assert named.tsp_layer == 19
    assert stored_profile("/models/smollm2-135m-longctx") == stored_profile("smollm2-135m-longctx.gguf") == named
    assert stored_profile("/models/other") == Profile()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"tsp_depth": 3}', "unknown key 'tsp_depth'; allowed: fastkv_layer, "),
        ('{"tsp_layer": 19.0}', "profile.tsp_layer: got 19.0; allowed: an integer from 0"),
        ('{"tsp_layer": true}', "profile.tsp_layer: got True"),
        ('{"fastkv_layer": -1}', "profile.fastkv_layer: got -1"),
        ('{"tsp_rate": 0}', "profile.tsp_rate: got 0; allowed: a number above 0"),
        ('{"fastkv_rate": NaN}', "profile.fastkv_rate: got nan"),
        ('{"tsp_window": 513}', "profile.tsp_window: got 513; allowed: an integer from 1 to 512"),
        ('{"tsp_recall": 1.5}', "profile.tsp_recall: got 1.5; allowed: a number from 0 to 1"),
        ('{"key_codec": "int4"}', "profile.key_codec: got 'int4'; allowed: an object"),
        ('{"chunk": 3}', "profile.chunk: got 3; allowed: 1, 2, 4, 8, 16"),
        ('{"chunk": true}', "profile.chunk: got True"),
        ('{"outliers": 5000}', "profile.outliers: got 5000"),
        ('{"source": 5}', "profile.source: got 5"),
        ('{"chunk": 2, "chunk": 4}', "profile: is not JSON; allowed: an object without duplicate keys"),
        ("[]", "profile: is not an object"),
        ("{", "profile: is not JSON"),
    ],
)
def test_what_is_no_profile_is_refused_by_name(text, said, tmp_path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_profile(path)
    assert said in refused.value.message and "a.json" in refused.value.message


def test_files_that_cannot_be_read_are_told_by_name(tmp_path) -> None:
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(ConfigError, match=f"profile: cannot read {path.name}"):
            read_profile(path)
    large, odd = tmp_path / "large.json", tmp_path / "odd.json"
    large.write_text(" " * 70_000)
    odd.write_bytes(b"\xff\xfe")
    for path, said in ((large, "too large"), (odd, "is not text")):
        with pytest.raises(ConfigError, match=said):
            read_profile(path)
