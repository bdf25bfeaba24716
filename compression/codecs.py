"""Codecs: rows of keys or values to packed tensors, and readers that decode chosen chunks of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.quantize import dequantize, dequantize_chunks, quantize
from ..kernels.step_attention import Layout, Packed
from .interfaces import Summed
from .slots import Affine

Tensors = Mapping[str, Tensor]

PACKED = ("codes", "scale", "minimum")  # what `quantize` gives
FLOAT8_MAX = 448.0  # of e4m3
BLOCK_ROWS = 2048  # rows packed at once, so that float32 copies do not grow with the prompt


class Reader(Protocol):
    """Packed rows of one layer, decoded on demand.

    Attributes:
        chunk_nbytes: bytes that decoding one chunk of one KV head touches, what all chunks share not included.
        basis_nbytes: bytes of what all chunks share.
    """

    chunk_nbytes: int
    basis_nbytes: int

    def read(self, heads: Tensor, chunks: Tensor) -> Tensor:
        """heads, chunks int64 [M] -> float32 [M, chunk, d]; touches those entries only."""
        ...

    def read_all(self) -> Tensor:
        """[n, Hkv, d], all rows; may be a view."""
        ...

    def packed(self) -> Packed:
        """The rows as they lie, for kernels that decode them in place."""
        ...


class Codec(Protocol):
    """One way of packing rows. Tensors have rows, or groups of rows, on axis 0 and are named as in the slot's specs."""

    def fit(self, rows: Tensor, query_peak: Tensor | None = None) -> dict[str, Tensor]:
        """What all rows of a layer share, from its sealed prompt rows [n, Hkv, d] and, where the slot asks for it, the
        largest |q| of every channel, float32 [Hkv, d]; empty for most codecs."""
        ...

    def encode(self, rows: Tensor, basis: Tensors, summed: Summed | None = None) -> dict[str, Tensor]:
        """Pack rows [n, Hkv, d], block by block so that no copy of all rows is made; the tensors own their storage.

        Rows that are kept as they are, and own their storage, are handed over: the caller no longer writes to them.

        Args:
            summed: adds up what ranks that hold other heads have; None = the rows are of all heads."""
        ...

    def reader(self, tensors: Tensors, basis: Tensors, head_dim: int, chunk: int) -> Reader:
        """Decode what `encode` made."""
        ...


