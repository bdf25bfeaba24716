"""The low-rank codec: rows of all heads, keys before RoPE, as factor rows x one basis a layer (ShadowKV §4.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.quantize import dequantize, quantize
from ..kernels.sparse_reconstruct import low_rank_chunks
from ..kernels.step_attention import Layout, Packed
from .codecs import BLOCK_ROWS, Reader, Tensors, chunk_rows, owned
from .slots import LowRank


class LowRankCodec:
    """K ~ (K V) V^T with V the leading right singular vectors of K [n, Hkv * d].

    V comes from the eigenvectors of the Gram matrix, summed up in float64 block by block, so that its columns are
    orthonormal whatever the spectrum: at full rank only the bfloat16 rounding of rows and basis remains (a relative
    error of about 2^-8).
    The sign of a singular vector is arbitrary; its largest entry is made positive.
    """

    def __init__(self, spec: LowRank) -> None:
        assert spec.rank is not None
        self._spec = spec
        self._rank = spec.rank

    def fit(self, rows: Tensor, query_peak: Tensor | None = None) -> dict[str, Tensor]:
        """See `Codec`: {"basis": bfloat16 [rank, Hkv, d]}."""
        flat = rows.flatten(1)
        gram = flat.new_zeros(flat.shape[1], flat.shape[1], dtype=torch.float64)
        for begin in range(0, len(flat), BLOCK_ROWS):
            _add_gram(gram, flat[begin : begin + BLOCK_ROWS].double())
        vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, : self._rank]
        peak = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
        basis = (vectors * torch.where(peak < 0, -1.0, 1.0)).T
        return {"basis": owned(basis.reshape(-1, *rows.shape[1:]), torch.bfloat16)}

    def encode(self, rows: Tensor, basis: Tensors) -> dict[str, Tensor]:
        """See `Codec`."""
        num_rows, heads, dim = rows.shape
        specs = self._spec.tensor_specs(num_rows, heads, dim, str(rows.dtype).removeprefix("torch."))
        out = {name: rows.new_empty(spec.shape, dtype=getattr(torch, spec.dtype)) for name, spec in specs.items()}
        projection = basis["basis"].float().flatten(1).T
        for begin in range(0, len(rows), BLOCK_ROWS):
            block = rows[begin : begin + BLOCK_ROWS]
            for tensor, packed in zip(out.values(), self._pack(block.flatten(1).float() @ projection), strict=True):
                tensor[begin : begin + BLOCK_ROWS] = packed
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


def _add_gram(gram: Tensor, block: Tensor) -> None:
    gram.addmm_(block.T, block)
