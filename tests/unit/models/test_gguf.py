"""GGUF files: structure, quantizations, row order, configuration; broken ones are refused by name."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvsluice.errors import BrokenCheckpoint, KvsluiceError, UnsupportedModel
from kvsluice.models.checkpoint import locate
from kvsluice.models.forward import forward_tokens
from kvsluice.models.gguf_config import config_of_gguf, hf_names
from kvsluice.models.gguf_file import QUANTIZATIONS, GgufFile
from kvsluice.models.loader import load_config, load_model
from kvsluice.models.model import Model
from kvsluice.models.weights import fill_weights

Write = Callable[..., Path]
IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
# every row is a whole number of the smallest blocks
SIZES = {"hidden": 32, "ffn": 64, "heads": 4, "kv": 2, "dim": 16, "vocab": 32, "layers": 2}


def fields_of(arch: str, **more: Any) -> dict[str, Any]:
    base = {
        "general.architecture": arch,
        f"{arch}.block_count": SIZES["layers"],
        f"{arch}.context_length": 64,
        f"{arch}.embedding_length": SIZES["hidden"],
        f"{arch}.feed_forward_length": SIZES["ffn"],
        f"{arch}.attention.head_count": SIZES["heads"],
        f"{arch}.attention.head_count_kv": SIZES["kv"],
        f"{arch}.attention.key_length": SIZES["dim"],
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 500.0,
    }
    return base | {key.replace("ARCH", arch): value for key, value in more.items()}


def hf_tensors(arch: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random checkpoint under Hugging Face names, in Hugging Face's row order."""
    from kvsluice.models.config import config_from_hf
    from kvsluice.models.weights import slots

    raw = {
        "model_type": arch,
        "num_hidden_layers": SIZES["layers"],
        "hidden_size": SIZES["hidden"],
        "intermediate_size": SIZES["ffn"],
        "num_attention_heads": SIZES["heads"],
        "num_key_value_heads": SIZES["kv"],
        "head_dim": SIZES["dim"],
        "vocab_size": SIZES["vocab"],
        "max_position_embeddings": 64,
        "rms_norm_eps": float(np.float32(1e-5)),
        "rope_theta": 500.0,
    }
    generator = torch.Generator().manual_seed(seed)
    wanted = slots(config_from_hf(raw))
    return {name: torch.randn(slot.shape, generator=generator) * 0.3 for name, slot in wanted.items()}


def permute(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """What converters do to q and k of the llama architecture: half-split pairs become interleaved ones."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def to_gguf(arch: str, tensors: dict[str, torch.Tensor], kind: str = "F32") -> dict[str, tuple[np.ndarray, str]]:
    names, written = hf_names(SIZES["layers"]), {}
    for name, tensor in tensors.items():
        if arch == "llama" and ".q_proj." in name:
            tensor = permute(tensor, SIZES["heads"])
        if arch == "llama" and ".k_proj." in name:
            tensor = permute(tensor, SIZES["kv"])
        written[names[name]] = (tensor.numpy(), kind if tensor.dim() == 2 else "F32")
    return written


class DictSource:
    """Tensors straight from memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(t.shape) for name, t in self._tensors.items()}

    def where(self, name: str) -> str:
        return "memory"

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def digest(self) -> str:
        return ""


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_checkpoint_survives_conversion(arch: str, write_gguf: Write) -> None:
    tensors = hf_tensors(arch)
    path = write_gguf(fields_of(arch), to_gguf(arch, tensors))

    model = load_model(str(path))

    weights = fill_weights(model.config, DictSource(tensors), torch.float32, torch.device("cpu"))
    expected = forward_tokens(Model(model.config, weights, ""), IDS)
    assert model.config.family == arch
    assert torch.equal(forward_tokens(model, IDS), expected)


def test_missing_head_means_tied(write_gguf: Write) -> None:
    tensors = hf_tensors("llama")
    del tensors["lm_head.weight"]

    model = load_model(str(write_gguf(fields_of("llama"), to_gguf("llama", tensors))))

    assert model.weights.head is model.weights.embed


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_weights_are_those_of_the_gguf_package(kind: str, write_gguf: Write) -> None:
    tensors = hf_tensors("qwen2")
    path = write_gguf(fields_of("qwen2"), to_gguf("qwen2", tensors, kind))

    model = load_model(str(path))

    stored = next(t for t in GGUFReader(str(path)).tensors if t.name == "blk.1.attn_v.weight")
    data = stored.data if kind == "F16" else dequantize(stored.data, stored.tensor_type)
    expected = torch.from_numpy(np.array(data, dtype=np.float32))
    rows = SIZES["kv"] * SIZES["dim"]
    assert torch.equal(model.weights.layers[1].qkv[-rows:], expected)
    # 4 bits over a block of 32 normal values: about a tenth of their spread
    assert float((expected - tensors["model.layers.1.self_attn.v_proj.weight"]).std()) < 0.1 * 0.3


