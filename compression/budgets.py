"""Budgets: which rows each KV head keeps, given their scores."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Budget(Protocol):
    """Chooses among the sealed rows of a layer; sinks and tail are kept anyway."""

    def keep(self, scores: Tensor, num_kept: int) -> Tensor:
        """scores float32 [Hkv, m] -> int64 [Hkv, num_kept], ascending."""
        ...


class Uniform:
    """The best rows of each KV head, equally many for all."""

    def keep(self, scores: Tensor, num_kept: int) -> Tensor:
        """See `Budget`; ties go to the earlier row."""
        return best(scores, num_kept)


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest along the last axis, ascending; ties go to the lower index."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values