def compact(x: Tensor) -> Tensor:
    """x, or a contiguous copy when it keeps more storage alive than it shows."""
    if x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def owned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A compact copy of x in a dtype, sharing nothing with it."""
    out = x.to(dtype)
    return out.clone(memory_format=torch.contiguous_format) if out.data_ptr() == x.data_ptr() else compact(out)


def peak(x: Tensor, dim: int) -> Tensor:
    """float32 largest magnitude along an axis, without a copy of x."""
    low, high = torch.aminmax(x, dim=dim)
    return torch.maximum(-low, high).float()


def chunk_rows(chunks: Tensor, chunk: int) -> Tensor:
    """Row indices int64 [M, chunk] of chunks [M]."""
    return chunks[:, None] * chunk + torch.arange(chunk, device=chunks.device)


class DenseCodec:
    """Rows in a floating-point dtype, or in the one they come in."""

    def __init__(self, dtype: str | None) -> None:
        self._dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)

    def fit(self, rows: Tensor, query_peak: Tensor | None = None) -> dict[str, Tensor]:
        """See `Codec`."""
        return {}

    def encode(self, rows: Tensor, basis: Tensors, summed: Summed | None = None) -> dict[str, Tensor]:
        """See `Codec`."""
        return {"rows": compact(rows.to(self._dtype or rows.dtype))}

    def reader(self, tensors: Tensors, basis: Tensors, head_dim: int, chunk: int) -> Reader:
        """See `Codec`."""
        return DenseReader(tensors["rows"], chunk)


class DenseReader:
    """Reads rows [n, Hkv, d] as they lie."""

    basis_nbytes = 0

    def __init__(self, rows: Tensor, chunk: int) -> None:
        self._rows = rows
        self._chunk = chunk
        self.chunk_nbytes = chunk * rows.shape[2] * rows.element_size()

    def read(self, heads: Tensor, chunks: Tensor) -> Tensor:
        """See `Reader`."""
        rows = chunk_rows(chunks, self._chunk)
        return self._rows[rows, heads[:, None]].float()

    def read_all(self) -> Tensor:
        """See `Reader`."""
        return self._rows

    def packed(self) -> Packed:
        """See `Reader`."""
        return Packed(Layout("dense", dtype=self._rows.dtype), (self._rows,))


class AffineCodec:
    """Integers with a scale and a minimum per group, of channels that may be balanced first."""

    def __init__(self, spec: Affine) -> None:
        self._spec = spec

    def fit(self, rows: Tensor, query_peak: Tensor | None = None) -> dict[str, Tensor]:
        """See `Codec`: {"balance": float32 [1, Hkv, d]} of a balanced codec. A channel without keys or queries is left
        as it is."""
        if not self._spec.balanced:
            return {}
        assert query_peak is not None, "asked for by `wants_query_peak`"
        key_peak = peak(rows, dim=0)
        usable = (key_peak > 0) & (query_peak > 0)
        return {"balance": torch.where(usable, query_peak / key_peak.clamp(min=1e-30), 1.0).sqrt()[None]}

    def encode(self, rows: Tensor, basis: Tensors, summed: Summed | None = None) -> dict[str, Tensor]:
        """See `Codec`."""
        spec = self._spec
        if not spec.balanced:
            packed = quantize(rows, spec.bits, spec.group, spec.axis)
            return dict(zip(PACKED, packed, strict=True))
        # along tokens, so blocks of rows are packed apart
        pieces = [
            quantize(rows[begin : begin + BLOCK_ROWS] * basis["balance"], spec.bits, spec.group, spec.axis)
            for begin in range(0, len(rows), BLOCK_ROWS)
        ]
        return {name: torch.cat(tensors) for name, tensors in zip(PACKED, zip(*pieces, strict=True), strict=True)}

    def reader(self, tensors: Tensors, basis: Tensors, head_dim: int, chunk: int) -> Reader:
        """See `Codec`."""
        return AffineReader(tensors, self._spec, head_dim, chunk, basis.get("balance"))


class AffineReader:
    """Reads packed integers [n, Hkv, bytes]."""

    def __init__(self, tensors: Tensors, spec: Affine, head_dim: int, chunk: int, balance: Tensor | None) -> None:
        self._packed = (tensors["codes"], tensors["scale"], tensors["minimum"])
        self._spec = spec
        self._head_dim = head_dim
        self._chunk = chunk
        self._balance = balance
        code_bytes = chunk * self._packed[0].shape[-1]
        pairs = self._packed[1].shape[-1] * (1 if spec.axis == "channel" else chunk)
        self.chunk_nbytes = code_bytes + pairs * 2 * self._packed[1].element_size()
        self.basis_nbytes = 0 if balance is None else balance.nbytes

    def read(self, heads: Tensor, chunks: Tensor) -> Tensor:
        """See `Reader`."""
        spec = self._spec
        rows = dequantize_chunks(
            *self._packed, heads, chunks, self._chunk, spec.bits, spec.group, spec.axis, self._head_dim
        )
        return rows if self._balance is None else rows / self._balance[0, heads][:, None]

    def read_all(self) -> Tensor:
        """See `Reader`."""
        rows: Tensor = dequantize(*self._packed, self._spec.bits, self._spec.group, self._spec.axis, self._head_dim)
        return rows if self._balance is None else rows / self._balance

    def packed(self) -> Packed:
        """See `Reader`."""
        spec = self._spec
        layout = Layout(spec.axis, bits=spec.bits, group=spec.group, balanced=self._balance is not None)
        return Packed(layout, self._packed, self._balance)


class Float8Codec:
    """e4m3 numbers with one scale a layer."""

    def fit(self, rows: Tensor, query_peak: Tensor | None = None) -> dict[str, Tensor]:
        """See `Codec`: {"scale": float32 [1]}, above 0."""
        return {"scale": (peak(rows.flatten(), dim=0) / FLOAT8_MAX).clamp(min=1e-30)[None]}

    def encode(self, rows: Tensor, basis: Tensors, summed: Summed | None = None) -> dict[str, Tensor]:
        """See `Codec`."""
        out = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=rows.device)
        for begin in range(0, len(rows), BLOCK_ROWS):
            block = rows[begin : begin + BLOCK_ROWS].float() / basis["scale"]
            # the conversion alone turns numbers beyond the range into NaN
            out[begin : begin + BLOCK_ROWS] = block.clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(out.dtype)
        return {"rows": out}

    def reader(self, tensors: Tensors, basis: Tensors, head_dim: int, chunk: int) -> Reader:
        """See `Codec`."""
        return Float8Reader(tensors["rows"], basis["scale"], chunk)


class Float8Reader:
    """Reads e4m3 rows [n, Hkv, d]."""

    def __init__(self, rows: Tensor, scale: Tensor, chunk: int) -> None:
        self._rows = rows
        self._scale = scale
        self._chunk = chunk
        self.chunk_nbytes = chunk * rows.shape[2]
        self.basis_nbytes = scale.nbytes

    def read(self, heads: Tensor, chunks: Tensor) -> Tensor:
        """See `Reader`."""
        rows = chunk_rows(chunks, self._chunk)
        # bytes are gathered, because not every device indexes 8-bit floats
        return self._rows.view(torch.uint8)[rows, heads[:, None]].view(self._rows.dtype).float() * self._scale

    def read_all(self) -> Tensor:
        """See `Reader`."""
        return self._rows.float() * self._scale

    def packed(self) -> Packed:
        """See `Reader`."""
        return Packed(Layout("float8"), (self._rows,), self._scale)