@pytest.mark.parametrize("kind", [name for name in QUANTIZATIONS if name.endswith("_K")])
def test_k_quants(kind: str, write_gguf: Write) -> None:
    quantization = GGMLQuantizationType[kind]
    block, block_bytes = GGML_QUANT_SIZES[quantization]
    blocks = np.random.default_rng(0).integers(0, 60, (4, 2 * block_bytes), dtype=np.uint8)
    path = write_gguf({"general.architecture": "llama"}, {"x": (blocks, kind)})

    values = GgufFile(path).dequantize("x")

    assert values.shape == (4, 2 * block)
    np.testing.assert_array_equal(values, dequantize(blocks, quantization))


def test_structure_equals_the_gguf_packages_own_reader() -> None:
    path = locate("smollm2-135m").path
    ours, theirs = GgufFile(path), GGUFReader(str(path))

    assert {t.name: (t.tensor_type, int(t.data_offset), int(t.n_bytes)) for t in theirs.tensors} == {
        name: (t.kind, t.start, t.num_bytes) for name, t in ours.tensors.items()
    }
    assert set(ours.fields) == {key for key in theirs.fields if not key.startswith("GGUF.")}
    for key in ("llama.rope.freq_base", "tokenizer.chat_template", "tokenizer.ggml.pre", "general.languages"):
        assert ours.fields[key] == theirs.fields[key].contents()
    tokens = theirs.fields["tokenizer.ggml.tokens"]
    assert ours.fields["tokenizer.ggml.tokens"][:3000] == [bytes(tokens.parts[i]).decode() for i in tokens.data[:3000]]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba'"),
        ({"ARCH.expert_count": 8}, "expert_count"),
        ({"ARCH.attention.sliding_window": 128}, "sliding_window"),
        ({"ARCH.rope.dimension_count": 8}, "dimension_count"),
        ({"ARCH.attention.head_count_kv": [2, 1]}, "not one number"),
        ({"ARCH.rope.scaling.type": "longrope"}, "longrope"),
        ({"ARCH.rope.scale_linear": 4.0}, "scale_linear"),
        ({"ARCH.rope.scaling.type": "yarn", "ARCH.rope.scaling.attn_factor": 0.5}, "attn_factor"),
        ({"ARCH.rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ({"ARCH.logit_scale": 0.5}, "logit_scale"),
        ({"ARCH.attention.scale": 0.5}, r"attention\.scale"),
        ({"ARCH.residual_scale": 3.0}, "residual_scale"),
        ({"ARCH.embedding_scale": 3.0}, "embedding_scale"),
    ],
)
def test_what_is_not_covered_is_refused(more: dict[str, Any], words: str, write_gguf: Write) -> None:
    path = write_gguf(fields_of("llama", **more), to_gguf("llama", hf_tensors("llama")))
    with pytest.raises(UnsupportedModel, match=words) as caught:
        load_config(str(path))
    assert "supported:" in caught.value.message


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_scaling(kind: str, write_gguf: Write) -> None:
    more = {
        "ARCH.rope.scaling.type": kind,
        "ARCH.rope.scaling.factor": 4.0,
        "ARCH.rope.scaling.original_context_length": 16,
    }
    config = load_config(str(write_gguf(fields_of("qwen2", **more), to_gguf("qwen2", hf_tensors("qwen2")))))

    assert (config.rope.kind, config.rope.factor) == (kind, 4.0)
    assert config.rope.original_max_position_embeddings == (16 if kind == "yarn" else 0)


def test_a_scaling_factor_without_a_type_is_linear(write_gguf: Write) -> None:
    # as llama.cpp reads it
    tensors = to_gguf("llama", hf_tensors("llama"))
    rope = load_config(str(write_gguf(fields_of("llama", **{"ARCH.rope.scaling.factor": 4.0}), tensors))).rope
    none = {"ARCH.rope.scaling.factor": 4.0, "ARCH.rope.scaling.type": "none"}

    assert (rope.kind, rope.factor) == ("linear", 4.0)
    assert load_config(str(write_gguf(fields_of("llama", **none), tensors))).rope.kind == "default"


def test_bounds_of_yarns_ramp_are_read(write_gguf: Write) -> None:
    more = {"type": "yarn", "factor": 4.0, "original_context_length": 16, "yarn_beta_fast": 24.0, "yarn_beta_slow": 2.0}
    fields = fields_of("llama", **{f"ARCH.rope.scaling.{name}": value for name, value in more.items()})
    rope = load_config(str(write_gguf(fields, to_gguf("llama", hf_tensors("llama"))))).rope

    assert (rope.beta_fast, rope.beta_slow) == (24.0, 2.0)


