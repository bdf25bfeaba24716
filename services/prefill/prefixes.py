"""Prompts of one tenant that begin alike share what prefill computes of their beginning.

Kept are chunks of a prompt's rows on the grid of work items, each with what does not depend on what follows it:

    k [S, c, Hkv, d], v [S, c, Hkv, d]   keys before RoPE and values of the layers that all rows pass
    mass [S, Hkv, end]                   attention that the chunk's queries gave to rows [0, end), end = the chunk's
    peak [S, Hkv, d]                     the largest queries of the chunk
    hidden [c, D]                        rows behind the last of those S layers, where it lets only some go on

S is every layer, or those up to TSP's. Mass and peak are there where the recipe asks for them. What a recipe chooses,
packs or sends is not kept, so recipes that pass the same layers and ask for the same share chunks. RoPE is applied
again: the same angles and the same rows give the same bits. Mass is added up again chunk by chunk, in the order in
which a prompt that runs whole adds it.

A hit ends on the grid, before the last row and the rows whose queries a recipe wants to see. Rows behind it run in the
same work items as if all ran, so a hit's numbers differ from a miss's by no more than a pack's other rows make them
differ anyway. Where RoPE depends on the prompt's length nothing is shared.

    open ── look, while it waits ──> start ── load, keep … settle ──> close
    holds the chunks found           reserves room for the chunks     the last shared layer makes them known;
                                     behind them                      room of what did not come so far is given back

Two prompts that fill the same chunks at once both compute them; the first one's count.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...compression import make_compressor
from ...compression.interfaces import LayerObs
from ...compression.recipe import ModelShape, Recipe
from ...compression.shared_layers import num_shared_layers
from ...kernels.rope import apply_rope
from ...models.model import Model
from .prefix_memory import PrefixMemory
from .prefix_tree import Key, Node, PrefixTree
from .regions import Region, aligned


@dataclass(frozen=True)
class Kept:
    """What is kept of each chunk; prompts that keep the same share.

    Attributes:
        layers: S, those that all rows pass.
        hidden, mass, peak: whether chunks have these.
    """

    layers: int
    hidden: bool
    mass: bool
    peak: bool


@dataclass(frozen=True)
class ChunkViews:
    """A chunk's tensors in the arena; see the module."""

    k: Tensor
    v: Tensor
    mass: Tensor | None
    peak: Tensor | None
    hidden: Tensor | None


def make_prefix_cache(
    model: Model, shape: ModelShape, chunk_tokens: int, memory: PrefixMemory | None
) -> PrefixCache | None:
    """None where there is no memory for it, or RoPE depends on a prompt's length: nothing is shared there."""
    if memory is None or not memory.num_bytes or model.fixed_frequencies is None:
        return None
    return PrefixCache(model, shape, chunk_tokens, memory)


