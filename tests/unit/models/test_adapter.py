"""Merging low-rank adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from kvsluice.errors import BrokenCheckpoint, UnsupportedModel
from kvsluice.models.checkpoint import BUILTIN_MODELS, DEFAULT_MODEL, locate
from kvsluice.models.loader import load_config, load_model
from kvsluice.models.sources import AdapterSource

NAME = "model.layers.0.mlp.up_proj.weight"
PREFIX = "base_model.model.model.layers.0.mlp.up_proj."
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none"}


class Base:
    """One weight [3, 4] and a norm."""

    tensors: ClassVar[dict[str, torch.Tensor]] = {
        NAME: torch.arange(12.0).view(3, 4),
        "model.norm.weight": torch.ones(4),
    }

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(t.shape) for name, t in self.tensors.items()}

    def where(self, name: str) -> str:
        return "base"

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def digest(self) -> str:
        return "0"


def write(folder: Path, factors: dict[str, torch.Tensor], **changes: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


def factors(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4, generator=generator), torch.randn(3, 2, generator=generator)
    return {PREFIX + "lora_A.weight": changes.get("a", a), PREFIX + "lora_B.weight": changes.get("b", b)}


def test_weights_are_merged_with_their_scale(tmp_path: Path) -> None:
    pair = factors()
    source = AdapterSource(Base(), write(tmp_path, pair))

    merged = Base.tensors[NAME] + 3.0 * pair[PREFIX + "lora_B.weight"] @ pair[PREFIX + "lora_A.weight"]
    torch.testing.assert_close(source.read(NAME), merged)
    assert torch.equal(source.read("model.norm.weight"), torch.ones(4))
    assert source.shapes() == Base().shapes()


def test_digest_follows_factors_and_scale(tmp_path: Path) -> None:
    def digest(pair: dict[str, torch.Tensor], **changes: Any) -> str:
        source = AdapterSource(Base(), write(tmp_path, pair, **changes))
        source.read(NAME)
        return source.digest()

    assert len({digest(factors()), digest(factors(a=torch.ones(2, 4))), digest(factors(), lora_alpha=2)}) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "LOHA"},
        {"bias": "all"},
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"up_proj": 4}},
        {"fan_in_fan_out": True},
    ],
)
def test_more_than_plain_lora_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"adapter_config\.json"):
        AdapterSource(Base(), write(tmp_path, factors(), **changes))


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (factors(a=torch.zeros(2, 5)), "do not fit"),
        (factors(b=torch.zeros(4, 2)), "do not fit"),
        (factors(b=torch.zeros(3, 1)), "do not fit"),
        (factors(a=torch.zeros(2)), "do not fit"),
        (factors(b=torch.zeros(3)), "do not fit"),
        ({PREFIX + "lora_A.weight": torch.zeros(2, 4)}, "lora_B.weight is missing"),
        (factors() | {"base_model.model.lm_head.weight": torch.zeros(2)}, "not pairs"),
        ({name.replace("up_proj", "no_proj"): t for name, t in factors().items()}, "do not fit"),
    ],
)
def test_factors_that_do_not_fit_are_refused(pair: dict[str, torch.Tensor], words: str, tmp_path: Path) -> None:
    with pytest.raises(BrokenCheckpoint, match=words):
        AdapterSource(Base(), write(tmp_path, pair))


def test_factors_of_another_rank_than_configured_are_refused(tmp_path: Path) -> None:
    # the scale alpha / r would be wrong
    with pytest.raises(BrokenCheckpoint, match=r"rank 2, adapter_config\.json says r = 8"):
        AdapterSource(Base(), write(tmp_path, factors(), r=8))


def test_scales_that_no_number_can_hold_are_refused(tmp_path: Path) -> None:
    for alpha in (10**400, float("nan")):
        with pytest.raises(BrokenCheckpoint, match="lora_alpha"):
            AdapterSource(Base(), write(tmp_path, factors(), lora_alpha=alpha))


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(BrokenCheckpoint, match=r"adapter_config\.json is missing"):
        AdapterSource(Base(), tmp_path)
    write(tmp_path, factors(), r=0)
    with pytest.raises(BrokenCheckpoint, match="r or lora_alpha"):
        AdapterSource(Base(), tmp_path)
    write(tmp_path, factors())
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BrokenCheckpoint, match=r"adapter_model\.safetensors is missing, truncated"):
        AdapterSource(Base(), tmp_path)


def test_built_in_models() -> None:
    assert DEFAULT_MODEL in BUILTIN_MODELS
    plain, long = load_config("smollm2-135m"), load_config("smollm2-135m-longctx")

    assert (plain.rope.theta, plain.max_position_embeddings) == (100_000.0, 8192)
    assert (long.rope.theta, long.max_position_embeddings) == (500_000.0, 32_768)
    assert (long.num_layers, long.num_heads, long.num_kv_heads, long.head_dim) == (30, 9, 3, 64)
    adapter = locate("smollm2-135m-longctx").adapter
    assert adapter is not None
    # the alpha / r that the adapter was trained with
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == 2.0


def test_built_in_models_differ_in_their_fingerprint() -> None:
    prints = {name: load_model(name, dtype=torch.bfloat16).fingerprint for name in BUILTIN_MODELS}

    assert len(set(prints.values())) == 2
    assert all(len(value) == 32 for value in prints.values())
