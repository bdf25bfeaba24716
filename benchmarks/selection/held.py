"""Forcing how many of a step's chunks were chosen by the step before.

Keys of random weights attend evenly, so what their queries choose says nothing about how often a real model comes back
to the same chunks. `HeldSelection` sets that share. A batched step asks it in every layer, inside a captured graph too;
`force` puts it in the place of what a sequence's retrieval chooses where sequences attend one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_STRIDE = 1_073_741_789  # a prime that divides no number of chunks


def num_moves(moved_millis: int, count: int) -> int:
    """How often an entry has moved, all `count` of them together: so many thousandths of `count`."""
    return (count * moved_millis + 500) // 1000


class HeldSelection:
    """Keeps a share of the chunks from one step to the next.

    A place (one layer of one sequence) has its chunks cut into K stretches for each KV head, and a step takes one of
    each, so they ascend as those do that score best: host memory is read in the order in which it lies. Each step
    (1 - share) K stretches, in turn, give their next chunk instead; those of one step lie all over the prompt.

    Args:
        share: of the K chunks that stay, 0 to 1, in thousandths; may be set anew between two steps.
        seed: of the chunks that stretches begin with.

    Attributes:
        calls: how often it was asked; 0 = whoever selects does not ask.
    """

    def __init__(self, share: float, seed: int) -> None:
        self.share = share
        self._seed = seed
        self._place = 0
        self._moved_millis = 0  # over all steps, of K
        self._on_device: Tensor | None = None  # the same, for kernels
        self._sizes: dict[tuple[str, int], tuple[int, int]] = {}
        self.calls = 0

    @property
    def hit_rate(self) -> float | None:
        """The share that really stayed, the mean over places: larger than asked for where K is most of the chunks."""
        kept = [self._stays(*sizes) for sizes in self._sizes.values()]
        return sum(kept) / len(kept) if kept else None

    @property
    def _step_millis(self) -> int:
        return 1000 - round(1000 * self.share)

    def begin_step(self) -> None:
        """A decode step begins; the same places are asked for, in the same order, as in the step before."""
        self._place = 0
        if self.calls:
            self._moved_millis += self._step_millis
        if self._on_device is not None:
            self._on_device += self._step_millis

    def choose(self, layer: int, table: Tensor, chosen: Tensor, counts: Tensor) -> None:
        """See `kernels.step_attention.Selection`."""
        from .triton import hold

        self.calls += 1
        if self._on_device is None:
            with torch.inference_mode(False):  # it grows outside of a step
                self._on_device = torch.full((), self._moved_millis, dtype=torch.int64, device=chosen.device)
        if ("layer", layer) not in self._sizes and not _is_capturing(chosen):
            self._sizes["layer", layer] = _sizes(table, counts)
        hold(table, chosen, counts, self._on_device, layer, self._seed, _STRIDE)

    def replaced(self, chosen: Tensor, num_chunks: int) -> Tensor:
        """chosen [Q, Hkv, K] integers below `num_chunks`, which every row has -> as many others, ascending, alike."""
        self.calls += 1
        place, self._place = self._place, self._place + 1
        num_kv_heads, count = chosen.shape[1:]
        self._sizes.setdefault(("place", place), (count, num_chunks))
        entry = torch.arange(count, device=chosen.device)
        heads = torch.arange(num_kv_heads, device=chosen.device)[:, None]
        turn = entry * _STRIDE % count
        moves = (num_moves(self._moved_millis, count) + count - 1 - turn) // count
        first, end = entry * num_chunks // count, (entry + 1) * num_chunks // count
        begin = (heads + 1) * 1_000_003 + place * 7919 + self._seed * 104_729 + entry * _STRIDE
        chunks: Tensor = first + (begin + moves) % (end - first)
        return chunks.to(chosen.dtype).expand(chosen.shape)

    def _stays(self, count: int, num_chunks: int) -> float:
        if not count or not num_chunks:
            return 1.0
        moved = num_moves(self._step_millis, count) / count
        alone = max(0, 2 * count - num_chunks) / count  # stretches of a single chunk, which has none to give way to
        return 1 - moved * (1 - alone)


def _is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _sizes(table: Tensor, counts: Tensor) -> tuple[int, int]:
    """The most chunks that a row of a table of choices has chosen, and that its prompt has; other rows hold no
    numbers."""
    from ...kernels.step_attention.triton.choose import COUNT, COUNT_B, WANTED

    rows = table[:, WANTED.value] > 0
    if not rows.any():
        return 0, 0
    chosen, prompt = int(counts[rows].max()), int(table[rows, COUNT.value].max())
    return chosen, prompt if prompt >= chosen else prompt + int(table[rows, COUNT_B.value].max())


@contextmanager
def force(selection: HeldSelection) -> Iterator[None]:
    """Within the context sequences that attend one by one attend to the chunks of `selection`. What their retrieval
    chooses is worked out all the same, and which of the entries are valid stays as that says."""
    from ...compression.retrieval import Landmarks

    plain: Any = Landmarks.select

    def select(
        self: Landmarks, scores: Tensor, num_kv_heads: int, hidden: Tensor | None, num_tokens: int
    ) -> tuple[Tensor, Tensor | None]:
        chosen, valid = plain(self, scores, num_kv_heads, hidden, num_tokens)
        return selection.replaced(chosen, scores.shape[-1]), valid

    Landmarks.select = select  # type: ignore[method-assign]
    try:
        yield
    finally:
        Landmarks.select = plain  # type: ignore[method-assign]
