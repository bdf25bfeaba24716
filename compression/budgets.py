"""Budgets: which rows each KV head keeps, given their scores."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Budget(Protocol):
    """Chooses among the rows of a layer between its exact ends, which are kept anyway."""

    def keep(self, scores: Tensor, num_kept: int, num_tail: int) -> Tensor:
        """scores float32 [Hkv, m] -> ascending int64 [Hkv, num_kept], or [num_kept] when all heads keep the same.
        `num_tail` rows follow the m that are scored."""
        ...


class Ranked:
    """The best rows, equally many for every head; ties go to the earlier row.

    Args:
        recent: share of all kept rows, the tail included, that is taken by position.
        shared: rank once, by the scores summed over the heads.
    """

    def __init__(self, recent: float, shared: bool) -> None:
        self._recent = recent
        self._shared = shared

    def keep(self, scores: Tensor, num_kept: int, num_tail: int) -> Tensor:
        """See `Budget`."""
        ranked = scores.sum(dim=0) if self._shared else scores
        last = min(num_kept, max(0, round(self._recent * (num_kept + num_tail)) - num_tail))
        if last:
            ranked = ranked.clone()
            ranked[..., ranked.shape[-1] - last :] = torch.inf
        return best(ranked, num_kept)


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest along the last axis, ascending; ties go to the lower index."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def others(kept: Tensor, count: int) -> Tensor:
    """Ascending indices below `count` that are not in `kept`: int64 [m, Hkv] or [m] -> the same with count - m."""
    columns = kept if kept.dim() == 2 else kept[:, None]
    taken = torch.zeros(columns.shape[1], count, dtype=torch.uint8, device=kept.device)
    taken.scatter_(1, columns.T, 1)
    # sorted and not listed by `nonzero`, which waits for the device to learn how many there are
    rows = taken.sort(dim=1, stable=True).indices[:, : count - len(kept)].T
    return rows if kept.dim() == 2 else rows[:, 0]
