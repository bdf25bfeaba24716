"""Bringing the chosen chunks of many sequences to the device, those that are not there yet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dispatch import require
from .records import HOT_FIELDS, HotKey


@dataclass(frozen=True)
class HotBuffers:
    """What one call works in, and how many chunks were wanted and fetched.

    Attributes:
        moves: int32 [rows, Hkv, 2, K], chunks to fetch and the slots that take them.
        num_moves: int32 [rows, Hkv].
    """

    moves: Tensor
    num_moves: Tensor

    @classmethod
    def like(cls, chosen: Tensor) -> HotBuffers:
        """For chosen chunks [rows, Hkv, K]."""
        num_rows, num_kv_heads, most = chosen.shape
        return cls(
            torch.empty(num_rows, num_kv_heads, 2, most, dtype=torch.int32, device=chosen.device),
            torch.empty(num_rows, num_kv_heads, dtype=torch.int32, device=chosen.device),
        )


def fetch_chosen(
    key: HotKey, table: Tensor, chosen: Tensor, counts: Tensor, places: Tensor, totals: Tensor | None, most_slots: int
) -> None:
    """Make sure that the device holds what is attended to. Waits for nothing, so a step can be captured.

    The chunks that a step wants are read from host memory unless they are here; they take the slots that have not been
    wanted for longest (up to 254 steps; beyond that slots count as equally old). A slot that the step itself wants is
    never taken, which needs as many slots as chunks are ever chosen.

    Args:
        key: how the records of these rows are laid out.
        table: int64 [rows, HOT_FIELDS] of `hot_fields`; zeros for rows that have nothing on the host.
        chosen: int32 [rows, Hkv, K], distinct chunks; those beyond the table's own are left alone, as another segment
            holds them.
        counts: int32 [rows, Hkv], how many of them count.
        places: int32 [rows, Hkv, K], out: the slot of each chunk; other entries stay.
        totals: int64 [2], grows by the chunks that were wanted and by those that were fetched; or None.
        most_slots: of any row.
    """
    require(table.shape == (len(chosen), HOT_FIELDS), f"table is {tuple(table.shape)}, not [rows, {HOT_FIELDS}]")
    require(places.shape == chosen.shape, f"places are {tuple(places.shape)}, chosen are {tuple(chosen.shape)}")
    from .triton import fetch

    fetch(key, table, chosen, counts, places, totals, most_slots, HotBuffers.like(chosen))
