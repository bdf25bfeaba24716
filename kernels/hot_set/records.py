"""How chunks lie in host memory, and what says which of them the device holds. Free of Triton.

    host    pages of equal size; a page holds whole chunks: records [page chunks, Hkv, record bytes]
              record of one chunk and KV head = [ rows of tensor 0 | rows of tensor 1 | … | fill up to 16 bytes ]
    device  rows [slots * chunk, Hkv, …], tensors as any packed rows: slot s of a KV head holds the rows of one chunk
              slots  int16 [chunks, Hkv]     where a chunk lies, -1 = on the host alone
              held   int32 [Hkv, slots]      the chunk in each slot, -1 = none
              used   int32 [Hkv, slots + 1]  the step that last wanted each slot, -1 = never; at the end the last step

A chunk is read over the bus in one piece, so a record has all that one KV head needs of it. What a query attends to are
the same bits wherever they come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HOT_FIELDS = 10
ALIGNMENT = 16


@dataclass(frozen=True)
class HotKey:
    """What a compiled kernel is made for.

    Attributes:
        chunk: rows a chunk.
        row_nbytes: bytes that one row of one KV head takes in each of one to three tensors; even.
    """

    chunk: int
    row_nbytes: tuple[int, ...]

    @property
    def record_nbytes(self) -> int:
        """Bytes of one chunk of one KV head."""
        return -(-self.chunk * sum(self.row_nbytes) // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Records:
    """The tensors that records are made of.

    Attributes:
        chunk: rows a chunk.
        names: of the tensors, [n, Hkv, …].
        dtypes: of the tensors.
        shapes: of one row of one KV head.
    """

    chunk: int
    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], chunk: int) -> Records:
        """Those of the rows of a layer."""
        names = tuple(tensors)
        return cls(
            chunk,
            names,
            tuple(tensors[name].dtype for name in names),
            tuple(tuple(tensors[name].shape[2:]) for name in names),
        )

    @property
    def key(self) -> HotKey:
        sizes = zip(self.dtypes, self.shapes, strict=True)
        return HotKey(self.chunk, tuple(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in sizes))

    def empty(self, num_rows: int, num_kv_heads: int, device: torch.device) -> dict[str, Tensor]:
        """Tensors for `num_rows` rows, without numbers."""
        parts = zip(self.names, self.dtypes, self.shapes, strict=True)
        return {
            name: torch.empty((num_rows, num_kv_heads, *shape), dtype=dtype, device=device)
            for name, dtype, shape in parts
        }


@dataclass(frozen=True)
class HotView:
    """One layer of one sequence, as kernels read it.

    Attributes:
        key: how records are laid out.
        pages: int64 [pages], addresses, on the device.
        page_chunks: chunks a page.
        slots, held, used: see the module.
        rows: of the device, in the order of a record.
    """

    key: HotKey
    pages: Tensor
    page_chunks: int
    slots: Tensor
    held: Tensor
    used: Tensor
    rows: tuple[Tensor, ...]

    @property
    def num_slots(self) -> int:
        return self.held.shape[1]


def hot_fields(view: HotView) -> list[int]:
    """The row of a table that tells the kernels of one layer of one sequence, HOT_FIELDS numbers."""
    rows = [tensor.data_ptr() for tensor in view.rows]
    own = [
        view.pages.data_ptr(),
        view.page_chunks,
        len(view.slots),
        view.slots.data_ptr(),
        view.held.data_ptr(),
        view.used.data_ptr(),
        view.num_slots,
        *rows,
    ]
    return own + [0] * (HOT_FIELDS - len(own))


def pack_records(tensors: Sequence[Tensor], chunk: int) -> Tensor:
    """Rows [n, Hkv, …], n whole chunks, as records uint8 [n / chunk, Hkv, record bytes]."""
    num_rows, num_kv_heads = tensors[0].shape[:2]
    parts = []
    for tensor in tensors:
        raw = tensor.contiguous().view(torch.uint8).reshape(num_rows // chunk, chunk, num_kv_heads, -1)
        parts.append(raw.transpose(1, 2).flatten(2))
    width = sum(part.shape[-1] for part in parts)
    if fill := -width % ALIGNMENT:
        parts.append(parts[0].new_zeros(*parts[0].shape[:2], fill))
    return torch.cat(parts, dim=-1)


def gather_records(records: Tensor, layout: Records) -> dict[str, Tensor]:
    """Records uint8 [M, record bytes] of one KV head each as tensors [M * chunk, 1, …]."""
    out, begin = {}, 0
    for name, dtype, shape, nbytes in zip(
        layout.names, layout.dtypes, layout.shapes, layout.key.row_nbytes, strict=True
    ):
        raw = records[:, begin : begin + layout.chunk * nbytes].contiguous()
        out[name] = raw.view(dtype).reshape(len(records) * layout.chunk, 1, *shape)
        begin += layout.chunk * nbytes
    return out
