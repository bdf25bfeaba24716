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
the tokens up to it. Which chunks are there is known by `recalled_chunks`; here are their rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import FrameMismatch
from ..kernels.attention_partial import attention_partial, merge_partials
from ..kernels.step_attention import Layout, Packed, Region
from .hidden_rows import HiddenRows
from .interfaces import EncodedLayer, Part, ReadCounter
from .recalled_chunks import NEVER, Chunk, RecalledChunks

if TYPE_CHECKING:
    from .layer_cache import LayerCache

Partial = tuple[Tensor, Tensor]

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

    Attributes:
        chunks: which are here. Where steps on a device have chosen since, `catch_up` comes before anything else.
    """

    def __init__(self, hidden: HiddenRows, windows: Sequence[int | None], dtype: torch.dtype | None) -> None:
        self.hidden, self.plan = hidden, hidden.plan
        self._windows, self._dtype = windows, dtype
        self.chunks = RecalledChunks(hidden)
        self._regions: dict[int, tuple[Tensor, Tensor]] = {}
        self._seen: _Seen | None = None  # while it runs

    @property
    def num_joining(self) -> int:
        """Rows that the last pass brought back."""
        return len(self.chunks.joining) * self.plan.chunk

    def choose(self, mass: Tensor, positions: Tensor, counter: ReadCounter) -> None:
        """Begin a pass: bring back what its rows want.

        Args:
            mass: float32 [Q, n], what they attend to of layer T's sealed chunks, see `chunk_mass`.
            positions: int64 [Q], ascending; at most `RecallPlan.pass_rows`.
        """
        assert len(positions) <= self.plan.pass_rows, "rows that run together are bounded"
        self.chunks.choose(mass[:, self.hidden.places].float().cpu().numpy(), positions.tolist())
        self._seen = None
        counter.bytes_read += len(self.chunks.joining) * self.hidden.chunk_nbytes
        counter.rows_recalled += self.num_joining

    def undo(self, end: int) -> bool:
        """Be what it was before the rows from position `end` on. False, and nothing has changed, where what they have
        displaced is not here any more."""
        self._seen = None
        return self.chunks.undo(end)

    def catch_up(self) -> int:
        """Know what steps on the device have brought back, and wait for them. Returns how many rows that this is."""
        self._seen = None if self.chunks.is_ahead else self._seen
        return self.chunks.catch_up()

    def reserve(self, like: Tensor) -> bool:
        """Have the memory that steps on a device need, for rows of the kind of `like` [_, Hkv, d]. Returns whether it
        was not there."""
        made = self.chunks.make()
        if len(self._windows) - 1 in self._regions:
            return made  # every step asks; layers come in their order, so the others are here as well
        for layer in range(self.plan.layer + 1, len(self._windows)):
            made |= self._make_region(layer, like)
        return made

    @property
    def most_read_nbytes(self) -> int:
        """Bytes that a step on a device reads, at most: how much there is only the device knows."""
        plan = self.plan
        rows = sum(k[0].nbytes + v[0].nbytes for k, v in self._regions.values())
        return plan.capacity * plan.chunk * rows + plan.a_row * self.hidden.chunk_nbytes

    def region(self, layer: int) -> Region | None:
        """What is here in a layer behind T, as kernels read it; None in others."""
        if layer <= self.plan.layer:
            return None
        assert self.chunks.on_device is not None, "reserved before"
        k, v = (Packed(Layout("dense", dtype=rows.dtype), (rows,)) for rows in self._regions[layer])
        return Region(k, v, len(k.tensors[0]), 0, self.chunks.on_device.ids, by_position=True)

    def joining(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """What the pass brings back: hidden rows [R, D] in the dtype of `like`, and their positions int64 [R]."""
        joining = self.chunks.joining
        if not joining:
            return None
        rows = self.hidden.read([one.number for one in joining])
        return rows.to(like.dtype), self._positions(joining)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Take the keys, after RoPE, and values [R, Hkv, d] of the rows that join, in a layer behind T."""
        self._put(layer, self.chunks.joining, k, v)

    def _make_region(self, layer: int, like: Tensor) -> bool:
        if layer in self._regions:
            return False
        shape, dtype = (self.plan.num_slots * self.plan.chunk, *like.shape[1:]), self._dtype or like.dtype
        k, v = (torch.zeros(shape, dtype=dtype, device=like.device) for _ in range(2))
        self._regions[layer] = k, v
        return True

    def _put(self, layer: int, chunks: Sequence[Chunk], k: Tensor, v: Tensor) -> None:
        self._make_region(layer, k)
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
        if self.chunks.is_ahead:  # it is the row of the device's last step, once more
            k, v = (held.transpose(0, 1) for held in self._regions[layer])
            return [attention_partial(q, k, v, self.chunks.positions(), positions, self._windows[layer])]
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
            own = self.chunks.own
            assert own, "layer T comes before those behind it"
            chunks = [one for one in self.chunks.all if one.gone > own[0]]
            stamps = [one.wanted_by for one in self.chunks.joining for _ in range(self.plan.chunk)] + own
            valid = None
            if len(own) > 1:
                since, until = (np.array([getattr(one, name) for one in chunks]) for name in ("wanted_by", "gone"))
                at = np.array(stamps)[:, None]
                shown = ((since <= at) & (at < until)).repeat(self.plan.chunk, axis=1)
                valid = torch.from_numpy(shown).to(self.hidden.device)
            self._seen = _Seen(self._rows(chunks), self._positions(chunks), valid)
        return self._seen

    def _rows(self, chunks: Sequence[Chunk]) -> Tensor:
        return self._spread([one.slot * self.plan.chunk for one in chunks])

    def _positions(self, chunks: Sequence[Chunk]) -> Tensor:
        return self._spread([self.hidden.position(one.number) for one in chunks])

    def _spread(self, firsts: list[int]) -> Tensor:
        """int64 [len(firsts) * chunk], rows of chunks by their first ones."""
        first = torch.tensor(firsts, dtype=torch.int64, device=self.hidden.device)
        return (first[:, None] + torch.arange(self.plan.chunk, device=first.device)).flatten()

    def with_recalled(self, layers: Sequence[EncodedLayer], begin: int, end: int) -> list[EncodedLayer]:
        """Add to rows at positions begin ≤ p < end what they have recalled, where they did: of every layer behind T
        `recalled` int32 [n, 2], positions of chunks and of the rows that wanted them, and their keys and values
        `recalled_k` and `recalled_v` [n * chunk, Hkv, d], by position of those rows."""
        chunks = [one for one in self.chunks.all if begin <= one.wanted_by < end]
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
        self.chunks.begin_pass()
        chunks: list[Chunk] = []
        for position in dict.fromkeys(stamp for _, stamp in stamps):
            numbers = [number for number, stamp in stamps if stamp == position]
            here = {one.number for one in self.chunks.all if one.gone == NEVER}
            if here & set(numbers) or len(set(numbers)) < len(numbers):
                raise FrameMismatch(f"the row at position {position} recalls what is here already")
            chunks += self.chunks.bring(position, numbers)
        for one, group in zip(deep, groups, strict=True):
            k, v, same = group["recalled_k"], group["recalled_v"], group["recalled"]
            rows = len(stamps) * self.plan.chunk
            if same is None or not torch.equal(same, first) or k is None or v is None or not len(k) == len(v) == rows:
                raise FrameMismatch(f"layer {one.layer}: recalled rows are not those of the layer before")
            self._put(one.layer, chunks, k, v)
        self.chunks.begin_pass()
        self.chunks.end_pass()
        self._seen = None

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
        twin.chunks = self.chunks.copy()
        twin._regions = {layer: (k.clone(), v.clone()) for layer, (k, v) in self._regions.items()}
        return twin

    def tensors(self) -> Iterator[Tensor]:
        """Everything that it holds of its own on the device."""
        for k, v in self._regions.values():
            yield from (k, v)
        yield from self.chunks.tensors()
