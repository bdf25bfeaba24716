"""One layer of a sequence's cache: what lies where, attention over all of it, sealing of generated rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..kernels.attention_partial import attention_partial, merge_partials
from ..kernels.landmarks import score_landmarks
from ..kernels.sparse_reconstruct import sparse_attention
from .budgets import others
from .codecs import owned
from .host_values import HostReader, HostValues, HotChunks
from .interfaces import EncodedLayer, Part, ReadCounter
from .kept_choice import KeptChoice
from .layout import grown_tier, layer_layout, outliers_are_indexed, sinks_are_unrotated, tail_is_unrotated
from .packings import packings, tier_tensors
from .placement import host_placement
from .recall import chunk_mass
from .retrieval import Choice
from .segment import Kit, Segment, Tail

Partial = tuple[Tensor, Tensor]

ROWS_AT_ONCE = 4096  # that are decoded together where a row attends to all


class LayerCache:
    """
    [ sinks | base: sealed prompt rows | grown: blocks sealed here | tail ]    outliers: exact copies of base chunks
      shared between the forks of a prompt    own                    own         shared

    The values of `base` may lie in host memory; each choice then has a hot set of them (`placement`).

    Where evicted rows are demoted, base and demoted rows lie between each other, and blocks are sealed as demoted ones.

    Args:
        lead: the layer that carries the packed rows of this one's group; None for that layer itself.

    Attributes:
        window: width of the layer's sliding window, or None.
        sinks: keys and values [n, Hkv, d].
        outliers: `chunks` int32 [O, Hkv], `k` and `v` [O * chunk, Hkv, d]; empty without outliers.
        outlier_index: int32 [O * chunk, Hkv], where outliers lie; None where no kernel asks.
        base, demoted, grown, tail: as drawn.
        tail_is_unrotated: the tail holds keys before RoPE.
        grown_tier, grown_packing: how blocks are sealed.
    """

    def __init__(self, kit: Kit, encoded: EncodedLayer, lead: LayerCache | None) -> None:
        tensors, layer = encoded.tensors, encoded.layer
        at = layer_layout(kit.recipe, kit.num_prompt_tokens, layer)
        ends = tensors.get(Part.TAIL, {})
        self.kit = kit
        self.window = kit.shape.layer_windows[layer]
        self.sinks = (ends["sink_k"], ends["sink_v"]) if at.num_sinks else None
        self.outliers = dict(tensors.get(Part.OUTLIERS, {}))
        self._packings = packings(kit, tensors.get(Part.BASIS, {}), layer)
        self.grown_tier = grown_tier(kit.recipe, at)
        self.grown_packing = self._packings[self.grown_tier]
        self.tail_is_unrotated = tail_is_unrotated(kit.recipe, at)
        self.base: Segment | None = None
        self.demoted: Segment | None = None
        self.grown: Segment | None = None
        self.hot: HotChunks | None = None
        self._host: HostValues | None = None
        self.kept: KeptChoice | None = None
        self._prepared: Segment | None = None  # the next block of `grown`
        if at.num_sealed:
            positions = tensors.get(Part.POSITIONS, {})
            index = positions.get("rows", positions.get("chunks"))
            self.base = self._prompt_segment(0, at.num_sealed, at.num_sinks, tensors, index, lead)
            if at.num_demoted:
                assert index is not None, "some rows are kept, some are not"
                rest = others(index.long() - at.num_sinks, at.num_sealed + at.num_demoted) + at.num_sinks
                rest = owned(rest, torch.int32)
                self.demoted = self._prompt_segment(1, at.num_demoted, at.num_sinks, tensors, rest, None)
            self._offload(self.base, layer)
            every = kit.recipe.retrieval.select_every
            if every > 1:
                num_chosen = kit.recipe.retrieval.selected_chunks(kit.num_prompt_tokens)
                self.kept = KeptChoice(kit.shape.num_kv_heads, num_chosen, every, self.base.device)
        # tables hold its address; without a window only rows that come back ask where outliers lie
        is_asked = self.window is not None or outliers_are_indexed(kit.recipe, kit.num_prompt_tokens, layer)
        self.outlier_index = self._outlier_positions() if self.outliers and is_asked else None
        dtype = torch.bfloat16 if kit.recipe.window.dtype == "bfloat16" else None
        self.tail = Tail(at.sealed_end, ends.get("k"), ends.get("v"), dtype)

    def _prompt_segment(
        self,
        tier: int,
        num_rows: int,
        begin: int,
        tensors: Mapping[Part, Mapping[str, Tensor]],
        index: Tensor | None,
        lead: LayerCache | None,
    ) -> Segment:
        prefixes = [one.prefix for one in self.kit.recipe.tiers()]
        keys = tier_tensors(tensors.get(Part.KEYS, {}), tier, prefixes)
        values = tier_tensors(tensors.get(Part.VALUES, {}), tier, prefixes)
        if lead is not None:
            assert lead.base is not None, "layers of a group hold the same rows"
            keys, values = keys or dict(lead.base.keys), values or dict(lead.base.values)
        return Segment(self.kit, self._packings[tier], keys, values, num_rows, begin, index)

    def _offload(self, base: Segment, layer: int) -> None:
        """Move the values of the prompt to host memory, where they may lie there."""
        kit = self.kit
        if kit.host is None:
            return
        native = str(next(iter(base.values.values())).dtype).removeprefix("torch.")
        place = host_placement(kit.recipe, kit.shape, kit.num_prompt_tokens, layer, native, kit.host.page_nbytes)
        if place is not None:
            codec, dim = self._packings[0].value_codec, kit.shape.head_dim
            self._host = HostValues(base.values, kit.recipe.retrieval.chunk, place, kit.host)
            base.move_values(HostReader(self._host, codec, dim))
            self.hot = HotChunks(self._host, codec, dim)

    @property
    def host_values(self) -> HostValues | None:
        """The prompt's values, where they lie in host memory."""
        return self._host

    def append(self, k_pre: Tensor, k: Tensor, v: Tensor) -> None:
        """Add generated rows [q, Hkv, d] to the tail."""
        self.tail.append(k_pre if self.tail_is_unrotated else k, v)

    def attend(self, q: Tensor, positions: Tensor, counter: ReadCounter) -> Tensor:
        """q [Q, H, d] at positions int64 [Q] -> [Q, H, d] in q's dtype.

        Counted as read: regions that all rows share once a call, chosen chunks once for each row that chose them.
        """
        return merge_partials(self.parts(q, positions, counter)).to(q.dtype)

    def parts(
        self,
        q: Tensor,
        positions: Tensor,
        counter: ReadCounter,
        is_recalled: bool = False,
        choice: Choice | None = None,
    ) -> list[Partial]:
        """Attention to each region that is there.

        Args:
            is_recalled: the rows are of the prompt, before the tail, and share no choice of chunks with generated ones.
            choice: what `_choose` gave; None = to be chosen.
        """
        parts: list[Partial] = []
        if self.sinks is not None:
            parts.append(self._sink_rows(q, positions, *self.sinks, counter))
        segments = self._segments()
        if self.kit.retrieval is None:
            parts += [self._all_rows(q, positions, segment, counter) for segment in segments]
        elif segments:
            choice = choice or self._choose(q, positions, segments, None if is_recalled else self.kept)
            parts.append(self._chosen_chunks(q, positions, segments, choice, counter))
            if self.outliers:
                parts.append(self._outlier_rows(q, positions, counter))
        if self.tail.num_rows and not is_recalled:
            parts.append(self._tail_rows(q, positions, counter))
        return parts

    def attend_and_weigh(self, q: Tensor, positions: Tensor, counter: ReadCounter) -> tuple[Tensor, Tensor]:
        """`attend`, and how much of their attention the rows give each chunk of the prompt's sealed rows, float32
        [Q, n]. Where steps choose chunks, what they give the chosen ones is shared out by the landmarks' scores."""
        base, choice = self.base, None
        assert base is not None, "a layer that holds every row has sealed some"
        if self.kit.retrieval is None:
            scores = score_landmarks(q, base.rotated_keys())
            if self.window is not None:
                outside = base.row_positions() <= positions[:, None] - self.window
                scores.masked_fill_(outside[:, None], -torch.inf)
        else:
            choice = self._choose(q, positions, self._segments(), self.kept)
            scores = choice.chosen_scores()
        parts = self.parts(q, positions, counter, choice=choice)
        mass = chunk_mass(parts, int(self.sinks is not None), scores)
        return merge_partials(parts).to(q.dtype), mass[:, : base.num_chunks]

    def _segments(self) -> list[Segment]:
        return [segment for segment in (self.base, self.demoted, self.grown) if segment is not None]

    def attend_to_all(self, q: Tensor, positions: Tensor, last: Partial, more: Sequence[Partial] = ()) -> Tensor:
        """`attend` of the tail's last row, as if it had chosen every chunk. Reads, and changes nothing.

        Args:
            q: [1, H, d] at positions int64 [1].
            last: key and value [1, Hkv, d] that stand for the tail's last row.
            more: of its attention, to what lies elsewhere.
        """
        counter, parts, segments = ReadCounter(), list(more), self._segments()
        if self.sinks is not None:
            parts.append(self._sink_rows(q, positions, *self.sinks, counter))
        if self.kit.retrieval is None:
            parts += [self._all_rows(q, positions, segment, counter) for segment in segments]
        elif segments:
            parts += self._every_chunk(q, positions, segments)
            if self.outliers:
                parts.append(self._outlier_rows(q, positions, counter))
        parts.append(self._tail_rows(q, positions, counter, last))
        return merge_partials(parts).to(q.dtype)

    def read_nbytes(self) -> int:
        """Bytes that one query reads, but for those of the tail."""
        count: int = sum(t.nbytes for t in (*(self.sinks or ()), *self.outliers.values()))
        segments = self._segments()
        if self.kit.retrieval is None:
            return count + sum(sum(t.nbytes for t in one.tensors()) + one.basis_nbytes for one in segments)
        if not segments:
            return count
        first, num_chunks = segments[0], sum(one.num_chunks for one in segments)
        num_chunks -= len(self.outliers.get("chunks", ()))
        chosen = min(self.kit.recipe.retrieval.selected_chunks(self.kit.num_prompt_tokens), num_chunks)
        of_chunk = first.key_reader.chunk_nbytes + first.value_reader.chunk_nbytes
        count += chosen * self.kit.shape.num_kv_heads * of_chunk + first.basis_nbytes
        count += sum(t.nbytes for one in segments for t in one.summary.values())
        return count + sum(0 if one.index is None else one.index.nbytes for one in segments)

    def seal(self, end: int) -> None:
        """Seal the tail's blocks up to position `end`, one by one, or forget them under a fixed budget."""
        block = self.kit.recipe.block
        if self.kit.recipe.budget.fixed:
            if end > self.tail.begin:
                self.tail.drop_first(end - self.tail.begin)
            return
        while self.tail.begin + block <= end:
            sealed, self._prepared = self._prepared or self._packed_block(), None
            if self.grown is None:
                self.grown = sealed
            else:
                self.grown.extend(sealed)
            self.tail.drop_first(block)

    def prepare_seal(self) -> bool:
        """Pack the block that is sealed next, if its rows are all here and nobody has. Returns whether it did.

        The tail keeps the rows until they are sealed, so nothing that is attended to changes. The tail's last row may
        be one that the device is still writing, so it is never part of the block."""
        if self._prepared is not None or self.tail.num_rows <= self.kit.recipe.block:
            return False
        self._prepared = self._packed_block()
        return True

    def _packed_block(self) -> Segment:
        """The tail's first block as it is sealed."""
        block, packing = self.kit.recipe.block, self.grown_packing
        # copies, as a codec may keep rows that the tail is going to write over
        k, v = (rows[:block].clone() for rows in self.tail.rows())
        keys = packing.key_codec.encode(k, packing.key_basis, self.kit.summed)
        values = packing.value_codec.encode(v, packing.value_basis, self.kit.summed)
        return Segment(self.kit, packing, keys, values, block, self.tail.begin)

    def fork(self) -> LayerCache:
        """A layer over the same prompt with a tail and sealed blocks of its own."""
        twin = object.__new__(LayerCache)
        twin.__dict__.update(self.__dict__)
        twin.grown = None if self.grown is None else self.grown.copy()
        twin.tail = self.tail.copy()
        twin.hot = None if self.hot is None else self.hot.cold()
        twin.kept = None if self.kept is None else self.kept.copy()
        twin._prepared = None
        return twin

    def shared_tensors(self) -> Iterator[Tensor]:
        """What the prompt made."""
        for packing in self._packings:
            yield from packing.tensors()
        yield from self.sinks or ()
        yield from self.outliers.values()
        if self.outlier_index is not None:
            yield self.outlier_index
        for segment in (self.base, self.demoted):
            if segment is not None:
                yield from segment.tensors()
        if self._host is not None:
            yield self._host.pages

    def own_tensors(self) -> Iterator[Tensor]:
        """What this choice appended, its copy of the prompt's tail, its hot set and what it chose last."""
        if self.kept is not None:
            yield from self.kept.tensors()
        if self.hot is not None:
            yield from self.hot.tensors()
        if self.grown is not None:
            yield from self.grown.tensors()
        if self._prepared is not None:
            yield from self._prepared.tensors()
        yield from self.tail.tensors()

    def _sink_rows(self, q: Tensor, positions: Tensor, k: Tensor, v: Tensor, counter: ReadCounter) -> Partial:
        counter.bytes_read += k.nbytes + v.nbytes
        at = torch.arange(len(k), device=q.device)
        if sinks_are_unrotated(self.kit.recipe):
            at = at + (self.tail.begin - len(k))
            k = self.kit.rope(k.to(q.dtype), at)
        return attention_partial(q, k.transpose(0, 1), v.transpose(0, 1), at, positions, self.window)

    def _tail_rows(self, q: Tensor, positions: Tensor, counter: ReadCounter, last: Partial | None = None) -> Partial:
        k, v = self.tail.rows()
        if last is not None:
            k, v = (torch.cat((rows[:-1], row.to(rows.dtype))) for rows, row in zip((k, v), last, strict=True))
        at = torch.arange(self.tail.begin, self.tail.end, device=q.device)
        counter.bytes_read += k.nbytes + v.nbytes
        if self.tail_is_unrotated:
            k = self.kit.rope(k.to(q.dtype), at)
        return attention_partial(q, k.transpose(0, 1), v.transpose(0, 1), at, positions, self.window)

    def _all_rows(self, q: Tensor, positions: Tensor, segment: Segment, counter: ReadCounter) -> Partial:
        counter.bytes_read += sum(t.nbytes for t in segment.tensors()) + segment.basis_nbytes
        k, v = segment.rotated_keys(), segment.value_reader.read_all()
        at = segment.row_positions()
        return attention_partial(q, k.transpose(0, 1), v.transpose(0, 1), at, positions, self.window)

    def _outlier_positions(self) -> Tensor:
        """int32 [O * chunk, Hkv]."""
        assert self.base is not None
        first = self.base.chunk_positions(self.outliers["chunks"].long())
        within = torch.arange(self.kit.recipe.retrieval.chunk, device=first.device)
        return (first[:, None] + within[:, None]).flatten(0, 1).int()

    def _outlier_rows(self, q: Tensor, positions: Tensor, counter: ReadCounter) -> Partial:
        counter.bytes_read += self.outliers["chunks"].nbytes
        k, v = self.outliers["k"], self.outliers["v"]
        counter.bytes_read += k.nbytes + v.nbytes
        at = self._outlier_positions().T
        return attention_partial(q, k.transpose(0, 1), v.transpose(0, 1), at, positions, self.window)

    def _choose(self, q: Tensor, positions: Tensor, segments: list[Segment], kept: KeptChoice | None) -> Choice:
        retrieval, heads = self.kit.retrieval, self.kit.shape.num_kv_heads
        assert retrieval is not None, "asked for where chunks are chosen"
        scores = torch.cat([retrieval.score(q, segment.summary) for segment in segments], dim=-1)
        hidden = self._hidden_chunks(positions, segments)
        chosen, valid = retrieval.select(scores, heads, hidden, self.kit.num_prompt_tokens)
        if kept is not None:
            chosen, valid = kept.settle(positions, chosen, valid)
        return Choice(scores, chosen, valid)

    def _chosen_chunks(
        self, q: Tensor, positions: Tensor, segments: list[Segment], choice: Choice, counter: ReadCounter
    ) -> Partial:
        chosen, valid = choice.chunks, choice.valid
        readers = (segments[0].key_reader, segments[0].value_reader)
        num_read = chosen.numel() if valid is None else int(valid.sum())
        counter.bytes_read += num_read * sum(reader.chunk_nbytes for reader in readers)
        counter.bytes_read += segments[0].basis_nbytes
        for segment in segments:
            counter.bytes_read += sum(t.nbytes for t in segment.summary.values())
            counter.bytes_read += 0 if segment.index is None else segment.index.nbytes
        chunked = [segment.chunked() for segment in segments]
        return sparse_attention(q, positions, chosen, valid, chunked, self.kit.recipe.retrieval.chunk, self.window)

    def _every_chunk(self, q: Tensor, positions: Tensor, segments: list[Segment]) -> list[Partial]:
        """Attention to all chunks, some at a time, so that few are decoded at once."""
        chunk, heads = self.kit.recipe.retrieval.chunk, self.kit.shape.num_kv_heads
        hidden = self._hidden_chunks(positions, segments)
        chunked = [segment.chunked() for segment in segments]
        num_chunks, at_once = sum(segment.num_chunks for segment in segments), max(1, ROWS_AT_ONCE // chunk)
        parts = []
        for begin in range(0, num_chunks, at_once):
            every = torch.arange(begin, min(begin + at_once, num_chunks), device=q.device)
            valid = None if hidden is None else ~hidden[..., begin : begin + at_once]
            chosen = every.expand(len(q), heads, -1).contiguous()
            parts.append(sparse_attention(q, positions, chosen, valid, chunked, chunk, self.window))
        return parts

    def _hidden_chunks(self, positions: Tensor, segments: list[Segment]) -> Tensor | None:
        """bool [Q, Hkv, n]: chunks without a row that the query may see, and outliers, which it sees anyway.
        None when there are none of either."""
        if self.window is None and not self.outliers and int(positions.min()) >= self.tail.begin:
            return None
        chunk = self.kit.recipe.retrieval.chunk
        first = torch.cat([s.chunk_positions(torch.arange(s.num_chunks, device=positions.device)) for s in segments])
        hidden = first > positions[:, None]
        if self.window is not None:
            hidden |= first + (chunk - 1) <= positions[:, None] - self.window
        hidden = hidden[:, None].repeat(1, self.kit.shape.num_kv_heads, 1)
        if self.outliers:
            outliers = self.outliers["chunks"].long().T
            hidden.scatter_(-1, outliers.expand(len(positions), -1, -1), True)
        return hidden
