"""The chunks that a layer's last choice named, for steps that attend to them again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels.step_attention import Kept


class KeptChoice:
    """What one layer of one choice attends to until the next choice is due.

    Positions fall into blocks of `every`; the first row of a block chooses and the others attend to the same chunks.
    So what a row attends to depends on its sequence and its position alone, not on what ran in one step with it.

    Args:
        num_chosen: chunks that a row chooses.
        every: positions a block.
    """

    def __init__(self, num_kv_heads: int, num_chosen: int, every: int, device: torch.device) -> None:
        self.every = every
        self._chunks = torch.zeros(num_kv_heads, num_chosen, dtype=torch.int32, device=device)
        # how many of them count, and the position of a row that attended to them, -1 = none has
        self._state = torch.full((num_kv_heads, 2), -1, dtype=torch.int32, device=device)

    def settle(self, positions: Tensor, chosen: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """What rows really attend to, and keep what the last of them does.

        Args:
            positions: int64 [Q], ascending.
            chosen: int64 [Q, Hkv, K], chunks that each row would choose; K may be less than is kept.
            valid: bool of that shape, True first; None = all.

        Returns:
            chosen and valid, of these shapes.
        """
        most = chosen.shape[-1]
        counts = torch.full(chosen.shape[:2], most, device=chosen.device) if valid is None else valid.sum(dim=-1)
        blocks = positions // self.every
        first = torch.searchsorted(blocks, blocks)
        last = self._state[0, 1].long()
        is_kept = ((last >= 0) & (last // self.every == blocks))[:, None]
        chosen = torch.where(is_kept[..., None], self._chunks[:, :most].long(), chosen[first])
        counts = torch.where(is_kept, self._state[:, 0].long(), counts[first])
        self._chunks[:, :most] = chosen[-1].int()
        self._state[:, 0], self._state[:, 1] = counts[-1].int(), positions[-1].int()
        return chosen, torch.arange(most, device=chosen.device) < counts[..., None]

    def view(self) -> Kept:
        """As kernels read and change it."""
        return Kept(self._chunks, self._state, self.every)

    def put_back(self, before: KeptChoice) -> None:
        """Be what `copy` gave."""
        self._chunks.copy_(before._chunks)
        self._state.copy_(before._state)

    def copy(self) -> KeptChoice:
        """An independent one with the same chunks."""
        twin = object.__new__(KeptChoice)
        twin.every, twin._chunks, twin._state = self.every, self._chunks.clone(), self._state.clone()
        return twin

    def tensors(self) -> Iterator[Tensor]:
        """Everything it holds."""
        yield from (self._chunks, self._state)
