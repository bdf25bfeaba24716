"""Which chunks a choice has brought back, in which order, and where they lie; see `recall`.

They lie in a ring: the n-th chunk that ever came has slot n modulo their number, and the oldest leave first. Passes on
the host choose here. Steps that run together on a device choose there (`kernels.step_attention.recalled`), in a state
that is written when the first of them begins; what is known here is then behind, until somebody asks.

    host   choose, bring, undo ──begin_step──> device   steps, one after the other
                               <──catch_up───
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.step_attention.recalled import BEFORE, DISPLACED, END, FAR, FIRST, JOINED, LAST, STATE_FIELDS
from .hidden_rows import HiddenRows

NEVER = 1 << 62  # a position that no row has


@dataclass
class Chunk:
    """A chunk that was brought back.

    Attributes:
        number: among the hidden ones.
        wanted_by: position of the row.
        slot: where its rows lie.
        gone: position of the row that displaced it.
    """

    number: int
    wanted_by: int
    slot: int
    gone: int = NEVER


@dataclass(frozen=True)
class OnDevice:
    """What kernels read and change, see `kernels.step_attention.recalled`."""

    state: Tensor
    ids: Tensor
    here: Tensor


class RecalledChunks:
    """The chunks that are here.

    Attributes:
        all: by stamp and position; first those that a row of the last pass displaced.
        joining: of the last pass, the last ones of them.
        own: positions of the last pass's rows.
        on_device: what kernels read; None before `make`.
        is_ahead: the device has chosen since.
    """

    def __init__(self, hidden: HiddenRows) -> None:
        self.hidden, self.plan = hidden, hidden.plan
        self.all: list[Chunk] = []
        self.joining: list[Chunk] = []
        self.own: list[int] = []
        self.on_device: OnDevice | None = None
        self.is_ahead = False
        self._is_behind = True
        self._end = 0  # chunks that ever came
        self._displaced_at = -1  # the last row that displaced what is not here any more

    @property
    def num_brought(self) -> int:
        """Rows that ever came, as far as is known here."""
        return self._end * self.plan.chunk

    @property
    def held(self) -> list[tuple[int, int]]:
        """Position and stamp of every chunk that is here."""
        return [(self.hidden.position(one.number), one.wanted_by) for one in self._here()]

    def _here(self) -> list[Chunk]:
        return [one for one in self.all if one.gone == NEVER]

    def choose(self, wanted: NDArray[np.float32], positions: list[int]) -> None:
        """Begin a pass: bring back what its rows want.

        Args:
            wanted: [Q, chunks that may come], what the rows attend to of each; written over.
            positions: ascending.
        """
        self.begin_pass()
        self.joining, self.own = [], positions
        for position, row in zip(positions, wanted, strict=True):
            self.joining += self.bring(position, self._best(position, row))

    def _best(self, position: int, mass: NDArray[np.float32]) -> list[int]:
        """The chunks that a row wants most, of those that are not here: they have more of its attention than if it
        attended to all rows alike."""
        mass[[one.number for one in self._here()]] = 0
        order = np.argsort(-mass, kind="stable")[: self.plan.a_row]
        return sorted(int(i) for i in order if mass[i] > self.plan.chunk / (position + 1))

    def bring(self, position: int, numbers: Sequence[int]) -> list[Chunk]:
        """Bring chunks back for a row, and displace as many as are too many."""
        slots = self.plan.num_slots
        new = [Chunk(number, position, at % slots) for at, number in enumerate(numbers, self._end)]
        self._end += len(new)
        here = self._here()
        for one in here[: max(0, len(here) + len(new) - self.plan.capacity)]:
            one.gone = position
        self.all += new
        return new

    def begin_pass(self) -> None:
        """Forget what the last pass displaced: no row to come sees it, and its slots are taken next."""
        assert not self.is_ahead, "what the device chose comes before"
        self._is_behind = True
        gone = [one.gone for one in self.all if one.gone != NEVER]
        self._displaced_at = max(self._displaced_at, *gone, -1)
        self.all = self._here()

    def end_pass(self) -> None:
        """No row to come belongs to the last pass."""
        self.joining, self.own = [], []

    def rows_since(self, position: int) -> int:
        """Rows that those from a position on have brought back."""
        return sum(one.wanted_by >= position for one in self.all) * self.plan.chunk

    def undo(self, end: int) -> bool:
        """See `Recall.undo`."""
        if self._displaced_at >= end:
            return False
        self._is_behind = True
        for one in self.all:
            one.gone = NEVER if one.gone >= end else one.gone
        kept = [one for one in self.all if one.wanted_by < end]
        self._end -= len(self.all) - len(kept)
        self.all = kept
        self.end_pass()
        return True

    def make(self) -> bool:
        """Have the memory that a device's steps need. Returns whether it was not there."""
        if self.on_device is not None:
            return False
        slots, device = self.plan.num_slots, self.hidden.device
        self.on_device = OnDevice(
            torch.zeros(STATE_FIELDS + 2 * slots, dtype=torch.int64, device=device),
            torch.full((slots,), FAR, dtype=torch.int32, device=device),
            torch.zeros(len(self.hidden), dtype=torch.uint8, device=device),
        )
        return True

    def begin_step(self) -> None:
        """Leave the next step to the device."""
        if self._is_behind:
            self.begin_pass()
            self._write()
            self._is_behind = False
        self.is_ahead = True

    def _write(self) -> None:
        assert self.on_device is not None, "made before the step"
        state = np.zeros(STATE_FIELDS + 2 * self.plan.num_slots, dtype=np.int64)
        state[[END, JOINED]], state[[FIRST, BEFORE]] = self._end, self._end - len(self.all)
        state[LAST], state[DISPLACED] = -1, self._displaced_at
        ids = np.full(self.plan.num_slots, FAR, dtype=np.int32)
        here = np.zeros(len(self.hidden), dtype=np.uint8)
        for one in self.all:
            at = STATE_FIELDS + 2 * one.slot
            state[at : at + 2] = one.number, one.wanted_by
            ids[one.slot], here[one.number] = self.hidden.position(one.number) // self.plan.chunk, 1
        own = self.on_device
        for mine, new in ((own.state, state), (own.ids, ids), (own.here, here)):
            host = torch.from_numpy(new)
            mine.copy_(host.pin_memory() if mine.is_cuda else host, non_blocking=True)

    def catch_up(self) -> int:
        """Know what steps on the device have brought back since `begin_step`; waits for them. Returns how many rows."""
        if not self.is_ahead:
            return 0
        assert self.on_device is not None, "a step needed it"
        state: list[int] = self.on_device.state.tolist()
        begin, first, joined, end = state[BEFORE], state[FIRST], state[JOINED], state[END]
        self.all = []
        for at in range(begin, end):
            slot = at % self.plan.num_slots
            number, stamp = state[STATE_FIELDS + 2 * slot : STATE_FIELDS + 2 * slot + 2]
            self.all.append(Chunk(number, stamp, slot, state[LAST] if at < first else NEVER))
        self.joining, self.own = self.all[joined - begin :], [state[LAST]]
        self.is_ahead, self._displaced_at = False, state[DISPLACED]
        count, self._end = end - self._end, end
        return count * self.plan.chunk

    def positions(self) -> Tensor:
        """int64 [slots * chunk] of what the device has, beyond all others where it has nothing. Waits for nothing."""
        assert self.on_device is not None, "asked for behind a step"
        within = torch.arange(self.plan.chunk, device=self.hidden.device)
        return (self.on_device.ids.long()[:, None] * self.plan.chunk + within).flatten()

    def copy(self) -> RecalledChunks:
        """An independent one with the same chunks."""
        assert not self.is_ahead, "what the device chose comes before"
        twin = RecalledChunks(self.hidden)
        twin.all = [replace(one) for one in self.all]
        twin._end, twin._displaced_at = self._end, self._displaced_at
        return twin

    def tensors(self) -> Iterator[Tensor]:
        """Everything that it holds on the device."""
        if self.on_device is not None:
            yield from (self.on_device.state, self.on_device.ids, self.on_device.here)
