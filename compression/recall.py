"""Recall: rows that selective propagation let go no further come back while decoding, those that attention asks for.

    layer T    holds every row. A row of a step says by its attention there which chunks it wants; of those that are not
               in the deep layers the best few are brought back
    layers > T their hidden rows, kept behind T since prefill, go through these layers together with the step's rows,
               and their keys and values stay there, at their own positions

A recalled row attends to the rows that are there, at positions up to its own. So does everything that comes later
attend to it, the row that wanted it first of all; rows that were propagated before have not seen it. What is held is
bounded: where too much is, what was brought back longest ago makes room.

Every chunk is stamped with the position of the row that wanted it, and rows see what is there by stamps, not by what
ran together: rows in one pass bring back and see what they would one by one. So the state behind a row is a function of
the tokens up to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import FrameMismatch
from ..kernels.attention_partial import attention_partial, merge_partials
from .hidden_rows import HiddenRows
from .interfaces import EncodedLayer, Part, ReadCounter

if TYPE_CHECKING:
    from .layer_cache import LayerCache

Partial = tuple[Tensor, Tensor]

NEVER = 1 << 62  # a position that no row has
NAMES = ("recalled", "recalled_k", "recalled_v")  # of a layer's rows that were recalled, beside those of its tail


def chunk_mass(parts: Sequence[Partial], of: int, scores: Tensor) -> Tensor:
    """How much of its attention a row gives each chunk, mean over the heads: what the chunks' region has of all that
    the row attends to, shared out by their scores.

    Args:
        parts: of the whole attention, see `attention_partial`; lse float32 [Q, H] each.
        of: the region's place among them.
        scores: float32 [Q, H, n] of the chunks; -inf of those that a row does not attend to.

    Returns:
        float32 [Q, n].
    """
    share = torch.exp(parts[of][1] - torch.stack([lse for _, lse in parts]).logsumexp(dim=0))
    return (share[..., None] * torch.softmax(scores, dim=-1)).nan_to_num(0.0).mean(dim=1)


@dataclass
class _Chunk:
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


class _Seen(NamedTuple):
    """What the rows of a pass see of the chunks.

    Attributes:
        rows: int64 [m], where the chunks' rows lie.
        positions: int64 [m].
        valid: bool [joining + own, m]; None = all of them see all.
    """

    rows: Tensor
    positions: Tensor
    valid: Tensor | None


class Recall:
    """What one choice has brought back.

    Args:
        hidden: of its prompt.
        windows: of the model's layers, see `ModelShape`.
        dtype: of exact rows; None = the model's.
    """

    def __init__(self, hidden: HiddenRows, windows: Sequence[int | None], dtype: torch.dtype | None) -> None:
        self.hidden, self.plan = hidden, hidden.plan
        self._windows, self._dtype = windows, dtype
        self._chunks: list[_Chunk] = []  # by stamp and position; first those that a row of the last pass displaced
        self._joining: list[_Chunk] = []  # of the last pass, the last ones of them
        self._free = list(range(self.plan.num_slots))
        self._displaced_at = -1  # the last row that displaced what is not here any more
        self._regions: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: list[int] = []  # positions of the pass's rows
        self._seen: _Seen | None = None  # while it runs

    @property
    def num_joining(self) -> int:
        """Rows that the last pass brought back."""
        return len(self._joining) * self.plan.chunk

    @property
    def held(self) -> list[tuple[int, int]]:
        """Position and stamp of every chunk that is here."""
        return [(self.hidden.position(one.number), one.wanted_by) for one in self._chunks if one.gone == NEVER]

    def choose(self, mass: Tensor, positions: Tensor, counter: ReadCounter) -> None:
        """Begin a pass: bring back what its rows want.

        Args:
            mass: float32 [Q, n], what they attend to of layer T's sealed chunks, see `chunk_mass`.
            positions: int64 [Q], ascending; at most `RecallPlan.pass_rows`.
        """
        assert len(positions) <= self.plan.pass_rows, "rows that run together are bounded"
        self._let_go()
        wanted = mass[:, self.hidden.places].float().cpu().numpy()
        self._joining = []
        self._own, self._seen = positions.tolist(), None
        for position, row in zip(self._own, wanted, strict=True):
            self._joining += self._bring(position, self._best(position, row))
        counter.bytes_read += len(self._joining) * self.hidden.chunk_nbytes
        counter.rows_recalled += self.num_joining

    def _best(self, position: int, mass: NDArray[np.float32]) -> list[int]:
        """The chunks that a row wants most, of those that are not here: they have more of its attention than if it
        attended to all rows alike."""
        mass[[one.number for one in self._chunks if one.gone == NEVER]] = 0
        order = np.argsort(-mass, kind="stable")[: self.plan.a_row]
        return sorted(int(i) for i in order if mass[i] > self.plan.chunk / (position + 1))

    def _bring(self, position: int, numbers: Sequence[int]) -> list[_Chunk]:
        """Bring chunks back for a row, and displace as many as are too many."""
        new = [_Chunk(number, position, heappop(self._free)) for number in numbers]
        here = [one for one in self._chunks if one.gone == NEVER]
        for one in here[: max(0, len(here) + len(new) - self.plan.capacity)]:
            one.gone = position
        self._chunks += new
        return new

    def _let_go(self) -> None:
        """Give back the slots of what the last pass displaced: no row to come sees it."""
        for one in self._chunks:
            if one.gone != NEVER:
                heappush(self._free, one.slot)
                self._displaced_at = max(self._displaced_at, one.gone)
        self._chunks = [one for one in self._chunks if one.gone == NEVER]

    def rows_since(self, position: int) -> int:
        """Rows that those from a position on have brought back."""
        return sum(one.wanted_by >= position for one in self._chunks) * self.plan.chunk

    def undo(self, end: int) -> bool:
        """Be what it was before the rows from position `end` on. False, and nothing has changed, where what they have
        displaced is not here any more."""
        if self._displaced_at >= end:
            return False
        for one in self._chunks:
            if one.wanted_by >= end:
                heappush(self._free, one.slot)
            elif one.gone >= end:
                one.gone = NEVER
        self._chunks = [one for one in self._chunks if one.wanted_by < end]
        self._joining, self._own, self._seen = [], [], None
        return True

    def joining(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """What the pass brings back: hidden rows [R, D] in the dtype of `like`, and their positions int64 [R]."""
        if not self._joining:
            return None
        rows = self.hidden.read([one.number for one in self._joining])
        return rows.to(like.dtype), self._positions(self._joining)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Take the keys, after RoPE, and values [R, Hkv, d] of the rows that join, in a layer behind T."""
        self._put(layer, self._joining, k, v)

    def _put(self, layer: int, chunks: Sequence[_Chunk], k: Tensor, v: Tensor) -> None:
        if layer not in self._regions:
            shape = (self.plan.num_slots * self.plan.chunk, *k.shape[1:])
            k_room, v_room = (torch.zeros(shape, dtype=self._dtype or k.dtype, device=k.device) for _ in range(2))
            self._regions[layer] = k_room, v_room
        rows = self._rows(chunks)
        for held, new in zip(self._regions[layer], (k, v), strict=True):
            held[rows] = new.to(held.dtype)

    def attend(self, one: LayerCache, layer: int, q: Tensor, positions: Tensor, counter: ReadCounter) -> Tensor:
        """Attention of the pass's rows in a layer behind T, those that join first: q [R + Q, H, d] at positions int64
        [R + Q] -> [R + Q, H, d]."""
        count, outs = self.num_joining, []
        for joins, rows in ((True, slice(0, count)), (False, slice(count, None))):
            if joins and not count:
                continue
            parts = one.parts(q[rows], positions[rows], counter, is_recalled=joins)
            parts += self.part(layer, q[rows], positions[rows], joins, counter)
            outs.append(merge_partials(parts).to(q.dtype))
        return torch.cat(outs)

    def part(self, layer: int, q: Tensor, positions: Tensor, joins: bool, counter: ReadCounter) -> list[Partial]:
        """Attention of rows of the pass to what is here; none where nothing is.

        Args:
            q: [Q, H, d] of the rows that join, or of all others.
        """
        seen = self._seen_by_pass()
        if not joins and layer == len(self._windows) - 1:
            self._seen = None
        if not len(seen.rows):
            return []
        valid = None
        if seen.valid is not None:
            valid = seen.valid[: self.num_joining] if joins else seen.valid[self.num_joining :]
        k, v = (held[seen.rows].transpose(0, 1) for held in self._regions[layer])
        counter.bytes_read += k.nbytes + v.nbytes
        if valid is not None:
            valid = valid[:, None].expand(-1, len(k), -1)
        return [attention_partial(q, k, v, seen.positions, positions, self._windows[layer], valid=valid)]

    def _seen_by_pass(self) -> _Seen:
        if self._seen is None:
            own = self._own
            assert own, "layer T comes before those behind it"
            chunks = [one for one in self._chunks if one.gone > own[0]]
            stamps = [one.wanted_by for one in self._joining for _ in range(self.plan.chunk)] + own
            valid = None
            if len(own) > 1:
                since, until = (np.array([getattr(one, name) for one in chunks]) for name in ("wanted_by", "gone"))
                at = np.array(stamps)[:, None]
                shown = ((since <= at) & (at < until)).repeat(self.plan.chunk, axis=1)
                valid = torch.from_numpy(shown).to(self.hidden.device)
            self._seen = _Seen(self._rows(chunks), self._positions(chunks), valid)
        return self._seen

    def _rows(self, chunks: Sequence[_Chunk]) -> Tensor:
        return self._spread([one.slot * self.plan.chunk for one in chunks])

    def _positions(self, chunks: Sequence[_Chunk]) -> Tensor:
        return self._spread([self.hidden.position(one.number) for one in chunks])

    def _spread(self, firsts: list[int]) -> Tensor:
        """int64 [len(firsts) * chunk], rows of chunks by their first ones."""
        first = torch.tensor(firsts, dtype=torch.int64, device=self.hidden.device)
        return (first[:, None] + torch.arange(self.plan.chunk, device=first.device)).flatten()

    def with_recalled(self, layers: Sequence[EncodedLayer], begin: int, end: int) -> list[EncodedLayer]:
        """Add to rows at positions begin ≤ p < end what they have recalled, where they did: of every layer behind T
        `recalled` int32 [n, 2], positions of chunks and of the rows that wanted them, and their keys and values
        `recalled_k` and `recalled_v` [n * chunk, Hkv, d], by position of those rows."""
        chunks = [one for one in self._chunks if begin <= one.wanted_by < end]
        if not chunks:
            return list(layers)
        stamps = [[self.hidden.position(one.number), one.wanted_by] for one in chunks]
        recalled = torch.tensor(stamps, dtype=torch.int32, device=self.hidden.device)
        rows, out = self._rows(chunks), []
        for one in layers:
            if one.layer > self.plan.layer:
                k, v = (held[rows] for held in self._regions[one.layer])
                tensors = {"recalled": recalled.clone(), "recalled_k": k, "recalled_v": v}
                one = replace(one, tensors={Part.TAIL: {**one.tensors[Part.TAIL], **tensors}})
            out.append(one)
        return out

    def put(self, begin: int, end: int, layers: Sequence[EncodedLayer]) -> None:
        """Bring back what `with_recalled` gave, for rows at positions begin ≤ p < end that follow those of before.

        Raises:
            FrameMismatch: the layers do not agree on it, or it is not of this prompt, these rows, or too much for them.
        """
        deep = [one for one in layers if one.layer > self.plan.layer]
        if any(set(NAMES) & set(one.tensors[Part.TAIL]) for one in layers if one.layer <= self.plan.layer):
            raise FrameMismatch(f"rows are recalled in layers up to {self.plan.layer}, which hold them all")
        groups = [{name: one.tensors[Part.TAIL].get(name) for name in NAMES} for one in deep]
        first = groups[0]["recalled"]
        if first is None:
            if any(tensor is not None for group in groups for tensor in group.values()):
                raise FrameMismatch("rows have recalled others in some layers, in others they have not")
            return
        stamps = self._checked(first, begin, end)
        self._let_go()
        chunks: list[_Chunk] = []
        for position in dict.fromkeys(stamp for _, stamp in stamps):
            numbers = [number for number, stamp in stamps if stamp == position]
            here = {one.number for one in self._chunks if one.gone == NEVER}
            if here & set(numbers) or len(set(numbers)) < len(numbers):
                raise FrameMismatch(f"the row at position {position} recalls what is here already")
            chunks += self._bring(position, numbers)
        for one, group in zip(deep, groups, strict=True):
            k, v, same = group["recalled_k"], group["recalled_v"], group["recalled"]
            rows = len(stamps) * self.plan.chunk
            if same is None or not torch.equal(same, first) or k is None or v is None or not len(k) == len(v) == rows:
                raise FrameMismatch(f"layer {one.layer}: recalled rows are not those of the layer before")
            self._put(one.layer, chunks, k, v)
        self._let_go()
        self._joining, self._own, self._seen = [], [], None

    def _checked(self, recalled: Tensor, begin: int, end: int) -> list[tuple[int, int]]:
        """Numbers of chunks and positions of the rows that wanted them.

        Raises:
            FrameMismatch: see `put`.
        """
        if recalled.dtype != torch.int32 or recalled.dim() != 2 or recalled.shape[1] != 2 or not len(recalled):
            raise FrameMismatch(f"recalled rows are named by {recalled.dtype} {tuple(recalled.shape)}")
        pairs: list[list[int]] = recalled.tolist()
        stamps = [stamp for _, stamp in pairs]
        if stamps != sorted(stamps) or not begin <= stamps[0] <= stamps[-1] < end:
            raise FrameMismatch(f"recalled rows are wanted by others than those of {begin} to {end - 1}")
        if max(map(stamps.count, stamps)) > self.plan.a_row or len(stamps) > self.plan.num_slots - self.plan.capacity:
            raise FrameMismatch(f"{len(stamps)} chunks are recalled, more than the recipe allows")
        found: list[tuple[int, int]] = []
        for position, stamp in pairs:
            number = self.hidden.number_at(position)
            if number is None:
                raise FrameMismatch(f"a row at position {position} is recalled, which was not to be")
            found.append((number, stamp))
        return found

    def copy(self) -> Recall:
        """An independent one with the same rows."""
        twin = Recall(self.hidden, self._windows, self._dtype)
        twin._chunks = [replace(one) for one in self._chunks]
        twin._free = list(self._free)
        heapify(twin._free)
        twin._displaced_at = self._displaced_at
        twin._regions = {layer: (k.clone(), v.clone()) for layer, (k, v) in self._regions.items()}
        return twin

    def tensors(self) -> Iterator[Tensor]:
        """Everything that it holds of its own on the device."""
        for k, v in self._regions.values():
            yield from (k, v)
