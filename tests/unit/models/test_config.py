"""What of a `config.json` is read, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from kvsluice.errors import BrokenCheckpoint, UnsupportedModel
from kvsluice.models.config import FAMILIES, SHAPES, config_from_hf


def test_values_are_read(raw: dict[str, Any]) -> None:
    config = config_from_hf(raw | {"rope_theta": 777.0, "tie_word_embeddings": True, "eos_token_id": [2, 5]})

    assert (config.family, config.num_layers, config.hidden_size, config.intermediate_size) == ("llama", 2, 16, 24)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (4, 2, 4, 32)
    assert (config.rms_norm_eps, config.rope.kind, config.rope.theta) == (1e-5, "default", 777.0)
    assert config.tie_word_embeddings and config.bos_token_id == 1 and config.eos_token_ids == (2, 5)
    assert config.layer_windows == (None, None)
    assert not (config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mixtral"}, ["mixtral", *FAMILIES]),
        ({"model_type": "qwen2_moe"}, ["qwen2_moe", *FAMILIES]),
        ({"model_type": None}, list(FAMILIES)),
        ({"num_local_experts": 8}, ["num_local_experts", *FAMILIES]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "unquantized"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "silu"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, ["partial_rotary_factor"]),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, ["longrope", "linear", "yarn", "llama3"]),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, ["mrope", "dynamic"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["per layer type"]),
        ({"sliding_window": 128}, ["sliding_window", "mistral"]),
        ({"model_type": "qwen2", "attention_bias": False}, ["attention_bias"]),
        ({"model_type": "mistral", "mlp_bias": True}, ["mlp_bias"]),
        ({"model_type": "mistral", "layer_types": ["sliding_attention", "full_attention"]}, ["layer_types", "qwen2"]),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "linear_attention"]}, ["linear_attention"]),
        ({"final_logit_softcapping": 30.0}, ["final_logit_softcapping"]),
    ],
)
def test_what_is_not_covered_is_refused(raw: dict[str, Any], change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        config_from_hf(raw | change)
    for word in words:
        assert word in caught.value.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"vocab_size": True}, "vocab_size"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "not a multiple"),
        ({"head_dim": 5}, "odd"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [-1]}, "eos_token_id"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, "factor must be positive"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": "false"}}, "truncate is not a boolean"),
        ({"rope_scaling": ["linear"]}, "rope_parameters"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be at least 1"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}}, "low_freq_factor"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0}},
            "above low_freq_factor",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0}},
            "original_max_position_embeddings",
        ),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "no sliding window"),
    ],
)
def test_impossible_values_are_refused(raw: dict[str, Any], change: dict[str, Any], words: str) -> None:
    with pytest.raises(BrokenCheckpoint, match=words):
        config_from_hf(raw | change)


@pytest.mark.parametrize(
    ("family", "change", "windows"),
    [
        ("mistral", {"sliding_window": 9}, (9, 9)),
        ("mistral", {"sliding_window": None}, (None, None)),
        ("mistral", {}, (4096, 4096)),
        ("qwen2", {"sliding_window": 9, "max_window_layers": 1}, (None, None)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, (None, 9)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, (None, None)),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["sliding_attention", "full_attention"],
                "max_window_layers": 0,
            },
            (9, None),
        ),
    ],
)
def test_windows_of_each_layer(
    raw: dict[str, Any], family: str, change: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert config_from_hf(raw | {"model_type": family} | change).layer_windows == windows


def test_yarn_factor_from_lengths_and_neutral_features_pass(raw: dict[str, Any]) -> None:
    scaling = {"type": "yarn", "factor": None, "original_max_position_embeddings": 16}
    config = config_from_hf(raw | {"rope_scaling": scaling, "quantization_config": None, "num_experts": 0})

    assert config.rope.factor == 4.0


@pytest.mark.parametrize(("outer", "length"), [({}, 16), ({"original_max_position_embeddings": None}, 16)])
def test_a_null_beside_the_scaling_hides_nothing(raw: dict[str, Any], outer: dict[str, Any], length: int) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": length, "truncate": False}
    rope = config_from_hf(raw | outer | {"rope_scaling": scaling}).rope

    assert rope.original_max_position_embeddings == length
    assert not rope.truncate


def test_digest_follows_what_changes_logits(raw: dict[str, Any]) -> None:
    base = config_from_hf(raw).digest

    assert config_from_hf(raw | {"rope_theta": 10001.0}).digest != base
    assert config_from_hf(raw | {"rms_norm_eps": 1e-6}).digest != base
    assert config_from_hf(raw | {"eos_token_id": 3}).digest == base


def test_published_shapes_have_their_published_sizes() -> None:
    def num_parameters(name: str) -> int:
        from kvsluice.models.weights import slots

        sizes = [slot.shape for slot in slots(SHAPES[name]).values()]
        return sum(s[0] * (s[1] if len(s) > 1 else 1) for s in sizes)

    # counts as published on the model cards
    assert num_parameters("llama-3.1-8b") == 8_030_261_248
    assert num_parameters("llama-3.2-1b") == 1_235_814_400
    assert num_parameters("mistral-7b-v0.1") == 7_241_732_096
    assert num_parameters("mistral-nemo-12b") == 12_247_782_400
    assert num_parameters("ministral-8b") == 8_019_808_256
    assert num_parameters("qwen2.5-7b") == 7_615_616_512
    assert num_parameters("qwen2.5-0.5b") == 494_032_768
    assert num_parameters("qwen3-8b") == 8_190_735_360
    assert num_parameters("smollm2-135m") == 134_515_008


def test_configuration_tokenizer_and_profiles_do_not_load_torch() -> None:
    modules = "config, checkpoint, gguf_config, tokenizer, profiles"
    code = f"import sys; from kvsluice.models import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
