"""Storage of one layer of one sequence on a decode worker: a sealed segment and the exact tail."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.dispatch import block_rows
from ..kernels.sparse_reconstruct import ChunkSegment
from .codecs import Codec, Reader
from .interfaces import PageSource, Rope, Summed
from .layout import TAIL_ROWS
from .retrieval import Retrieval
from .spec import ModelShape, Recipe

_SUMMARY_ROWS = 1024  # rows decoded at once when landmarks are built


@dataclass(frozen=True)
class Kit:
    """What all layers of one sequence share: the recipe at work and the sequence's rotation.

    Attributes:
        host: where values may lie instead of on the device.
        summed: adds up, in place, what each of the model's ranks has of its heads; None = all heads are here.
    """

    recipe: Recipe
    shape: ModelShape
    rope: Rope
    num_prompt_tokens: int
    retrieval: Retrieval | None
    host: PageSource | None = None
    summed: Summed | None = None


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


Tensors = dict[str, Tensor]


class Segment:
    """Sealed rows that are packed together, as they arrived or were sealed here.

    Positions: `index` None = consecutive from `begin`; int32 [chunks] = ids of chunks (position // chunk), the same
    for all heads; int32 [n, Hkv] = positions of each KV head's rows.

    Args:
        summary: landmarks, if they are there already.
        room: rows that the tensors have room for, None = they hold `num_rows`.
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
        summary: Mapping[str, Tensor] | None = None,
        room: int | None = None,
    ) -> None:
        self._kit = kit
        self._packing = packing
        self._chunk = kit.recipe.retrieval.chunk
        self._held: tuple[Tensors, Tensors, Tensors] = (dict(keys), dict(values), dict(summary or {}))
        self._room = num_rows if room is None else room
        self.num_rows, self.begin, self.index = num_rows, begin, index
        self._moved_values: Reader | None = None
        self._shown = -1
        if summary is None and kit.retrieval is not None:
            self._held[2].update(self._summarize(kit.retrieval))
            self._shown = -1

    def _show(self) -> None:
        """Make the views of the rows that are in use, and their readers."""
        if self._shown == self.num_rows:
            return
        self._shown = self.num_rows
        # groups of rows and chunks are as many in proportion; what has no room is shown as it is
        count, room = self.num_rows, self._room
        views = [{name: t if count == room else t[: len(t) * count // room] for name, t in held.items()}
                 for held in self._held]  # fmt: skip
        dim, packing = self._kit.shape.head_dim, self._packing
        self._views = (views[0], views[1], views[2])
        self._key_reader: Reader = packing.key_codec.reader(views[0], packing.key_basis, dim, self._chunk)
        self._value_reader = self._moved_values
        if self._value_reader is None:
            self._value_reader = packing.value_codec.reader(views[1], packing.value_basis, dim, self._chunk)

    @property
    def keys(self) -> Mapping[str, Tensor]:
        """Packed keys of the rows."""
        self._show()
        return self._views[0]

    @property
    def values(self) -> Mapping[str, Tensor]:
        """Packed values of the rows; empty where they lie elsewhere."""
        self._show()
        return self._views[1]

    @property
    def summary(self) -> Mapping[str, Tensor]:
        """Landmarks of the rows."""
        self._show()
        return self._views[2]

    @property
    def key_reader(self) -> Reader:
        self._show()
        return self._key_reader

    @property
    def value_reader(self) -> Reader:
        self._show()
        assert self._value_reader is not None
        return self._value_reader

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
        self._held[1].clear()
        self._moved_values, self._shown = reader, -1

    def extend(self, other: Segment) -> None:
        """Take over the rows of a segment that follows this one; only one without room moves its own for that."""
        mine, theirs = (self.keys, self.values, self.summary), (other.keys, other.values, other.summary)
        self._held = tuple(
            {name: torch.cat((t, new[name])) for name, t in own.items()} for own, new in zip(mine, theirs, strict=True)
        )  # type: ignore[assignment]
        self.num_rows += other.num_rows
        self._room, self._shown = self.num_rows, -1

    def copy(self) -> Segment:
        """An independent segment with the same rows and no room for more; the basis stays shared."""
        views = [{name: t.clone() for name, t in held.items()} for held in (self.keys, self.values, self.summary)]
        return Segment(self._kit, self._packing, views[0], views[1], self.num_rows, self.begin, self.index, views[2])

    def take(self, other: Segment) -> None:
        """Copy the rows of a segment that begins where this one does into the room that is here."""
        self.num_rows, self._shown = other.num_rows, -1
        for mine, theirs in zip(
            (self.keys, self.values, self.summary), (other.keys, other.values, other.summary), strict=True
        ):
            for name, tensor in theirs.items():
                mine[name].copy_(tensor)

    def tensors(self) -> Iterator[Tensor]:
        """Everything it holds but the basis."""
        for views in (self.keys, self.values, self.summary):
            yield from views.values()
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
    """Exact rows at the end of a sequence: keys and values [cap, Hkv, d], of which `num_rows` are in use.

    They are the first ones but for a while after some were dropped: the others move when there is a need to.

    Args:
        k, v: rows of the prompt, if it left any.
        dtype: what rows are kept in, None = what they come in.
    """

    def __init__(self, begin: int, k: Tensor | None, v: Tensor | None, dtype: torch.dtype | None) -> None:
        self.begin = begin
        self._dtype = dtype
        self.num_rows = 0
        self.offset = 0  # of the first row in use
        self._k: Tensor | None = None
        self._v: Tensor | None = None
        if k is not None and v is not None:
            self.append(k, v)

    @property
    def end(self) -> int:
        """Position of the next row."""
        return self.begin + self.num_rows

    @property
    def device(self) -> torch.device:
        assert self._k is not None
        return self._k.device

    @property
    def dtype(self) -> torch.dtype | None:
        """Of its rows; None where there was none yet."""
        return None if self._k is None else self._k.dtype

    @property
    def row_nbytes(self) -> int:
        """Bytes of one position, keys and values."""
        return 0 if self._k is None else 2 * self._k[0].nbytes

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add rows [q, Hkv, d], cast to what the tail holds."""
        self._make_room(len(k), k)
        assert self._k is not None and self._v is not None
        begin = self.offset + self.num_rows
        self._k[begin : begin + len(k)] = k
        self._v[begin : begin + len(k)] = v
        self.num_rows += len(k)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Views of keys and values [num_rows, Hkv, d]."""
        assert self._k is not None and self._v is not None
        used = slice(self.offset, self.offset + self.num_rows)
        return self._k[used], self._v[used]

    def room(self) -> tuple[Tensor, Tensor]:
        """Keys and values [cap, Hkv, d], rows that are not in use yet included; the rows are the first ones then."""
        self.settle()
        assert self._k is not None and self._v is not None
        return self._k, self._v

    def reserve(self, num_more: int, like: Tensor) -> bool:
        """Make room for `num_more` rows [_, Hkv, d] of the kind of `like` behind the rows, which are the first ones
        then. Returns whether the tensors are others."""
        held = self._k
        self.settle()
        self._make_room(num_more, like)
        return self._k is not held

    def room_addresses(self) -> tuple[int, int]:
        """Where keys and values begin, as `room` shows them once the rows are the first ones."""
        assert self._k is not None and self._v is not None
        return self._k.data_ptr(), self._v.data_ptr()

    def addresses(self) -> tuple[int, int]:
        """Where the keys and values of the first row in use lie."""
        skipped = self.offset * self.row_nbytes // 2 if self.offset else 0
        k, v = self.room_addresses()
        return k + skipped, v + skipped

    def has_room(self, num_more: int) -> bool:
        """Whether `reserve` would have nothing to do."""
        return self._k is not None and self.offset == 0 and self.num_rows + num_more <= len(self._k)

    def drop_first(self, count: int) -> None:
        """Forget the oldest rows; the capacity stays, and nothing moves."""
        self.begin += count
        self.num_rows -= count
        self.offset += count

    def withdraw(self, position: int) -> None:
        """Forget the rows from `position` on."""
        self.num_rows = min(self.num_rows, position - self.begin)

    def settle(self) -> None:
        """Move the rows to the front."""
        if self.offset:
            # both before either is moved: memory may run out
            copies = [rows.clone() if self.num_rows > self.offset else rows for rows in self.rows()]
            for held, rows in zip((self._k, self._v), copies, strict=True):
                assert held is not None
                held[: self.num_rows] = rows
            self.offset = 0

    def copy(self) -> Tail:
        """An independent tail with the same rows."""
        twin = Tail(self.begin, None, None, self._dtype)
        twin.num_rows, twin.offset = self.num_rows, self.offset
        twin._k = None if self._k is None else self._k.clone()
        twin._v = None if self._v is None else self._v.clone()
        return twin

    def tensors(self) -> Iterator[Tensor]:
        """Everything it holds, spare capacity included."""
        if self._k is not None and self._v is not None:
            yield self._k
            yield self._v

    def _make_room(self, num_more: int, like: Tensor) -> None:
        num_rows = self.num_rows + num_more
        if self._k is not None and self.offset + num_rows > len(self._k):
            self.settle()
        self._k, self._v = self._room(self._k, like, num_rows), self._room(self._v, like, num_rows)

    def _room(self, held: Tensor | None, rows: Tensor, num_rows: int) -> Tensor:
        if held is not None and num_rows <= len(held):
            return held
        capacity = -(-num_rows // TAIL_ROWS) * TAIL_ROWS
        grown = torch.zeros(capacity, *rows.shape[1:], dtype=self._dtype or rows.dtype, device=rows.device)
        if held is not None:
            grown[: self.num_rows] = held[: self.num_rows]
        return grown


def storage_nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
