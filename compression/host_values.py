"""Values in pages of host memory, and the hot set of them on the device; see `placement` for what lies where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..kernels.hot_set import HotView, Records, gather_records, pack_records
from ..kernels.step_attention import Packed
from .codecs import Codec, Reader
from .interfaces import HeldPages, PageSource
from .placement import Placement


class HostValues:
    """The values of a layer's sealed prompt rows, on the host. Choices share them.

    Args:
        values: packed rows [n, Hkv, …], of which nothing stays on the device.
        chunk: rows a chunk.

    Attributes:
        records: what a chunk of a KV head is made of.
        pages: int64 [pages], their addresses, on the device.
    """

    def __init__(self, values: Mapping[str, Tensor], chunk: int, place: Placement, source: PageSource) -> None:
        self.records = Records.of(values, chunk)
        self.place = place
        packed = pack_records(tuple(values.values()), chunk)
        self.device, self.num_kv_heads = packed.device, packed.shape[1]
        self._held: HeldPages | None = source.take(place.num_pages)
        self._is_elsewhere = False  # than `pages` says
        for number, view in enumerate(self.views):
            part = packed[number * place.page_chunks : (number + 1) * place.page_chunks].flatten()
            view[: len(part)].copy_(part, non_blocking=True)
        self.pages = torch.tensor([view.data_ptr() for view in self.views], device=self.device)
        self._written: torch.cuda.Event | None = None
        if packed.is_cuda:
            self._written = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._written.record(torch.cuda.current_stream(self.device))

    @property
    def views(self) -> tuple[Tensor, ...]:
        """See `OffloadedValues`."""
        return () if self._held is None else self._held.views

    @property
    def num_pages(self) -> int:
        """See `OffloadedValues`."""
        return self.place.num_pages

    @property
    def host_nbytes(self) -> int:
        """Bytes of the pages."""
        return sum(view.nbytes for view in self.views)

    def leave(self) -> None:
        """See `OffloadedValues`."""
        self._held = None

    def enter(self, held: HeldPages) -> None:
        """See `OffloadedValues`."""
        self._held, self._is_elsewhere = held, True

    def relocated(self) -> None:
        """`pages` is on the device again, and says where the values were before they left."""
        if self._is_elsewhere:
            self.pages.copy_(torch.tensor([view.data_ptr() for view in self.views], device=self.device))
            self._is_elsewhere = False

    def gather(self, heads: Tensor, chunks: Tensor) -> dict[str, Tensor]:
        """heads, chunks int64 [M] -> packed rows [M * chunk, 1, …] on the device. Waits for it."""
        if self._written is not None:
            self._written.synchronize()
        at, head, nbytes = chunks.cpu(), heads.cpu(), self.records.key.record_nbytes
        found = torch.empty(len(at), nbytes, dtype=torch.uint8)
        pages = at // self.place.page_chunks
        for page in sorted(set(pages.tolist())):
            here = pages == page
            shape = (self.place.page_chunks, self.num_kv_heads, nbytes)
            records = self.views[page][: shape[0] * shape[1] * shape[2]].view(shape)
            found[here] = records[at[here] % self.place.page_chunks, head[here]]
        return gather_records(found.to(self.device), self.records)


class HostReader:
    """Reads chunks of values from host memory, for attention one by one."""

    basis_nbytes = 0

    def __init__(self, values: HostValues, codec: Codec, head_dim: int) -> None:
        self._values, self._codec, self._head_dim = values, codec, head_dim
        self.chunk_nbytes = values.records.chunk * sum(values.records.key.row_nbytes)

    def _reader(self, heads: Tensor, chunks: Tensor) -> Reader:
        tensors = self._values.gather(heads, chunks)
        return self._codec.reader(tensors, {}, self._head_dim, self._values.records.chunk)

    def read(self, heads: Tensor, chunks: Tensor) -> Tensor:
        """See `Reader`."""
        return self._reader(heads, chunks).read(torch.zeros_like(heads), torch.arange(len(heads), device=heads.device))

    def read_all(self) -> Tensor:
        """See `Reader`."""
        heads, chunks = self._values.num_kv_heads, self._values.place.num_chunks
        every = torch.arange(heads * chunks, device=self._values.device)
        rows = self._reader(every % heads, every // heads).read_all()
        return rows.view(chunks, heads, -1, self._head_dim).transpose(1, 2).flatten(0, 1)

    def packed(self) -> Packed:
        """Kernels read the hot set instead."""
        raise NotImplementedError("values in host memory are read through a hot set")


class HotChunks:
    """The hot set of one choice in one layer.

    Attributes:
        packed: the rows of the slots, as kernels read them.
    """

    def __init__(self, values: HostValues, codec: Codec, head_dim: int) -> None:
        place, heads, device = values.place, values.num_kv_heads, values.device
        self._values, self._codec, self._head_dim = values, codec, head_dim
        self._rows = values.records.empty(place.num_slots * values.records.chunk, heads, device)
        self._slots = torch.full((place.num_chunks, heads), -1, dtype=torch.int16, device=device)
        self._held = torch.full((heads, place.num_slots), -1, dtype=torch.int32, device=device)
        self._used = torch.full((heads, place.num_slots + 1), -1, dtype=torch.int32, device=device)
        self._used[:, -1] = 0
        self.packed = codec.reader(self._rows, {}, head_dim, values.records.chunk).packed()

    def view(self) -> HotView:
        """As kernels read and change it."""
        return HotView(
            self._values.records.key,
            self._values.pages,
            self._values.place.page_chunks,
            self._slots,
            self._held,
            self._used,
            tuple(self._rows.values()),
        )

    def cold(self) -> HotChunks:
        """A hot set over the same values that holds nothing yet."""
        return HotChunks(self._values, self._codec, self._head_dim)

    def tensors(self) -> Iterator[Tensor]:
        """Everything it holds."""
        yield from self._rows.values()
        yield from (self._slots, self._held, self._used)
