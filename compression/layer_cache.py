"""One layer of a sequence's cache: what lies where, attention over all of it, sealing of generated rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..kernels.attention_partial import attention_partial, merge_partials
from ..kernels.sparse_reconstruct import sparse_attention
from .interfaces import Part, ReadCounter
from .layout import layer_layout, tail_is_unrotated
from .segment import Kit, Segment, Tail

Partial = tuple[Tensor, Tensor]


class LayerCache:
    """
    [ sinks | base: sealed prompt rows | grown: blocks sealed here | tail ]    outliers: exact copies of base chunks
      shared between the forks of a prompt    own                    own         shared
    """

    def __init__(self, kit: Kit, layer: int, tensors: Mapping[Part, Mapping[str, Tensor]]) -> None:
        at = layer_layout(kit.recipe, kit.num_prompt_tokens, layer)
        ends = tensors.get(Part.TAIL, {})
        positions = tensors.get(Part.POSITIONS, {})
        self._kit = kit
        self._window = kit.shape.layer_windows[layer]
        self._basis = dict(tensors.get(Part.BASIS, {}))
        self._sinks = (ends["sink_k"], ends["sink_v"]) if at.num_sinks else None
        self._outliers = dict(tensors.get(Part.OUTLIERS, {}))
        self._base: Segment | None = None
        if at.num_sealed:
            index = positions.get("rows", positions.get("chunks"))
            self._base = Segment(
                kit, tensors[Part.KEYS], tensors[Part.VALUES], self._basis, at.num_sealed, at.num_sinks, index
            )
        self._grown: Segment | None = None
        dtype = torch.bfloat16 if kit.recipe.window.dtype == "bfloat16" else None
        self._tail = Tail(at.sealed_end, ends.get("k"), ends.get("v"), dtype)

    def append(self, k_pre: Tensor, k: Tensor, v: Tensor) -> None:
        """Add generated rows [q, Hkv, d] to the tail."""
        self._tail.append(k_pre if tail_is_unrotated(self._kit.recipe) else k, v)

    def attend(self, q: Tensor, positions: Tensor, counter: ReadCounter) -> Tensor:
        """q [Q, H, d] at positions int64 [Q] -> [Q, H, d] in q's dtype.

        Counted as read: regions that all rows share once a call, chosen chunks once for each row that chose them.
        """
        parts: list[Partial] = []
        if self._sinks is not None:
            at = torch.arange(len(self._sinks[0]), device=q.device)
            parts.append(self._exact(q, positions, *self._sinks, at, counter))
        segments = [segment for segment in (self._base, self._grown) if segment is not None]
        if self._kit.retrieval is None:
            parts += [self._all_rows(q, positions, segment, counter) for segment in segments]
        elif segments:
            parts.append(self._chosen_chunks(q, positions, segments, counter))
            if self._outliers:
                parts.append(self._outlier_rows(q, positions, counter))
        if self._tail.num_rows:
            parts.append(self._tail_rows(q, positions, counter))
        return merge_partials(parts).to(q.dtype)

    def seal(self, end: int) -> None:
        """Seal the tail's blocks up to position `end`, one by one."""
        block = self._kit.recipe.block
        while self._tail.begin + block <= end:
            # copies, as a codec may keep rows that the tail is going to write over
            k, v = (rows[:block].clone() for rows in self._tail.rows())
            sealed = Segment(
                self._kit,
                self._kit.key_codec.encode(k, self._basis),
                self._kit.value_codec.encode(v, {}),
                self._basis,
                block,
                self._tail.begin,
            )
            if self._grown is None:
                self._grown = sealed
            else:
                self._grown.extend(sealed)
            self._tail.drop_first(block)

    def fork(self) -> LayerCache:
        """A layer over the same prompt with a tail and sealed blocks of its own."""
        twin = object.__new__(LayerCache)
        twin.__dict__.update(self.__dict__)
        twin._grown = None if self._grown is None else self._grown.copy()
        twin._tail = self._tail.copy()
        return twin

    def shared_tensors(self) -> Iterator[Tensor]:
        """What the prompt made."""
        yield from self._basis.values()
        yield from self._sinks or ()
        yield from self._outliers.values()
        if self._base is not None:
            yield from self._base.tensors()

    def own_tensors(self) -> Iterator[Tensor]:
        """What this choice appended, and its copy of the prompt's tail."""
        if self._grown is not None:
            yield from self._grown.tensors()
        yield from self._tail.tensors()

    def _exact(self, q: Tensor, positions: Tensor, k: Tensor, v: Tensor, at: Tensor, counter: ReadCounter) -> Partial:
        """Rows [m, Hkv, d] at positions [m] or [Hkv, m]."""
        counter.bytes_read += k.nbytes + v.nbytes
        return attention_partial(q, k.transpose(0, 1), v.transpose(0, 1), at, positions, self._window)

    def _tail_rows(self, q: Tensor, positions: Tensor, counter: ReadCounter) -> Partial:
        k, v = self._tail.rows()
        at = torch.arange(self._tail.begin, self._tail.end, device=q.device)
        counter.bytes_read += k.nbytes + v.nbytes
        if tail_is_unrotated(self._kit.recipe):
            k = self._kit.rope(k.to(q.dtype), at)
        return attention_partial(q, k.transpose(0, 1), v.transpose(0, 1), at, positions, self._window)

    def _all_rows(self, q: Tensor, positions: Tensor, segment: Segment, counter: ReadCounter) -> Partial:
        counter.bytes_read += sum(t.nbytes for t in segment.tensors()) + segment.key_reader.basis_nbytes
        k, v = segment.rotated_keys(), segment.value_reader.read_all()
        at = segment.row_positions()
        return attention_partial(q, k.transpose(0, 1), v.transpose(0, 1), at, positions, self._window)

    def _outlier_rows(self, q: Tensor, positions: Tensor, counter: ReadCounter) -> Partial:
        assert self._base is not None
        counter.bytes_read += self._outliers["chunks"].nbytes
        first = self._base.chunk_positions(self._outliers["chunks"].long().T)
        within = torch.arange(self._kit.recipe.retrieval.chunk, device=q.device)
        at = (first[..., None] + within).flatten(1)
        return self._exact(q, positions, self._outliers["k"], self._outliers["v"], at, counter)

    def _chosen_chunks(self, q: Tensor, positions: Tensor, segments: list[Segment], counter: ReadCounter) -> Partial:
        retrieval, chunk = self._kit.retrieval, self._kit.recipe.retrieval.chunk
        assert retrieval is not None
        scores = torch.cat([retrieval.score(q, segment.summary) for segment in segments], dim=-1)
        hidden = self._hidden_chunks(positions, segments)
        chosen, valid = retrieval.select(scores, self._kit.shape.num_kv_heads, hidden, self._kit.num_prompt_tokens)
        readers = (segments[0].key_reader, segments[0].value_reader)
        num_read = chosen.numel() if valid is None else int(valid.sum())
        counter.bytes_read += num_read * sum(reader.chunk_nbytes for reader in readers)
        counter.bytes_read += readers[0].basis_nbytes
        for segment in segments:
            counter.bytes_read += sum(t.nbytes for t in segment.summary.values())
            counter.bytes_read += 0 if segment.index is None else segment.index.nbytes
        chunked = [segment.chunked() for segment in segments]
        return sparse_attention(q, positions, chosen, valid, chunked, chunk, self._window)

    def _hidden_chunks(self, positions: Tensor, segments: list[Segment]) -> Tensor | None:
        """bool [Q, Hkv, n]: chunks without a row that the query may see, and outliers, which it sees anyway.
        None when there are none of either."""
        if self._window is None and not self._outliers and int(positions.min()) >= self._tail.begin:
            return None
        chunk = self._kit.recipe.retrieval.chunk
        first = torch.cat([s.chunk_positions(torch.arange(s.num_chunks, device=positions.device)) for s in segments])
        hidden = first > positions[:, None]
        if self._window is not None:
            hidden |= first + (chunk - 1) <= positions[:, None] - self._window
        hidden = hidden[:, None].repeat(1, self._kit.shape.num_kv_heads, 1)
        if self._outliers:
            outliers = self._outliers["chunks"].long().T
            hidden.scatter_(-1, outliers.expand(len(positions), -1, -1), True)
        return hidden
