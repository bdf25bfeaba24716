"""Logits of tiny random checkpoints of every family and RoPE kind equal those of transformers.

Tolerance: both sides compute in float32 and differ in the order of sums only (fused projections, fused attention).
Each logit passes about ten matrix products in a row, of up to 80 terms; rounding of 2^-24 a term grows with the root of
their number to about 1e-5 of the largest logit. Real faults (a wrong frequency, mask or permutation) show at 1e-2.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvsluice.models.forward import Rows, forward_rows, forward_tokens
from kvsluice.models.loader import load_config, load_model
from kvsluice.models.model import Model

TOLERANCE = 2e-5
LENGTH = 96

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
    # the sequence is longer than max_position_embeddings, so the base grows
    "dynamic": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
    },
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-no-groups": ("llama", {"num_key_value_heads": 4}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "mistral-wide-heads": ("mistral", {"sliding_window": 9, "head_dim": 32}),
    "qwen2-window-from-layer-1": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2-window-unused": ("qwen2", {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0}),
    "qwen2-layer-types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3-biases-narrow-heads": ("qwen3", {"attention_bias": True, "head_dim": 8}),
    "qwen3-window": ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    "yarn-attention-factor": ("llama", {"rope_parameters": ROPES["yarn"] | {"attention_factor": 1.7}}),
    "yarn-mscale": ("llama", {"rope_parameters": ROPES["yarn"] | {"mscale": 1.3, "mscale_all_dim": 0.7}}),
    "yarn-not-truncated": ("llama", {"rope_parameters": ROPES["yarn"] | {"truncate": False}}),
}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 97, (LENGTH,), generator=torch.Generator().manual_seed(3))


def oracle(hf: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = hf(ids[None]).logits[0]
    return logits


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == torch.float32
    assert ours.shape == theirs.shape
    scale = float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) <= TOLERANCE * scale
    # the bound says nothing about logits that do not vary
    assert float(theirs.std()) > 0.05 * scale


def rows_in_steps(model: Model, cache: Any, ids: torch.Tensor, sizes: list[int], num_prompt: int) -> torch.Tensor:
    """Logits of all rows, passed in steps of the given sizes."""
    assert sum(sizes) == len(ids)
    logits, start = [], 0
    for size in sizes:
        positions = torch.arange(start, start + size)
        batch = [Rows(ids[start : start + size], positions, cache, num_prompt)]
        logits.append(model.logits(forward_rows(model, batch)))
        start += size
    return torch.cat(logits)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_pass_of_every_family_and_rope_kind(family: str, rope: str, tiny: Any, ids: torch.Tensor) -> None:
    folder, hf = tiny(family, rope_parameters=ROPES[rope], **FAMILIES[family])

    model = load_model(str(folder))

    assert model.config.rope.kind == rope
    assert_close(forward_tokens(model, ids), oracle(hf, ids))


@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_and_stepwise_pass_of_variants(variant: str, tiny: Any, dense_cache: Any, ids: torch.Tensor) -> None:
    family, changes = VARIANTS[variant]
    folder, hf = tiny(family, **changes)
    theirs = oracle(hf, ids)

    model = load_model(str(folder))

    assert_close(forward_tokens(model, ids), theirs)
    assert_close(rows_in_steps(model, dense_cache(model), ids, [40, 33, 1, 1, 21], LENGTH), theirs)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_then_single_tokens_equals_generation(
    family: str, rope: str, tiny: Any, dense_cache: Any, ids: torch.Tensor
) -> None:
    # with dynamic scaling every generated token changes the base, and keys of earlier ones keep theirs
    num_prompt = 60
    folder, hf = tiny(family, rope_parameters=ROPES[rope], **FAMILIES[family])
    with torch.no_grad():
        step = hf(ids[None, :num_prompt], use_cache=True)
        theirs = [step.logits[0]]
        for at in range(num_prompt, LENGTH):
            step = hf(ids[None, at : at + 1], past_key_values=step.past_key_values, use_cache=True)
            theirs.append(step.logits[0])

    model = load_model(str(folder))
    sizes = [num_prompt] + [1] * (LENGTH - num_prompt)
    ours = rows_in_steps(model, dense_cache(model), ids, sizes, num_prompt)

    assert_close(ours, torch.cat(theirs))


@pytest.mark.parametrize("rope", ["default", "dynamic"])
def test_batch_of_sequences_equals_each_alone(rope: str, tiny: Any, dense_cache: Any, ids: torch.Tensor) -> None:
    folder, _ = tiny("mistral", sliding_window=11, rope_parameters=ROPES[rope])
    model = load_model(str(folder))
    lengths = [70, 96, 5]
    alone = [rows_in_steps(model, dense_cache(model), ids[:n], [n - 2, 1, 1], n - 2)[-3:] for n in lengths]
    caches = [dense_cache(model) for _ in lengths]
    together: list[list[torch.Tensor]] = [[], [], []]
    for step in range(3):
        batch = []
        for n, cache in zip(lengths, caches, strict=True):
            positions = torch.arange(n - 2) if step == 0 else torch.tensor([n - 3 + step])
            batch.append(Rows(ids[positions], positions, cache, n - 2))
        hidden = forward_rows(model, batch).split([len(rows.ids) for rows in batch])
        for rows, out in zip(hidden, together, strict=True):
            out.append(model.logits(rows[-1:]))

    for single, batched in zip(alone, together, strict=True):
        assert_close(torch.cat(batched), single)


@pytest.mark.parametrize("rope", ROPES)
def test_configuration_in_the_style_before_transformers_5(rope: str, tiny: Any) -> None:
    folder, _ = tiny("llama", rope_parameters=ROPES[rope])
    new = load_config(str(folder))

    path = Path(folder) / "config.json"
    raw = json.loads(path.read_text())
    parameters = raw.pop("rope_parameters")
    raw["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    for key in ("rope_type", "type"):
        raw["rope_scaling"] = None if kind == "default" else {key: kind} | parameters
        path.write_text(json.dumps(raw))
        assert load_config(str(folder)) == new


def test_half_precision_weights_stay_in_their_dtype(tiny: Any, ids: torch.Tensor) -> None:
    folder, hf = tiny("qwen3")

    model = load_model(str(folder), dtype=torch.bfloat16)

    assert {t.dtype for layer in model.weights.layers for t in vars(layer).values() if t is not None} == {
        torch.bfloat16
    }
    ours, theirs = forward_tokens(model, ids), oracle(hf, ids)
    # bfloat16 keeps 8 bits of every activation: a few per cent after three layers
    assert float((ours - theirs).std()) < 0.05 * float(theirs.std())


def test_sharded_checkpoint_equals_a_single_file(tiny: Any, tmp_path: Path, ids: torch.Tensor) -> None:
    folder, hf = tiny("qwen2")
    hf.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()

    single, sharded = load_model(str(folder)), load_model(str(tmp_path / "sharded"))

    assert torch.equal(forward_tokens(single, ids), forward_tokens(sharded, ids))
    assert single.fingerprint == sharded.fingerprint