def test_neutral_values_pass(write_gguf: Write) -> None:
    neutral = {"ARCH.logit_scale": 1.0, "ARCH.residual_scale": 0.0, "ARCH.rope.scaling.attn_factor": 1.0}
    tensors = to_gguf("llama", hf_tensors("llama"))
    plain, same = (load_config(str(write_gguf(fields_of("llama", **f), tensors))) for f in ({}, neutral))

    assert plain == same


def test_ids_that_end_a_turn_or_a_message_end_a_text(write_gguf: Write) -> None:
    ids = {f"tokenizer.ggml.{name}_token_id": index for name, index in (("eos", 5), ("eot", 7), ("eom", 5))}
    path = write_gguf(fields_of("llama", **ids), to_gguf("llama", hf_tensors("llama")))

    assert load_config(str(path)).eos_token_ids == (5, 7)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised_by_its_divisors(factor: float, write_gguf: Write) -> None:
    theta, dim = 500_000.0, 128
    frequencies = theta ** -(np.arange(0, dim, 2) / dim)
    wavelengths = 2 * np.pi / frequencies
    # as converters write them
    divisors = np.where(wavelengths < 8192 / 4, 1.0, factor)
    between = (wavelengths >= 8192 / 4) & (wavelengths <= 8192)
    smooth = (8192 / wavelengths - 1) / (4 - 1)
    divisors = np.where(between, 1 / ((1 - smooth) / factor + smooth), divisors).astype(np.float32)
    more = {"ARCH.rope.freq_base": theta, "ARCH.attention.key_length": dim}
    tensors = {"rope_freqs.weight": (divisors, "F32"), "token_embd.weight": (np.zeros((8, 32), np.float32), "F32")}
    path = write_gguf(fields_of("llama", **more), tensors)

    rope = load_config(str(path)).rope

    assert (rope.kind, rope.factor, rope.original_max_position_embeddings) == ("llama3", factor, 8192)
    tensors["rope_freqs.weight"] = (divisors * 1.5, "F32")
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight"):
        load_config(str(write_gguf(fields_of("llama", **more), tensors)))


def test_missing_and_unknown_tensors_are_named(write_gguf: Write) -> None:
    tensors = to_gguf("llama", hf_tensors("llama"))
    lost = {name: value for name, value in tensors.items() if name != "blk.1.ffn_up.weight"}
    with pytest.raises(BrokenCheckpoint, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        load_model(str(write_gguf(fields_of("llama"), lost)))
    with pytest.raises(BrokenCheckpoint, match=r"blk\.0\.ffn_gate_inp\.weight does not belong"):
        extra = tensors | {"blk.0.ffn_gate_inp.weight": tensors["output.weight"]}
        load_model(str(write_gguf(fields_of("llama"), extra)))
    fields = fields_of("llama")
    del fields["llama.block_count"]
    with pytest.raises(BrokenCheckpoint, match=r"llama\.block_count is missing"):
        load_model(str(write_gguf(fields, tensors)))


def test_unknown_quantization_is_refused(write_gguf: Write) -> None:
    kind = GGMLQuantizationType.IQ4_NL
    row = np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8)
    with pytest.raises(UnsupportedModel, match="Q4_1"):
        GgufFile(write_gguf({"general.architecture": "llama"}, {"x": (row, "IQ4_NL")}))


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"GGUF\x01\0\0\0" + b"\0" * 16, b"PK\3\4" + b"\0" * 64])
def test_files_that_are_not_gguf(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(BrokenCheckpoint, match=r"x\.gguf"):
        load_model(str(path))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1), flip=st.none() | st.tuples(st.floats(0, 1), st.integers(1, 255)))
def test_damaged_files_are_read_or_refused_never_worse(
    cut: float, flip: tuple[float, int] | None, tmp_path: Path, write_gguf: Write
) -> None:
    whole = tmp_path / "whole.gguf"
    if not whole.exists():
        write_gguf(fields_of("llama"), to_gguf("llama", hf_tensors("llama")), "whole.gguf")
    data = bytearray(whole.read_bytes())
    if flip is None:
        data = data[: int(cut * len(data))]
    else:
        # the header is where damage can mislead
        data[int(flip[0] * 2000)] ^= flip[1]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    try:
        config_of_gguf(GgufFile(path))
    except KvsluiceError as error:
        assert str(tmp_path) not in error.message


def test_counts_are_bounded_before_use(tmp_path: Path) -> None:
    path = tmp_path / "huge.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60))
    with pytest.raises(BrokenCheckpoint, match="impossible"):
        GgufFile(path)
