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

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from .regions import Region, Regions, aligned

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

    def reserve(self, num_bytes: int) -> Region | None:
        """Room for a chunk, at the cost of what was used longest ago. None, and nothing is dropped, where what is held
        leaves too little; also None where what is free lies too scattered."""
        if aligned(num_bytes) > self._regions.free_bytes + self._droppable_bytes():
            return None
        while (region := self._regions.take(num_bytes)) is None:
            leaf = min(self._leaves(), key=lambda node: node.used, default=None)
            if leaf is None:
                return None
            self._drop(leaf)
        self._reserved.add(region)
        return region

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

    def _leaves(self) -> Iterator[Node]:
        return (n for n in self._nodes() if n.parent is not None and not n.children and not n.holders)

    def _droppable_bytes(self) -> int:
        """Of chunks with nobody who holds them or one below them."""
        nodes = list(self._nodes())
        kept: set[Node] = set()
        for node in nodes:
            above: Node | None = node if node.holders else None
            while above is not None and above not in kept:
                kept.add(above)
                above = above.parent
        return sum(node.region.num_bytes for node in nodes if node.region is not None and node not in kept)

    def _drop(self, leaf: Node) -> None:
        assert leaf.parent is not None and leaf.region is not None and not leaf.children and not leaf.holders
        del leaf.parent.children[leaf.key]
        self._regions.give_back(leaf.region)
        self.num_dropped += 1
        self._drop_if_bare(leaf.parent)

    def _drop_if_bare(self, node: Node) -> None:
        if node.parent is None and not node.children and not node.holders:
            self._roots.pop(node.key, None)
