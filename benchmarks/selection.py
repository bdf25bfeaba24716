"""Forcing how many of a step's chunks were chosen by the step before.

Keys of random weights attend evenly, so what their queries choose says nothing about how often a real model comes back
to the same chunks. `HeldSelection` sets that share; `force` puts it in the place of what a sequence's retrieval
chooses. An engine that selects by other means can take a `Selection` itself: nothing in `HeldSelection.choose` waits
for the device once a place is known, and which step it is stands in a tensor, so it may be part of a captured step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor


class Selection(Protocol):
    """Says which chunks a step attends to, in place of those that the retrieval chose."""

    def begin_step(self) -> None:
        """A decode step begins; the same places are asked for, in the same order, as in the step before."""
        ...

    def choose(self, chosen: Tensor, num_chunks: int) -> Tensor:
        """chosen [Q, Hkv, K] integers below `num_chunks`, which every row has -> as many others, ascending, alike."""
        ...


class HeldSelection:
    """Keeps a share of the chunks from one step to the next.

    A place (one layer of one sequence) has a random order of its chunks for each KV head, and a step takes K of them
    in a row, (1 - share) K further along than the step before.

    Args:
        share: of the K chunks that stay, 0 to 1.
        seed: of the orders.

    Attributes:
        calls: how often it was asked; 0 = whoever selects does not ask.
    """

    def __init__(self, share: float, seed: int) -> None:
        self._share = share
        self._seed = seed
        self._place = 0
        self._step: Tensor | None = None
        self._orders: dict[int, Tensor] = {}
        self._kept: list[float] = []
        self.calls = 0

    @property
    def hit_rate(self) -> float | None:
        """The share that really stayed, the mean over places: larger than asked for where K is most of the chunks."""
        return sum(self._kept) / len(self._kept) if self._kept else None

    def begin_step(self) -> None:
        """See `Selection`."""
        self._place = 0
        if self._step is not None:
            self._step += 1

    def choose(self, chosen: Tensor, num_chunks: int) -> Tensor:
        """See `Selection`."""
        self.calls += 1
        place, self._place = self._place, self._place + 1
        order = self._orders.get(place)
        count = chosen.shape[-1]
        moved = round((1 - self._share) * count)
        if self._step is None:
            with torch.inference_mode(False):  # it grows outside of a step
                self._step = torch.zeros((), dtype=torch.int64, device=chosen.device)
        if order is None:
            order = self._orders[place] = self._order(place, chosen, num_chunks)
            length = order.shape[-1]
            self._kept.append((count - moved + max(0, count + moved - length)) / count if count else 1.0)
        at = (torch.arange(count, device=chosen.device) + self._step * moved) % order.shape[-1]
        return order[:, at].sort(dim=-1).values.to(chosen.dtype).expand(chosen.shape)

    def _order(self, place: int, chosen: Tensor, num_chunks: int) -> Tensor:
        """int64 [Hkv, num_chunks], a random order for each KV head."""
        generator = torch.Generator(chosen.device).manual_seed(self._seed * 1_000_003 + place)
        keys = torch.rand(chosen.shape[1], num_chunks, generator=generator, device=chosen.device)
        return keys.argsort(dim=-1)


@contextmanager
def force(selection: Selection) -> Iterator[None]:
    """Within the context every sequence attends to the chunks of `selection`. What its retrieval chooses is worked out
    all the same, and which of the entries are valid stays as that says."""
    from ..compression.retrieval import Landmarks

    plain: Any = Landmarks.select

    def select(
        self: Landmarks, scores: Tensor, num_kv_heads: int, hidden: Tensor | None, num_tokens: int
    ) -> tuple[Tensor, Tensor | None]:
        chosen, valid = plain(self, scores, num_kv_heads, hidden, num_tokens)
        return selection.choose(chosen, scores.shape[-1]), valid

    Landmarks.select = select  # type: ignore[method-assign]
    try:
        yield
    finally:
        Landmarks.select = plain  # type: ignore[method-assign]
