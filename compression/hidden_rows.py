"""Rows that selective propagation let go no further: packed behind its layer, and read again when they are recalled."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .codec_slots import Affine
from .codecs import BLOCK_ROWS, PACKED, Reader
from .host_values import HostReader, HostValues
from .interfaces import PageSource
from .placement import hidden_placement
from .propagation_slots import RecallPlan
from .spec import ModelShape, Recipe


def pack_hidden(hidden: Tensor, rows: Tensor, codec: Affine, chunk: int) -> dict[str, Tensor]:
    """Hidden rows as they are sent: what the codec makes of rows of one head, and the ids of their chunks.

    Args:
        hidden: [N, D], all rows of the prompt.
        rows: int64 [n], ascending, whole chunks of them.

    Returns:
        `chunks` int32 [n / chunk] (position // chunk), and the codec's tensors [n, 1, …].
    """
    packing, packed = codec.build(), {}
    # block by block, so that no copy of all rows is made
    blocks = [packing.encode(hidden[block][:, None], {}) for block in torch.split(rows, BLOCK_ROWS)]
    for name in list(blocks[0]):
        packed[name] = torch.cat([block.pop(name) for block in blocks])
    return {"chunks": (rows[::chunk] // chunk).int(), **packed}


class HiddenRows:
    """The rows of one prompt that may be recalled; choices share them. They lie in host memory where there are pages
    for them, else on the device.

    Args:
        tensors: what `pack_hidden` made.
        first: id of the chunk that the sealed rows of the selecting layer begin with.

    Attributes:
        plan: what may be recalled of them.
        codec: how they are packed.
        width: columns of a row.
        host: where they lie in host memory, or None.
    """

    def __init__(
        self,
        recipe: Recipe,
        shape: ModelShape,
        plan: RecallPlan,
        tensors: Mapping[str, Tensor],
        first: int,
        source: PageSource | None,
    ) -> None:
        self.plan, self.codec, self.width = plan, recipe.propagation.hidden_codec, shape.hidden_size
        codec, dim = self.codec.build(), self.width
        packed = {name: tensors[name] for name in PACKED}  # in this order, whatever the sender's: kernels go by it
        self._chunks, self._first, self._held = tensors["chunks"], first, packed
        self.host: HostValues | None = None
        self._reader: Reader = codec.reader(packed, {}, dim, plan.chunk)
        place = None if source is None else hidden_placement(recipe, shape, plan, source.page_nbytes)
        if source is not None and place is not None:
            self.host, self._held = HostValues(packed, plan.chunk, place, source), {}
            self._reader = HostReader(self.host, codec, dim)
        self._ids: list[int] = self._chunks.tolist()

    def __len__(self) -> int:
        """Chunks."""
        return len(self._ids)

    @property
    def device(self) -> torch.device:
        return self._chunks.device

    @property
    def places(self) -> Tensor:
        """int64 [n], which of the selecting layer's sealed chunks each of them is."""
        return self._chunks.long() - self._first

    @property
    def chunk_nbytes(self) -> int:
        """Bytes that reading one chunk touches."""
        return self._reader.chunk_nbytes

    @property
    def chunks(self) -> Tensor:
        """int32 [n], their ids (position // chunk), ascending."""
        return self._chunks

    @property
    def first(self) -> int:
        """Id of the chunk that the sealed rows of the selecting layer begin with."""
        return self._first

    @property
    def packed(self) -> tuple[Tensor, ...] | None:
        """Codes, scales and minima [n * chunk, 1, …]; None where they lie in host memory."""
        return None if self.host is not None else tuple(self._held.values())

    def position(self, number: int) -> int:
        """Of the first row of a chunk."""
        return self._ids[number] * self.plan.chunk

    def number_at(self, position: int) -> int | None:
        """The chunk that begins at a position, or None."""
        number = bisect_left(self._ids, position // self.plan.chunk)
        is_here = number < len(self._ids) and self.position(number) == position
        return number if is_here else None

    def read(self, numbers: Sequence[int]) -> Tensor:
        """float32 [len(numbers) * chunk, D]."""
        chunks = torch.tensor(numbers, dtype=torch.int64, device=self._chunks.device)
        return self._reader.read(torch.zeros_like(chunks), chunks).flatten(0, 1)

    def tensors(self) -> Iterator[Tensor]:
        """Everything that it holds on the device."""
        yield self._chunks
        yield from self._held.values()
        if self.host is not None:
            yield self.host.pages
