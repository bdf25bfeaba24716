"""Attention of one decode step over many sequences at once, whatever packs their rows.

Sequences keep their tensors; tables of addresses tell the kernels where they lie, so that one launch serves a whole
batch and a captured step stays valid while the tables change. The torch reference is what a sequence's cache computes
by itself (`compression.layer_cache`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import require
from .packed import Layout, View
from .tables import Block, Tables, step_tables


def serves(views: Sequence[View], head_dim: int) -> bool:
    """Whether the kernels can read all layers of a sequence."""
    layouts = [
        packed.layout
        for view in views
        for region in (*view.regions, *(view.chunks.segments if view.chunks else ()))
        for packed in (region.keys, region.values)
    ]
    return head_dim % 16 == 0 and all(map(_is_aligned, layouts))


def _is_aligned(layout: Layout) -> bool:
    return layout.kind != "lowrank" or layout.bits == 16 or layout.rank % 2 == 0


class StepAttention:
    """One step's attention in every layer.

    Args:
        blocks: of the sequence that each row of the step belongs to; rows of one sequence share a block.
        num_kv_heads: KV heads of the model.
        frequencies: float32 [d / 2], angles of RoPE by which keys are rotated that are packed before it.
        rope_factor: by which cos and sin are multiplied.
        device: where the step runs.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        num_kv_heads: int,
        frequencies: Tensor,
        rope_factor: float,
        device: torch.device,
    ) -> None:
        require(len(blocks) > 0, "a step has rows")
        self.num_rows = len(blocks)
        self.tables: Tables = step_tables(blocks).to(device)
        self._num_kv_heads = num_kv_heads
        self._frequencies = frequencies
        self._rope_factor = rope_factor

    def append(self, layer: int, k_pre: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Write each row's keys and values [rows, Hkv, d] (k_pre before RoPE) into its sequence's tail.

        Args:
            positions: int64 [rows]; a tail must have room there.
        """
        from .triton import append_rows

        append_rows(self.tables, layer, k_pre, k, v, positions)

    def attend(self, layer: int, q: Tensor, positions: Tensor, window: int | None) -> Tensor:
        """q [rows, H, d], post-RoPE -> [rows, H, d] in q's dtype, over all that each row's sequence holds at positions
        up to its own. A row's numbers do not depend on the other rows.

        Raises:
            ValueError: another number of rows.
        """
        from .triton import attend

        require(len(q) == self.num_rows, f"{len(q)} rows, the tables are for {self.num_rows}")
        return attend(
            self.tables, layer, q, self._num_kv_heads, positions, self._frequencies, self._rope_factor, window
        )
