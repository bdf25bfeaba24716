"""Where tensors come from: safetensors shards, a GGUF file, and an adapter merged over either."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..errors import BrokenCheckpoint, UnsupportedModel
from .checkpoint import read_json
from .gguf_config import hf_names
from .gguf_file import GgufFile
from .weights import TensorSource

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = ("F64", "F32", "F16", "BF16")


class _Digest:
    """Hash over what was read, whatever the order of reading."""

    def __init__(self) -> None:
        self._parts: dict[str, str] = {}

    def add(self, name: str, content: Any) -> None:
        self._parts[name] = xxhash.xxh3_128_hexdigest(content)

    def hexdigest(self) -> str:
        listing = "\n".join(f"{name} {digest}" for name, digest in sorted(self._parts.items()))
        return xxhash.xxh3_128_hexdigest(listing.encode())


class SafetensorsSource:
    """The shards of a Hugging Face folder, memory-mapped; a tensor's bytes are touched when it is read.

    Raises:
        BrokenCheckpoint: no weights, a shard that is missing, truncated or not what the index says.
        UnsupportedModel: weights in another format, or quantized tensors.
    """

    def __init__(self, folder: Path) -> None:
        self._digest = _Digest()
        self._files: dict[str, Any] = {}
        self._place: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        index = _shard_index(folder)
        for shard in sorted(set(index.values())) if index is not None else [_SINGLE]:
            self._open(folder, shard)
        for name, shard in (index or {}).items():
            if self._place.get(name) != shard:
                raise BrokenCheckpoint(f"{shard}: tensor {name[:128]} is missing, {_INDEX} says it is there")

    def _open(self, folder: Path, shard: str) -> None:
        if not (folder / shard).is_file():
            raise BrokenCheckpoint(f"{shard} is missing from the checkpoint folder")
        try:
            file: Any = safe_open(folder / shard, framework="pt")
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                view = file.get_slice(name)
                if view.get_dtype() not in _DTYPES:
                    raise UnsupportedModel(
                        f"{shard}: tensor {name[:128]} has dtype {view.get_dtype()}; supported: {', '.join(_DTYPES)}"
                    )
                self._shapes[name] = tuple(view.get_shape())
                self._place[name] = shard
        except (SafetensorError, OSError) as exc:
            raise BrokenCheckpoint(f"{shard} is truncated or not a safetensors file") from exc
        self._files[shard] = file

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def where(self, name: str) -> str:
        return self._place[name]

    def read(self, name: str) -> Tensor:
        shard = self._place[name]
        try:
            tensor: Tensor = self._files[shard].get_tensor(name)
        except (SafetensorError, OSError) as exc:
            raise BrokenCheckpoint(f"{shard}: tensor {name[:128]} cannot be read") from exc
        self._digest.add(name, tensor.contiguous().view(-1).view(torch.uint8).numpy())
        return tensor

    def digest(self) -> str:
        return self._digest.hexdigest()


def _shard_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> shard, or None for a single file."""
    if not (folder / _INDEX).is_file():
        if not (folder / _SINGLE).is_file() and any(folder.glob("pytorch_model*.bin")):
            raise UnsupportedModel("the checkpoint has no safetensors weights; supported: safetensors, GGUF")
        return None
    weight_map = read_json(folder, _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BrokenCheckpoint(f"{_INDEX} has no weight_map")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise BrokenCheckpoint(f"{_INDEX} names a shard that is not a file of the folder")
    return weight_map


class GgufSource:
    """The tensors of a GGUF file under Hugging Face names, dequantized to float32 when read.

    Rows of q and k of the llama architecture are stored interleaved for another RoPE layout; they are put back.
    """

    def __init__(self, file: GgufFile, num_layers: int, num_heads: int, num_kv_heads: int) -> None:
        self._file = file
        self._digest = _Digest()
        self._names = {hf: gguf for hf, gguf in hf_names(num_layers).items() if gguf in file.tensors}
        known = {*self._names.values(), "rope_freqs.weight"}
        self._unknown = [name for name in file.tensors if name not in known]
        permuted = file.fields["general.architecture"] == "llama"
        self._heads = {"q_proj": num_heads, "k_proj": num_kv_heads} if permuted else {}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        unknown = {name: self._file.tensors[name].shape for name in self._unknown}
        return {hf: self._file.tensors[gguf].shape for hf, gguf in self._names.items()} | unknown

    def where(self, name: str) -> str:
        return self._file.name

    def read(self, name: str) -> Tensor:
        stored = self._names[name]
        self._digest.add(name, self._file.raw(stored))
        values = self._file.dequantize(stored)
        # a tensor that views the mapped file is read-only, and torch warns of it
        tensor = torch.from_numpy(values if values.flags.writeable else values.copy())
        num_heads = self._heads.get(name.split(".")[-2])
        return tensor if num_heads is None else _unpermute(tensor, num_heads)

    def digest(self) -> str:
        return self._digest.hexdigest()


def _unpermute(rows: Tensor, num_heads: int) -> Tensor:
    """Rows (head, pair, half) -> (head, half, pair): from interleaved RoPE pairs to half-split ones."""
    pairs = rows.view(num_heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


class AdapterSource:
    """A PEFT LoRA adapter merged over another source: W + (alpha / r) B A, in float32 (Hu et al., arXiv 2106.09685).

    Args:
        base: the weights to adapt.
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        BrokenCheckpoint: files are missing, or a factor does not fit its weight.
        UnsupportedModel: an adapter that is more than plain LoRA.
    """

    def __init__(self, base: TensorSource, folder: Path) -> None:
        self._base = base
        self._digest = _Digest()
        config = read_json(folder, "adapter_config.json")
        plain = ("fan_in_fan_out", "use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern")
        if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or any(map(config.get, plain)):
            raise UnsupportedModel("adapter_config.json: only plain LoRA without biases is supported")
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e9:
            raise BrokenCheckpoint("adapter_config.json: r or lora_alpha is missing or out of range")
        self._scale = alpha / rank
        self._factors = _adapter_factors(folder)
        self._check(rank)

    def _check(self, rank: int) -> None:
        shapes = self._base.shapes()
        for name, (a, b) in self._factors.items():
            if a.dim() != 2 or b.dim() != 2 or shapes.get(name) != (len(b), a.shape[1]) or len(a) != b.shape[1]:
                raise BrokenCheckpoint(f"adapter_model.safetensors: factors of {name[:128]} do not fit the model")
            if len(a) != rank:
                raise BrokenCheckpoint(
                    f"adapter_model.safetensors: factors of {name[:128]} have rank {len(a)}, "
                    f"adapter_config.json says r = {rank}"[:400]
                )

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._base.shapes()

    def where(self, name: str) -> str:
        return self._base.where(name)

    def read(self, name: str) -> Tensor:
        tensor = self._base.read(name)
        if name not in self._factors:
            return tensor
        a, b = self._factors[name]
        self._digest.add(name, a.numpy().tobytes() + b.numpy().tobytes())
        return torch.addmm(tensor.float(), b, a, alpha=self._scale)

    def digest(self) -> str:
        return f"{self._base.digest()}{self._digest.hexdigest()}{self._scale}"


def _adapter_factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight name -> (A [r, in], B [out, r]) in float32."""
    file = "adapter_model.safetensors"
    try:
        tensors = load_file(folder / file)
    except (SafetensorError, OSError) as exc:
        raise BrokenCheckpoint(f"{file} is missing, truncated or not a safetensors file") from exc
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    names = [name for name in tensors if name.startswith(prefix) and name.endswith(suffix)]
    factors = {}
    for name in names:
        partner = name.replace(".lora_A.", ".lora_B.")
        if partner not in tensors:
            raise BrokenCheckpoint(f"{file}: tensor {partner[:128]} is missing")
        weight = name.removeprefix(prefix).removesuffix(suffix) + ".weight"
        factors[weight] = (tensors[name].float().contiguous(), tensors[partner].float().contiguous())
    if len(factors) * 2 != len(tensors):
        raise BrokenCheckpoint(f"{file} holds tensors that are not pairs of LoRA factors")
    return factors
