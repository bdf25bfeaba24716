"""Reading GGUF files: metadata, the table of tensors, and the bytes of a tensor, memory-mapped. Free of torch.

The `gguf` package knows block sizes and how to dequantize; its reader builds an array object per string, which takes
seconds for a tokenizer's vocabulary, so the file's structure is parsed here.

    magic "GGUF" | version u32 | num_tensors u64 | num_keys u64 | keys: name, type u32, value
    | tensors: name, num_dims u32, dims u64 (innermost first), type u32, offset u64 | padding to the alignment | data
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from ..errors import BrokenCheckpoint, UnsupportedModel

QUANTIZATIONS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_COUNT = 1 << 24
_MAX_DIMS = 4


@dataclass(frozen=True)
class GgufTensor:
    """An entry of the table of tensors: shape with the outermost dimension first, and where the bytes are."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    num_bytes: int


class GgufFile:
    """One GGUF file.

    Args:
        path: the file.

    Attributes:
        name: the file's name, for messages.
        fields: metadata by key; strings, numbers and lists.
        tensors: entries by name.

    Raises:
        BrokenCheckpoint: not a GGUF file of version 2 or 3, or one that ends too early.
        UnsupportedModel: a quantization that is not covered.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as exc:
            raise BrokenCheckpoint(f"{self.name} cannot be read") from exc
        parser = _Parser(self._data, self.name)
        try:
            self.fields, self.tensors = parser.parse()
        except (struct.error, IndexError, UnicodeDecodeError) as exc:
            raise BrokenCheckpoint(f"{self.name} ends too early or is damaged") from exc

    def raw(self, name: str) -> memoryview:
        """The stored bytes of a tensor, without a copy."""
        tensor = self.tensors[name]
        return memoryview(self._data)[tensor.start : tensor.start + tensor.num_bytes]

    def dequantize(self, name: str) -> NDArray[np.float32]:
        """A tensor as float32 of its shape."""
        tensor = self.tensors[name]
        if tensor.kind == GGMLQuantizationType.F32:
            return np.frombuffer(self.raw(name), np.float32).reshape(tensor.shape)
        rows = np.frombuffer(self.raw(name), np.uint8).reshape(*tensor.shape[:-1], -1)
        if tensor.kind == GGMLQuantizationType.F16:
            return rows.view(np.float16).astype(np.float32)
        return dequantize(rows, tensor.kind).reshape(tensor.shape).astype(np.float32, copy=False)


class _Parser:
    """Walks a GGUF file's header; every count is bounded before it is used."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self._data = data
        self._name = name
        self._at = 0

    def parse(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        magic, version = self._data[:4], struct.unpack_from("<I", self._data, 4)[0]
        if magic != b"GGUF" or version not in (2, 3):
            raise BrokenCheckpoint(f"{self._name} is not a little-endian GGUF file of version 2 or 3")
        self._at = 8
        num_tensors, num_keys = self._count(), self._count()
        fields = {}
        for _ in range(num_keys):
            key = self._string()
            fields[key] = self._value(self._scalar("I"))
        entries = [self._entry() for _ in range(num_tensors)]
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise BrokenCheckpoint(f"{self._name}: general.alignment is not a positive integer")
        base = -(-self._at // alignment) * alignment
        return fields, {name: self._tensor(name, dims, kind, base + at) for name, dims, kind, at in entries}

    def _tensor(self, name: str, dims: tuple[int, ...], kind: int, start: int) -> GgufTensor:
        known = {k.value: k for k in GGMLQuantizationType if k.name in QUANTIZATIONS}
        if kind not in known:
            raise UnsupportedModel(
                f"{self._name}: tensor {name[:128]} has quantization type {kind}; supported: {', '.join(QUANTIZATIONS)}"
            )
        block, block_bytes = GGML_QUANT_SIZES[known[kind]]
        if dims[-1] % block:
            raise BrokenCheckpoint(f"{self._name}: rows of tensor {name[:128]} are no whole number of blocks")
        num_bytes = math.prod(dims) // block * block_bytes
        if start + num_bytes > len(self._data):
            raise BrokenCheckpoint(f"{self._name} ends before the data of tensor {name[:128]}")
        return GgufTensor(name, dims, known[kind], start, num_bytes)

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dims = self._scalar("I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise BrokenCheckpoint(f"{self._name}: tensor {name[:128]} has {num_dims} dimensions")
        dims = tuple(self._scalar("Q") for _ in range(num_dims))
        if any(not 1 <= size <= 1 << 32 for size in dims):
            raise BrokenCheckpoint(f"{self._name}: tensor {name[:128]} has an impossible shape")
        return name, dims[::-1], self._scalar("I"), self._scalar("Q")

    def _scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self._data, self._at)[0]
        self._at += struct.calcsize("<" + code)
        return value

    def _count(self) -> int:
        count = self._scalar("Q")
        if count > _MAX_COUNT:
            raise BrokenCheckpoint(f"{self._name}: a count of {count} is impossible")
        return int(count)

    def _string(self) -> str:
        length = self._scalar("Q")
        raw = self._data[self._at : self._at + length] if length <= len(self._data) else b""
        if len(raw) != length:
            raise BrokenCheckpoint(f"{self._name} ends inside a string")
        self._at += length
        return raw.decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise BrokenCheckpoint(f"{self._name}: unknown metadata type {kind}")
        item, count = self._scalar("I"), self._count()
        if item == _STRING:
            return [self._string() for _ in range(count)]
        if item not in _SCALARS:
            raise BrokenCheckpoint(f"{self._name}: unknown array type {item}")
        values = struct.unpack_from(f"<{count}{_SCALARS[item]}", self._data, self._at)
        self._at += struct.calcsize(f"<{count}{_SCALARS[item]}")
        return list(values)
