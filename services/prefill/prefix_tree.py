"""Which chunks of which prompts are kept, and which make room. Pure policy, free of torch.

    salt ── chunk ── chunk ── chunk          one tree a salt; a node is a chunk of token ids behind the chunks above it,
                 └── chunk ── chunk          and has a region of memory with what prefill computed for its rows

A chunk is found by its key below its parent, so a chain of keys names a whole prefix: what lies in another tree, or
behind other tokens, is never met. Keys are compared, not only hashed: a hash that falls together with another key's is
a miss. Room is made by dropping leaves, the one used longest ago first; what somebody holds stays, and with it all
above it.

Owner and freer of every region: a node's is the tree's, freed by `reserve` when the node is dropped; one that `reserve`
gave out is the caller's, who either makes a node of it (`add`) or gives it back (`free`).
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from .regions import Region, Regions

Key = Hashable


@dataclass(eq=False)
class Node:
    """A chunk, or the root of a tree (which has no region).

    Attributes:
        holders: how many use it now.
        used: when it was last; larger is later.
    """

    key: Key
    parent: Node | None
    region: Region | None
    children: dict[Key, Node] = field(default_factory=dict)
    holders: int = 0
    used: int = 0


class PrefixTree:
    """All kept chunks of a worker.

    Args:
        capacity_bytes: of memory for regions.

    Attributes:
        version: grows when a chunk is added: what was not found before may be there now.
        num_dropped: chunks that have made room.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._regions = Regions(capacity_bytes)
        self._roots: dict[Key, Node] = {}
        self._reserved: set[Region] = set()
        self._clock = 0
        self.version = 0
        self.num_dropped = 0

    @property
    def capacity_bytes(self) -> int:
        return self._regions.size_bytes

    @property
    def used_bytes(self) -> int:
        """Of nodes, and of what is reserved."""
        return self._regions.size_bytes - self._regions.free_bytes

    def root(self, salt: Key) -> Node:
        """The tree of a salt, held; given back by `release`."""
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = Node(salt, None, None)
        root.holders += 1
        return root

    def follow(self, node: Node, keys: Sequence[Key]) -> list[Node]:
        """The longest chain of nodes below `node` that have the first of these keys."""
        chain: list[Node] = []
        for key in keys:
            below = node.children.get(key)
            if below is None:
                break
            chain.append(below)
            node = below
        return chain

    def hold(self, node: Node) -> None:
        """Keep a node, and all above it, until it is released as often as it is held."""
        node.holders += 1

    def release(self, node: Node) -> None:
        """Give back a hold. Who held it has used it, and all above it, now."""
        assert node.holders > 0, "released as often as it was held"
        node.holders -= 1
        self._clock += 1
        above: Node | None = node
        while above is not None:
            above.used = self._clock
            above = above.parent
        self._drop_if_bare(node)

    def reserve(self, sizes: Sequence[int]) -> list[Region]:
        """Room for the first of chunks of these sizes in bytes, for as many as there is room, at the cost of what was
        used longest ago. Nothing is dropped for a chunk that what is held leaves too little for in one piece.

        Args:
            sizes: none smaller than the one before.
        """
        regions: list[Region] = []
        leaves: list[tuple[int, int, Node]] | None = None
        staying: list[Region] = []
        before = 0  # of what stays, that lies before the first piece of it that is large enough
        for size in sizes:
            region = self._regions.take(size)
            if region is None and leaves is None:
                leaves, staying = self._leaves(), self._staying()
            if region is None:
                place = self._regions.room_between(size, staying, before)
                if place is None:
                    break
                before = place
            while region is None and leaves:
                self._drop(heapq.heappop(leaves)[-1], leaves)
                region = self._regions.take(size)
            assert region is not None, "all that may go leaves room for it"
            self._reserved.add(region)
            regions.append(region)
            if leaves is not None:
                insort(staying, region)
        return regions

    def free(self, region: Region) -> None:
        """Give back what was reserved."""
        self._reserved.remove(region)
        self._regions.give_back(region)

    def add(self, parent: Node, key: Key, region: Region) -> Node:
        """Make a chunk of a reserved region known. Where it is there already, that one counts, and the region is
        given back."""
        self._clock += 1
        node = parent.children.get(key)
        if node is not None:
            self.free(region)
        else:
            self._reserved.remove(region)
            node = parent.children[key] = Node(key, parent, region)
            self.version += 1
        node.used = self._clock
        return node

    def check_integrity(self) -> None:
        """Assert that every byte is free, reserved, or a node's, and that nodes know each other."""
        taken = list(self._reserved)
        for node in self._nodes():
            assert node.holders >= 0, "released as often as held"
            assert (node.region is None) == (node.parent is None), "a chunk has a region, a root has none"
            assert node.parent is not None or node.children or node.holders, "a bare tree is forgotten"
            if node.region is not None:
                taken.append(node.region)
            for key, child in node.children.items():
                assert child.parent is node and child.key == key, "a chunk is where its key says"
        self._regions.check_integrity(taken)

    def _nodes(self) -> Iterator[Node]:
        waiting = list(self._roots.values())
        while waiting:
            node = waiting.pop()
            waiting += node.children.values()
            yield node

    def _leaves(self) -> list[tuple[int, int, Node]]:
        """A heap of the chunks that can be dropped now, the one used longest ago first; numbers tell ties apart."""
        found = [(node.used, number, node) for number, node in enumerate(self._nodes()) if _is_free(node)]
        heapq.heapify(found)
        return found

    def _staying(self) -> list[Region]:
        """What is reserved, and chunks that somebody holds, or one below them; sorted."""
        kept: set[Node] = set()
        for node in self._nodes():
            above: Node | None = node if node.holders else None
            while above is not None and above not in kept:
                kept.add(above)
                above = above.parent
        return sorted([*self._reserved, *(node.region for node in kept if node.region is not None)])

    def _drop(self, leaf: Node, leaves: list[tuple[int, int, Node]]) -> None:
        """Forget a chunk; the one above it may be a leaf now."""
        above, region = leaf.parent, leaf.region
        assert above is not None and region is not None and _is_free(leaf)
        del above.children[leaf.key]
        self._regions.give_back(region)
        self.num_dropped += 1
        if _is_free(above):
            heapq.heappush(leaves, (above.used, -self.num_dropped, above))
        self._drop_if_bare(above)

    def _drop_if_bare(self, node: Node) -> None:
        if node.parent is None and not node.children and not node.holders:
            self._roots.pop(node.key, None)


def _is_free(node: Node) -> bool:
    return node.parent is not None and not node.children and not node.holders
