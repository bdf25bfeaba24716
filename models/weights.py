"""The tensors of a model: names and shapes a checkpoint must have, and how they are laid out for the forward pass.

Query, key and value projections are fused into one matrix, gate and up projections into another. Every source tensor is
read once, cast and copied into its place, so that no second copy of the model exists at any time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import BrokenCheckpoint
from .hf_config import ModelConfig
from .parallel import cut, part_of

# biases behind a sum over the ranks; one of them adds them
ADDED_ONCE = ("o_bias", "down_bias")


@dataclass
class LayerWeights:
    """One layer. Hq = num_heads * head_dim, Hk = num_kv_heads * head_dim, F = intermediate size, D = hidden size.

    Attributes:
        input_norm, post_norm: [D].
        qkv: [Hq + 2 Hk, D], rows of q, then k, then v; qkv_bias [Hq + 2 Hk].
        q_norm, k_norm: [head_dim].
        o: [D, Hq]; o_bias [D].
        gate_up: [2 F, D], rows of gate, then up; gate_up_bias [2 F].
        down: [D, F]; down_bias [D].
    """

    input_norm: Tensor
    post_norm: Tensor
    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass
class Weights:
    """A whole model: embed [V, D], layers, final norm [D], head [V, D] (the same tensor as embed when tied)."""

    embed: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    head: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held, a tied head counted once."""
        seen = {t.data_ptr(): t.nbytes for t in (self.embed, self.norm, self.head)}
        for layer in self.layers:
            seen |= {t.data_ptr(): t.nbytes for t in vars(layer).values() if t is not None}
        return sum(seen.values())


class TensorSource(Protocol):
    """Where a checkpoint's tensors come from, under Hugging Face names."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, known without reading any data."""
        ...

    def where(self, name: str) -> str:
        """The file that holds a tensor, for error messages."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU in some floating dtype; the caller does not keep it."""
        ...

    def digest(self) -> str:
        """Hex digits over the content of all tensors read so far."""
        ...


@dataclass(frozen=True)
class Slot:
    """Where one source tensor goes: rows [start, stop) of an attribute of a layer, or of the model itself."""

    layer: int | None
    attribute: str
    start: int
    shape: tuple[int, ...]


def slots(config: ModelConfig) -> dict[str, Slot]:
    """Every tensor that a checkpoint of this configuration must have, by its Hugging Face name."""
    d, v = config.hidden_size, config.vocab_size
    found = {
        "model.embed_tokens.weight": Slot(None, "embed", 0, (v, d)),
        "model.norm.weight": Slot(None, "norm", 0, (d,)),
    }
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = Slot(None, "head", 0, (v, d))
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        found |= {prefix + name: slot for name, slot in _layer_slots(config, layer).items()}
    return found


def _layer_slots(config: ModelConfig, layer: int) -> dict[str, Slot]:
    d, f, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, k = config.num_heads * dim, config.num_kv_heads * dim
    # name, attribute, first row, rows, columns, has a bias
    linears = (
        ("self_attn.q_proj", "qkv", 0, q, d, config.qkv_bias),
        ("self_attn.k_proj", "qkv", q, k, d, config.qkv_bias),
        ("self_attn.v_proj", "qkv", q + k, k, d, config.qkv_bias),
        ("self_attn.o_proj", "o", 0, d, q, config.o_bias),
        ("mlp.gate_proj", "gate_up", 0, f, d, config.mlp_bias),
        ("mlp.up_proj", "gate_up", f, f, d, config.mlp_bias),
        ("mlp.down_proj", "down", 0, d, f, config.mlp_bias),
    )
    found = {
        "input_layernorm.weight": Slot(layer, "input_norm", 0, (d,)),
        "post_attention_layernorm.weight": Slot(layer, "post_norm", 0, (d,)),
    }
    for name, attribute, start, rows, columns, bias in linears:
        found[name + ".weight"] = Slot(layer, attribute, start, (rows, columns))
        if bias:
            found[name + ".bias"] = Slot(layer, attribute + "_bias", start, (rows,))
    if config.qk_norm:
        found["self_attn.q_norm.weight"] = Slot(layer, "q_norm", 0, (dim,))
        found["self_attn.k_norm.weight"] = Slot(layer, "k_norm", 0, (dim,))
    return found


