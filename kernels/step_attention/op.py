"""Attention of one decode step over many sequences at once, whatever packs their rows.

Sequences keep their tensors; tables of addresses tell the kernels where they lie, so that one launch serves a whole
batch and a captured step stays valid while the tables change. The torch reference is what a sequence's cache computes
by itself (`compression.layer_cache`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from ..dispatch import require
from .packed import Packed, Region, View
from .tables import Tables

if TYPE_CHECKING:
    from .triton import Attended


class Selection(Protocol):
    """Says which chunks a step attends to, in place of those that scored best."""

    def choose(self, layer: int, table: Tensor, chosen: Tensor, counts: Tensor) -> None:
        """Write over what was chosen. Waits for nothing and brings nothing from the host, so that a step with it can be
        captured once it has run.

        Args:
            table: of the layer's choices, int64 [rows, CHOICE_FIELDS]; zeros for rows that it is not asked for.
            chosen: int32 [rows, Hkv, K], distinct chunks of each row.
            counts: int32 [rows, Hkv], how many of them count; that many are written.
        """
        ...


def serves(views: Sequence[View], head_dim: int, fixed_rope: bool = True) -> bool:
    """Whether the kernels can read all layers of a sequence.

    Args:
        fixed_rope: whether RoPE's angles are the same for all lengths of prompts.
    """
    regions = [region for view in views for region in (*view.regions, *(view.chunks.segments if view.chunks else ()))]
    rotates = any(region.rotates for region in regions)
    if head_dim % 16 != 0 or (rotates and not fixed_rope):
        return False
    if not all(_packed_alike(view.chunks.segments) for view in views if view.chunks):
        return False
    landmarks = [rows for view in views if view.chunks for rows in view.chunks.landmarks]
    return all(_lies_well(packed, head_dim) for region in regions for packed in (region.keys, region.values)) and all(
        rows.is_contiguous() and rows.data_ptr() % math.gcd(16, head_dim * rows.itemsize) == 0 for rows in landmarks
    )


def _packed_alike(segments: Sequence[Region]) -> bool:
    """Whether one kernel reads all segments; rows in the model's own dtype are sealed in that of the tail."""
    return len({(segment.keys.layout, segment.values.layout) for segment in segments}) == 1


def _lies_well(packed: Packed, head_dim: int) -> bool:
    """Whether rows lie where kernels, which get an address alone, look for them."""
    layout, rows = packed.layout, packed.tensors[0]
    if layout.kind == "lowrank" and layout.bits != 16 and layout.rank % 2 != 0:
        return False
    tensors = packed.tensors if packed.basis is None else (*packed.tensors, packed.basis)
    by_channel = 16 if layout.kind == "channel" else 1  # scales are read a row of channels at once
    if rows.data_ptr() % layout.alignment(head_dim) or any(one.data_ptr() % by_channel for one in packed.tensors[1:]):
        return False
    if layout.kind == "lowrank" and (packed.basis is None or packed.basis.data_ptr() % 16):
        return False
    return all(one.is_contiguous() for one in tensors)


class Joined(NamedTuple):
    """Rows that came back in a step, of sequences of one key; those that did not are at position -1.

    Attributes:
        tables: of one of them after the other.
        places: int64 [n], where each goes in the region of what is here.
        first: of them among the step's rows.
    """

    tables: Tables
    places: Tensor
    first: int

    @property
    def rows(self) -> slice:
        """Their places among the step's rows."""
        return slice(self.first, self.first + len(self.places))


class StepAttention:
    """One step's attention in every layer. Rows may come back behind one of them (`recall`): from there on they follow
    the rows of the step, in the order in which they came.

    Args:
        tables: of the step, on its device.
        num_kv_heads: KV heads of the model.
        frequencies: float32 [d / 2], angles of RoPE by which keys are rotated that are packed before it.
        rope_factor: by which cos and sin are multiplied.
        hot_counts: int64 [2], grows by the chunks that were wanted from host memory, and by those of them that were
            not on the device; None = nobody asks.
        selection: None = what scores best.
        brought: int64 [rows], out: rows that ever came back to the sequences of these rows, of those that recall.
    """

    def __init__(
        self,
        tables: Tables,
        num_kv_heads: int,
        frequencies: Tensor,
        rope_factor: float,
        hot_counts: Tensor | None = None,
        selection: Selection | None = None,
        brought: Tensor | None = None,
    ) -> None:
        self.tables = tables
        self._num_kv_heads = num_kv_heads
        self._frequencies = frequencies
        self._rope_factor = rope_factor
        self._hot_counts = hot_counts
        self._selection = selection
        self._brought = brought
        self._joined: list[Joined] = []
        self._attended: Attended | None = None

    def append(self, layer: int, k_pre: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Write each row's keys and values [rows, Hkv, d] (k_pre before RoPE) into its sequence's tail.

        Args:
            positions: int64 [rows]; a tail must have room there.
        """
        from .triton import append_rows

        for tables, rows, places in self._parts(positions):
            append_rows(tables, layer, k_pre[rows], k[rows], v[rows], places)

    def attend(self, layer: int, q: Tensor, positions: Tensor, window: int | None) -> Tensor:
        """q [rows, H, d], post-RoPE -> [rows, H, d] in q's dtype, over all that each row's sequence holds at positions
        up to its own. A row's numbers do not depend on the other rows.

        Raises:
            ValueError: another number of rows.
        """
        from .triton import EVERYWHERE, attend

        num_rows = self.tables.num_rows + sum(len(joined.places) for joined in self._joined)
        require(len(q) == num_rows, f"{len(q)} rows, the tables are for {num_rows}")
        own, heads = slice(0, self.tables.num_rows), self._num_kv_heads
        rope = (self._frequencies, self._rope_factor)
        self._attended = attend(
            self.tables, layer, q[own], heads, positions[own], *rope, window, self._hot_counts, self._selection
        )
        outs = [self._attended.out]
        for joined in self._joined:
            # of what was there before them they see what is at positions up to their own
            width = EVERYWHERE if window is None else window
            rows = joined.rows
            outs.append(attend(joined.tables, layer, q[rows], heads, positions[rows], *rope, width).out)
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def recall(self, layer: int, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rows that go on behind this layer, which has just been attended to, behind those of the step; None = no
        sequence recalls there. There are as many whatever is wanted: those that are not are at position -1.

        Args:
            like: of the dtype of hidden rows.
            positions: int64 [rows], of all that there are so far.

        Returns:
            Hidden rows [R, D], their positions int64 [R], and the rows of the step that they came for, int64 [R].
        """
        from .triton import bring

        found = []
        for key, recalled in self.tables.recalls.items():
            if key.layer == layer:
                assert self._attended is not None and self._brought is not None, "asked for behind attention"
                rows, places, of = bring(
                    key, recalled, self.tables, self._attended, positions, self._brought, self._num_kv_heads, like
                )
                first = self.tables.num_rows + sum(len(joined.places) for joined in self._joined)
                self._joined.append(Joined(recalled.tables.repeated(key.num_rows), places[1], first))
                found.append((rows, places[0], of))
        if not found:
            return None
        rows, at, of = (torch.cat(parts) for parts in zip(*found, strict=True))
        return rows, at, of

    def _parts(self, positions: Tensor) -> Iterator[tuple[Tables, slice, Tensor]]:
        """Of the step's own rows and those that came back: tables, which rows they are, and where each goes."""
        own = slice(0, self.tables.num_rows)
        yield self.tables, own, positions[own]
        for joined in self._joined:
            yield joined.tables, joined.rows, joined.places
