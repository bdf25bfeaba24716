"""The low-rank codec: rows of all heads, keys before RoPE, as factor rows x one basis a layer (ShadowKV §4.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.dispatch import block_rows
from ..kernels.quantize import dequantize, quantize
from ..kernels.sparse_reconstruct import low_rank_chunks
from ..kernels.step_attention import Layout, Packed
from .codecs import BLOCK_ROWS, Reader, Tensors, chunk_rows, owned
from .interfaces import Summed
from .slots import LowRank
from .subspace import leading_subspace


class LowRankCodec:
    """K ~ (K V) V^T with V the leading right singular vectors of K [n, Hkv * d], as `leading_subspace` finds them from
    the Gram matrix: K V V^T depends on the space that they span alone. Nothing here waits for the device.

    Columns are orthonormal whatever the spectrum. At full rank they are those of the identity, and in 16 bits only the
    bfloat16 rounding of the rows remains. The sign of a column is arbitrary; its largest entry is made positive.

    Where factor rows are packed in 8 or 4 bits, the basis is mixed by a fixed rotation first. A row's few strong
    components would make the range of its one group wide for all the weak ones; spread over all columns they do not
    (the rotations of QuaRot, arXiv 2404.00456 §4, do so within a model). With keys of smollm2-135m, rank 80 of 192,
    it takes the relative error in 4 bits from 0.21 to 0.13, and that in 8 bits to within 0.0003 of that in 16.
    """

    def __init__(self, spec: LowRank) -> None:
        assert spec.rank is not None
        self._spec = spec
        self._rank = spec.rank

    def fit(self, rows: Tensor, query_peak: Tensor | None = None) -> dict[str, Tensor]:
        """See `Codec`: {"basis": bfloat16 [rank, Hkv, d]}."""
        width = rows.shape[1:].numel()
        if self._rank >= width:
            vectors = torch.eye(width, dtype=torch.float64, device=rows.device)
        else:
            vectors = leading_subspace(gram_matrix(rows.flatten(1)), self._rank)
        if self._spec.bits < 16:
            vectors = vectors @ cosine_basis(vectors.shape[1], rows.device)
        peak = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
        basis = (vectors * torch.where(peak < 0, -1.0, 1.0)).T
        return {"basis": owned(basis.reshape(-1, *rows.shape[1:]), torch.bfloat16)}

    def encode(self, rows: Tensor, basis: Tensors, summed: Summed | None = None) -> dict[str, Tensor]:
        """See `Codec`. A factor row is a sum over all heads."""
        num_rows, heads, dim = rows.shape
        specs = self._spec.tensor_specs(num_rows, heads, dim, str(rows.dtype).removeprefix("torch."))
        out = {name: rows.new_empty(spec.shape, dtype=getattr(torch, spec.dtype)) for name, spec in specs.items()}
        flat, projection = rows.flatten(1), basis["basis"].flatten(1).T
        step = block_rows(rows.device, BLOCK_ROWS)
        for begin in range(0, num_rows, step):
            factors = _product(flat[begin : begin + step], projection)
            packed = self._pack(factors if summed is None else summed(factors))
            for tensor, block in zip(out.values(), packed, strict=True):
                tensor[begin : begin + step] = block
        return out

    def _pack(self, factors: Tensor) -> tuple[Tensor, ...]:
        return (factors,) if self._spec.bits == 16 else quantize(factors, self._spec.bits, self._rank, "token")

    def reader(self, tensors: Tensors, basis: Tensors, head_dim: int, chunk: int) -> Reader:
        """See `Codec`."""
        return LowRankReader(tensors, basis["basis"], self._spec.bits, chunk)


class LowRankReader:
    """Reads factor rows [n, rank] and multiplies them by one head's part of the basis; keys come out before RoPE."""

    def __init__(self, tensors: Tensors, basis: Tensor, bits: int, chunk: int) -> None:
        self._tensors = dict(tensors)
        self._basis = basis
        self._bits = bits
        self._chunk = chunk
        row_nbytes = sum(t.element_size() * t.shape[1] for t in self._tensors.values())
        self.chunk_nbytes = chunk * row_nbytes
        self.basis_nbytes = basis.nbytes

    def read(self, heads: Tensor, chunks: Tensor) -> Tensor:
        """See `Reader`."""
        rows = chunk_rows(chunks, self._chunk).flatten()
        factors = self._factors({name: t[rows] for name, t in self._tensors.items()})
        return low_rank_chunks(factors.view(len(chunks), self._chunk, -1), self._basis, heads)

    def read_all(self) -> Tensor:
        """See `Reader`."""
        keys: Tensor = self._factors(self._tensors) @ self._basis.float().flatten(1)
        return keys.view(len(keys), *self._basis.shape[1:])

    def packed(self) -> Packed:
        """See `Reader`."""
        layout = Layout("lowrank", bits=self._bits, rank=self._basis.shape[0])
        return Packed(layout, tuple(self._tensors.values()), self._basis)

    def _factors(self, tensors: Tensors) -> Tensor:
        rank = self._basis.shape[0]
        if self._bits == 16:
            return tensors["rows"].float()
        return dequantize(tensors["codes"], tensors["scale"], tensors["minimum"], self._bits, rank, "token", rank)


def gram_matrix(rows: Tensor) -> Tensor:
    """rows^T rows in float64 [w, w], of rows [n, w]: products of a block of rows in float32, summed up in float64."""
    gram = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    step = block_rows(rows.device, BLOCK_ROWS)
    for begin in range(0, len(rows), step):
        block = rows[begin : begin + step]
        gram += _product(block.T, block)
    return gram


def cosine_basis(size: int, device: torch.device) -> Tensor:
    """The orthogonal matrix of the discrete cosine transform (type 4), float64 [size, size]: no entry is above
    sqrt(2 / size)."""
    odd = torch.arange(size, dtype=torch.float64, device=device) * 2 + 1
    return torch.cos(torch.outer(odd, odd) * (math.pi / (4 * size))) * math.sqrt(2 / size)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32. On a GPU 16-bit numbers are multiplied as they are, which tensor cores do exactly."""
    if a.device.type == "cuda" and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