def empty_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Weights:
    """Uninitialised tensors of the right shapes; a tied head shares memory with the embedding."""
    rows: dict[tuple[int | None, str], int] = {}
    tails: dict[tuple[int | None, str], tuple[int, ...]] = {}
    for slot in slots(config).values():
        key = (slot.layer, slot.attribute)
        rows[key] = max(rows.get(key, 0), slot.start + slot.shape[0])
        tails[key] = slot.shape[1:]
    made = {key: torch.empty((rows[key], *tails[key]), dtype=dtype, device=device) for key in rows}
    layers = [
        LayerWeights(**{attribute: made[layer, attribute] for layer, attribute in made if layer == index})
        for index in range(config.num_layers)
    ]
    embed = made[None, "embed"]
    return Weights(embed, layers, made[None, "norm"], made.get((None, "head"), embed))


def check_shapes(config: ModelConfig, source: TensorSource) -> None:
    """Compare a checkpoint's tensors with what its configuration asks for, before anything is allocated or read.

    Raises:
        BrokenCheckpoint: a tensor is missing, has another shape, or is not one the configuration knows.
    """
    wanted, found = slots(config), source.shapes()
    for name, slot in wanted.items():
        if name not in found:
            raise BrokenCheckpoint(f"tensor {name} is missing from the checkpoint")
        if tuple(found[name]) != slot.shape:
            raise BrokenCheckpoint(
                f"{source.where(name)}: tensor {name} has shape {list(found[name])}, "
                f"the configuration asks for {list(slot.shape)}"
            )
    for name in found:
        if name not in wanted and not _is_harmless(name, config):
            raise BrokenCheckpoint(f"{source.where(name)}: tensor {name[:128]} does not belong to the model")


def _is_harmless(name: str, config: ModelConfig) -> bool:
    # old checkpoints store frequencies that follow from the configuration, and tied ones may store the head twice
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def fill_weights(
    config: ModelConfig, source: TensorSource, dtype: torch.dtype, device: torch.device, rank: int = 0, size: int = 1
) -> Weights:
    """Read a checkpoint into fused tensors; of each no more than a rank of `size` holds.

    Raises:
        BrokenCheckpoint: as `check_shapes`, or a tensor cannot be read.
    """
    check_shapes(config, source)
    return _fill(config, source.read, dtype, device, rank, size)


def _fill(
    config: ModelConfig,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    device: torch.device,
    rank: int,
    size: int,
) -> Weights:
    part = part_of(config, size)
    weights = empty_weights(part, dtype, device)
    for name, slot in slots(part).items():
        target = getattr(weights if slot.layer is None else weights.layers[slot.layer], slot.attribute)
        tensor = cut(read(name), slot.shape, rank)
        if rank and slot.attribute in ADDED_ONCE:
            tensor = torch.zeros_like(tensor)
        target[slot.start : slot.start + slot.shape[0]].copy_(tensor)
    return weights


def part_of_weights(
    config: ModelConfig, whole: Weights, dtype: torch.dtype, device: torch.device, rank: int, size: int
) -> Weights:
    """What a rank of `size` holds of weights that are all here."""
    named = slots(config)

    def read(name: str) -> Tensor:
        slot = named[name]
        tensor: Tensor = getattr(whole if slot.layer is None else whole.layers[slot.layer], slot.attribute)
        return tensor[slot.start : slot.start + slot.shape[0]]

    return _fill(config, read, dtype, device, rank, size)


def random_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int) -> Weights:
    """Weights of the right shapes, drawn in the target dtype on the target device.

    Matrices have standard deviation 1 / sqrt(inputs), those that write to the residual stream less by sqrt(2 layers),
    so that activations keep their size through any depth; norms are 1 and biases 0.
    """
    weights = empty_weights(config, dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    damping = 1 / math.sqrt(2 * config.num_layers)
    for tensor in {id(t): t for t in (weights.embed, weights.head)}.values():
        tensor.normal_(0, 1 / math.sqrt(config.hidden_size), generator=generator)
    weights.norm.fill_(1)
    for layer in weights.layers:
        for name, tensor in vars(layer).items():
            if tensor is None:
                continue
            if tensor.dim() == 1:
                tensor.fill_(0 if name.endswith("bias") else 1)
            else:
                scale = damping if name in ("o", "down") else 1.0
                tensor.normal_(0, scale / math.sqrt(tensor.shape[1]), generator=generator)
    return weights