class PrefixCache:
    """The kept chunks of one engine.

    Args:
        model: whose chunks they are; RoPE that does not depend on a prompt's length, and no other ranks.
        shape: its shape.
        chunk_tokens: rows of the engine's work items.
        memory: where chunks lie.

    Attributes:
        tree: which chunks there are.
    """

    def __init__(self, model: Model, shape: ModelShape, chunk_tokens: int, memory: PrefixMemory) -> None:
        assert model.fixed_frequencies is not None, "keys of a prefix do not depend on what follows"
        assert model.ranks is None, "chunks have all heads"
        self.model, self.chunk_tokens, self.memory = model, chunk_tokens, memory
        self.tree = PrefixTree(memory.num_bytes)
        self._shape = shape

    def open(self, tenant: str, prompt_ids: Sequence[int], recipe: Recipe) -> PromptPrefix | None:
        """What a prompt may find and leave; None where it has no whole chunk. Its user closes it.

        Args:
            recipe: resolved for the prompt.
        """
        chunk, num_tokens = self.chunk_tokens, len(prompt_ids)
        if num_tokens < chunk:
            return None
        compressor = make_compressor(recipe, self._shape)
        layers = num_shared_layers(recipe, num_tokens, self._shape.num_layers)
        kept = Kept(layers, layers < self._shape.num_layers, compressor.wants_mass, compressor.wants_query_peak)
        window = max(1, *(compressor.query_window(layer) for layer in range(layers)))
        keys = [
            array("i", prompt_ids[begin : begin + chunk]).tobytes() for begin in range(0, num_tokens - chunk + 1, chunk)
        ]
        return PromptPrefix(self, (tenant, kept), kept, keys, max(0, num_tokens - window) // chunk)

    def chunk_bytes(self, kept: Kept, index: int) -> int:
        """Of the prompt's `index`-th chunk."""
        return sum(aligned(size) for _, _, size in self._specs(kept, index))

    def views(self, kept: Kept, index: int, region: Region) -> ChunkViews:
        """The tensors of the prompt's `index`-th chunk in its region."""
        memory, at, views = self.memory.view(region), 0, []
        for shape, dtype, size in self._specs(kept, index):
            views.append(memory[at : at + size].view(dtype).view(shape) if size else None)
            at += aligned(size)
        k, v, mass, peak, hidden = views
        assert k is not None and v is not None
        return ChunkViews(k, v, mass, peak, hidden)

    def _specs(self, kept: Kept, index: int) -> list[tuple[tuple[int, ...], torch.dtype, int]]:
        """Shape, dtype and bytes of a chunk's tensors, in order; 0 bytes = it has none."""
        config, chunk, native = self.model.config, self.chunk_tokens, self.model.dtype
        heads, dim = config.num_kv_heads, config.head_dim
        rows, single = (kept.layers, chunk, heads, dim), torch.float32
        specs = (
            (rows, native, True),
            (rows, native, True),
            ((kept.layers, heads, (index + 1) * chunk), single, kept.mass),
            ((kept.layers, heads, dim), single, kept.peak),
            ((chunk, config.hidden_size), native, kept.hidden),
        )
        return [(shape, dtype, math.prod(shape) * dtype.itemsize * has) for shape, dtype, has in specs]


class PromptPrefix:
    """What one prompt has found, and what it leaves. Called from the engine's thread.

    Attributes:
        kept: what chunks have; in the first `kept.layers` layers no row that was found runs.
    """

    def __init__(self, cache: PrefixCache, salt: Key, kept: Kept, keys: Sequence[Key], most_found: int) -> None:
        self.kept = kept
        self._cache, self._tree = cache, cache.tree
        self._keys, self._most_found = keys, most_found
        self._held: Node | None = self._tree.root(salt)  # and with it the chunks found, which are above it
        self._found: list[ChunkViews] = []
        self._filled: dict[int, tuple[Region, ChunkViews]] = {}  # by the chunk's index, until they are known
        self._seen = -1
        self.look()

    @property
    def num_rows(self) -> int:
        """Rows that were found."""
        return len(self._found) * self._cache.chunk_tokens

    def look(self) -> bool:
        """Look again, for a prompt that has not started. Returns whether there is more than before."""
        assert self._held is not None, "not closed"
        if self._seen == self._tree.version:
            return False
        self._seen = self._tree.version
        more = self._tree.follow(self._held, self._keys[len(self._found) : self._most_found])
        for node in more:
            assert node.region is not None, "a chunk has a region"
            self._found.append(self._cache.views(self.kept, len(self._found), node.region))
            self._hold(node)
        return bool(more)

    def start(self) -> None:
        """The prompt's first item is about to run: reserve room for chunks that are not known, as far as it goes."""
        assert self._held is not None, "not closed"
        # what is known of the rows that run all the same need not be kept again
        known = self._tree.follow(self._held, self._keys[len(self._found) :])
        if known:
            self._hold(known[-1])
        first = len(self._found) + len(known)
        sizes = [self._cache.chunk_bytes(self.kept, index) for index in range(first, len(self._keys))]
        for index, region in enumerate(self._tree.reserve(sizes), first):
            self._filled[index] = (region, self._cache.views(self.kept, index, region))

    def load(self, obs: LayerObs) -> None:
        """Put what was found of a shared layer into its buffers, of all the prompt's rows."""
        if obs.layer >= self.kept.layers or not self._found:
            return
        chunk, memory = self._cache.chunk_tokens, self._cache.memory
        keys = obs.k_pre if len(obs.k_pre) else obs.k  # turned in place where nobody wants them unturned
        pairs: list[tuple[Tensor, Tensor]] = []
        masses, peaks = [], []
        for index, views in enumerate(self._found):
            rows = slice(index * chunk, (index + 1) * chunk)
            pairs += [(views.k[obs.layer], keys[rows]), (views.v[obs.layer], obs.v[rows])]
            if views.mass is not None and obs.mass is not None:
                masses.append(obs.mass.new_empty(views.mass[obs.layer].shape))
                pairs.append((views.mass[obs.layer], masses[-1]))
            if views.peak is not None and obs.query_peak is not None:
                peaks.append(torch.empty_like(obs.query_peak))
                pairs.append((views.peak[obs.layer], peaks[-1]))
        memory.load(pairs)
        for begin in range(0, self.num_rows, chunk):
            rows = slice(begin, begin + chunk)
            cos, sin = self._cache.model.rope_tables(obs.positions[rows], obs.num_prompt_tokens)
            obs.k[rows] = apply_rope(keys[rows], cos, sin)
        for mass in masses:
            assert obs.mass is not None
            obs.mass[:, : mass.shape[1]].add_(mass)
        for peak in peaks:
            assert obs.query_peak is not None
            torch.maximum(obs.query_peak, peak, out=obs.query_peak)

    def keep(self, layer: int, begin: int, end: int, k_pre: Tensor, v: Tensor, peak: Tensor | None) -> None:
        """Keep an item's keys before RoPE and values [end - begin, Hkv, d], and its own largest queries [Hkv, d]. Again
        where the item runs again."""
        views = self._place(layer, begin, end)
        if views is None:
            return
        pairs = [(k_pre, views.k[layer]), (v, views.v[layer])]
        if views.peak is not None:
            assert peak is not None
            pairs.append((peak, views.peak[layer]))
        self._cache.memory.save(pairs)

    def keep_mass(self, layer: int, begin: int, end: int, mass: Tensor) -> None:
        """Keep the attention [Hkv, end] that an item's queries gave."""
        views = self._place(layer, begin, end)
        if views is not None and views.mass is not None:
            self._cache.memory.save([(mass, views.mass[layer])])

    def settle(self, layer: int, hidden: Tensor) -> None:
        """A layer of the prompt is final. Behind the last shared one, found rows go into `hidden` [n, D], those that
        were computed are kept, and the chunks are made known."""
        if layer + 1 != self.kept.layers or self._held is None:
            return
        if self.kept.hidden:
            memory = self._cache.memory
            memory.load(self._hidden_pairs(enumerate(self._found), hidden))
            filled = [(index, views) for index, (_, views) in self._filled.items()]
            memory.save([(here, there) for there, here in self._hidden_pairs(filled, hidden)])
        for index in sorted(self._filled):
            region, _ = self._filled.pop(index)
            self._hold(self._tree.add(self._held, self._keys[index], region))
        self.close()

    def close(self) -> None:
        """Let go of everything; what is not known by now is given up. Without effect the second time."""
        if self._held is None:
            return
        for region, _ in self._filled.values():
            self._tree.free(region)
        self._filled.clear()
        self._tree.release(self._held)
        self._held = None

    def _hold(self, node: Node) -> None:
        assert self._held is not None
        self._tree.hold(node)
        self._tree.release(self._held)
        self._held = node

    def _place(self, layer: int, begin: int, end: int) -> ChunkViews | None:
        """Where an item's rows are kept; None where they are not."""
        chunk = self._cache.chunk_tokens
        place = self._filled.get(begin // chunk)
        if layer >= self.kept.layers or place is None:
            return None
        assert begin % chunk == 0 and end - begin == chunk, "items lie on the grid of chunks"
        return place[1]

    def _hidden_pairs(self, chunks: Iterable[tuple[int, ChunkViews]], hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Chunks' hidden rows: (in the arena, in the prompt)."""
        size, pairs = self._cache.chunk_tokens, []
        for index, views in chunks:
            assert views.hidden is not None, "asked for by `kept`"
            pairs.append((views.hidden, hidden[index * size : (index + 1) * size]))
        return pairs
