"""Storage of one layer of one sequence on a decode worker: a sealed segment and the exact tail."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.dispatch import block_rows
from ..kernels.sparse_reconstruct import ChunkSegment
from .codecs import Codec, Reader
from .interfaces import PageSource, Rope
from .retrieval import Retrieval
from .spec import ModelShape, Recipe

TAIL_ROWS = 64  # a tail's capacity is a multiple of this
_SUMMARY_ROWS = 1024  # rows decoded at once when landmarks are built


@dataclass(frozen=True)
class Kit:
    """What all layers of one sequence share: the recipe at work and the sequence's rotation.

    Attributes:
        host: where values may lie instead of on the device.
    """

    recipe: Recipe
    shape: ModelShape
    rope: Rope
    num_prompt_tokens: int
    retrieval: Retrieval | None
    host: PageSource | None = None


@dataclass(frozen=True)
class Packing:
    """How rows of one layer are packed.

    Attributes:
        rope: what decoded keys still need.
    """

    key_codec: Codec
    value_codec: Codec
    key_basis: Mapping[str, Tensor]
    value_basis: Mapping[str, Tensor]
    rope: Rope | None

    def tensors(self) -> Iterator[Tensor]:
        """What all rows share."""
        yield from self.key_basis.values()
        yield from self.value_basis.values()


class Segment:
    """Sealed rows that are packed together, as they arrived or were sealed here.

    Positions: `index` None = consecutive from `begin`; int32 [chunks] = ids of chunks (position // chunk), the same
    for all heads; int32 [n, Hkv] = positions of each KV head's rows.
    """

    def __init__(
        self,
        kit: Kit,
        packing: Packing,
        keys: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        num_rows: int,
        begin: int,
        index: Tensor | None = None,
    ) -> None:
        self._kit = kit
        self._packing = packing
        self._chunk = kit.recipe.retrieval.chunk
        self.keys, self.values = dict(keys), dict(values)
        self.num_rows, self.begin, self.index = num_rows, begin, index
        self._make_readers()
        self.summary: dict[str, Tensor] = {} if kit.retrieval is None else self._summarize(kit.retrieval)

    def _make_readers(self) -> None:
        dim, packing = self._kit.shape.head_dim, self._packing
        self.key_reader: Reader = packing.key_codec.reader(self.keys, packing.key_basis, dim, self._chunk)
        self.value_reader: Reader = packing.value_codec.reader(self.values, packing.value_basis, dim, self._chunk)

    @property
    def basis_nbytes(self) -> int:
        """Bytes of what all chunks share."""
        return self.key_reader.basis_nbytes + self.value_reader.basis_nbytes

    @property
    def num_chunks(self) -> int:
        return self.num_rows // self._chunk

    @property
    def rotates(self) -> bool:
        """Whether decoded keys still need their rotation."""
        return self._packing.rope is not None

    @property
    def device(self) -> torch.device:
        return next(iter(self.keys.values())).device

    def chunk_positions(self, chunks: Tensor) -> Tensor:
        """Position of the first row of each chunk, int64, shaped like `chunks`."""
        if self.index is None:
            return chunks * self._chunk + self.begin
        return self.index[chunks].long() * self._chunk

    def row_positions(self) -> Tensor:
        """int64 [n], or [Hkv, n] where heads differ."""
        if self.index is not None and self.index.dim() == 2:
            return self.index.T.long()
        first = self.chunk_positions(torch.arange(self.num_chunks, device=self.device))
        return (first[:, None] + torch.arange(self._chunk, device=self.device)).flatten()

    def rotated_keys(self) -> Tensor:
        """[n, Hkv, d], all keys decoded and rotated."""
        keys, rope = self.key_reader.read_all(), self._packing.rope
        return keys if rope is None else rope(keys, self.row_positions())

    def chunked(self) -> ChunkSegment:
        """The segment as sparse attention reads it."""
        return ChunkSegment(
            self.key_reader, self.value_reader, self.num_chunks, self.chunk_positions, self._packing.rope
        )

    def move_values(self, reader: Reader) -> None:
        """Let go of the values, which `reader` reads from elsewhere."""
        self.values, self.value_reader = {}, reader

    def extend(self, other: Segment) -> None:
        """Take over the rows of a segment that follows this one."""
        self.keys = {name: torch.cat((t, other.keys[name])) for name, t in self.keys.items()}
        self.values = {name: torch.cat((t, other.values[name])) for name, t in self.values.items()}
        self.summary = {name: torch.cat((t, other.summary[name])) for name, t in self.summary.items()}
        self.num_rows += other.num_rows
        self._make_readers()

    def copy(self) -> Segment:
        """An independent segment with the same rows; the basis stays shared."""
        twin = object.__new__(Segment)
        twin.__dict__.update(self.__dict__)
        for name in ("keys", "values", "summary"):
            setattr(twin, name, {key: t.clone() for key, t in getattr(self, name).items()})
        twin._make_readers()
        return twin

    def tensors(self) -> Iterator[Tensor]:
        """Everything it holds but the basis."""
        yield from self.keys.values()
        yield from self.values.values()
        yield from self.summary.values()
        if self.index is not None:
            yield self.index

    def _summarize(self, retrieval: Retrieval) -> dict[str, Tensor]:
        """Landmarks from decoded keys, so that whoever holds the packed rows finds the same bits."""
        heads = torch.arange(self._kit.shape.num_kv_heads, device=self.device)
        step = max(1, block_rows(self.device, _SUMMARY_ROWS) // self._chunk)
        pieces = []
        for begin in range(0, self.num_chunks, step):
            chunks = torch.arange(begin, min(begin + step, self.num_chunks), device=self.device)
            keys = self.key_reader.read(heads.repeat(len(chunks)), chunks.repeat_interleave(len(heads)))
            keys = keys.view(len(chunks), len(heads), *keys.shape[1:]).transpose(1, 2).flatten(0, 1)
            if self._packing.rope is not None:
                positions = self.chunk_positions(chunks)[:, None] + torch.arange(self._chunk, device=self.device)
                keys = self._packing.rope(keys, positions.flatten())
            pieces.append(retrieval.summarize(keys))
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


class Tail:
    """Exact rows at the end of a sequence: [cap, Hkv, d] keys and values, the first `num_rows` of them in use.

    Args:
        k, v: rows of the prompt, if it left any.
        dtype: what rows are kept in, None = what they come in.
    """

    def __init__(self, begin: int, k: Tensor | None, v: Tensor | None, dtype: torch.dtype | None) -> None:
        self.begin = begin
        self._dtype = dtype
        self.num_rows = 0
        self._k: Tensor | None = None
        self._v: Tensor | None = None
        if k is not None and v is not None:
            self.append(k, v)

    @property
    def end(self) -> int:
        """Position of the next row."""
        return self.begin + self.num_rows

    @property
    def row_nbytes(self) -> int:
        """Bytes of one position, keys and values."""
        return 0 if self._k is None else 2 * self._k[0].nbytes

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add rows [q, Hkv, d], cast to what the tail holds."""
        end = self.num_rows + len(k)
        self._k, self._v = self._room(self._k, k, end), self._room(self._v, v, end)
        self._k[self.num_rows : end] = k
        self._v[self.num_rows : end] = v
        self.num_rows = end

    def rows(self) -> tuple[Tensor, Tensor]:
        """Views of keys and values [num_rows, Hkv, d]."""
        assert self._k is not None and self._v is not None
        return self._k[: self.num_rows], self._v[: self.num_rows]

    def room(self) -> tuple[Tensor, Tensor]:
        """Keys and values [cap, Hkv, d], rows that are not in use yet included."""
        assert self._k is not None and self._v is not None
        return self._k, self._v

    def reserve(self, num_more: int, like: Tensor) -> bool:
        """Make room for `num_more` rows [_, Hkv, d] of the kind of `like`. Returns whether rows have moved."""
        held, end = self._k, self.num_rows + num_more
        self._k, self._v = self._room(self._k, like, end), self._room(self._v, like, end)
        return self._k is not held

    def drop_first(self, count: int) -> None:
        """Forget the oldest rows; the capacity stays."""
        k, v = self.rows()
        left = self.num_rows - count
        k[:left], v[:left] = k[count:].clone(), v[count:].clone()
        self.begin += count
        self.num_rows = left

    def copy(self) -> Tail:
        """An independent tail with the same rows."""
        twin = Tail(self.begin, None, None, self._dtype)
        twin.num_rows = self.num_rows
        twin._k = None if self._k is None else self._k.clone()
        twin._v = None if self._v is None else self._v.clone()
        return twin

    def tensors(self) -> Iterator[Tensor]:
        """Everything it holds, spare capacity included."""
        if self._k is not None and self._v is not None:
            yield self._k
            yield self._v

    def _room(self, held: Tensor | None, rows: Tensor, num_rows: int) -> Tensor:
        if held is not None and num_rows <= len(held):
            return held
        capacity = -(-num_rows // TAIL_ROWS) * TAIL_ROWS
        grown = torch.zeros(capacity, *rows.shape[1:], dtype=self._dtype or rows.dtype, device=rows.device)
        if held is not None:
            grown[: self.num_rows] = held[: self.num_rows]
        return grown
