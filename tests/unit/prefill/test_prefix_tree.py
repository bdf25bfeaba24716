"""Which prefixes are kept and which make room: policy over keys and bytes."""

from __future__ import annotations

import random

import pytest

from kvsluice.services.prefill.prefix_tree import Node, PrefixTree
from kvsluice.services.prefill.regions import ALIGN, Region, Regions

SIZE = 2 * ALIGN  # of a chunk


def put(tree: PrefixTree, salt: str, keys: str, size: int = SIZE) -> Node:
    """Fill a chain as a prompt does; returns its end, which nobody holds."""
    held = tree.root(salt)
    found = tree.follow(held, keys)
    if found:
        tree.hold(found[-1])
        tree.release(held)
        held = found[-1]
    for key in keys[len(found) :]:
        regions = tree.reserve([size])
        if not regions:
            break
        node = tree.add(held, key, regions[0])
        tree.hold(node)
        tree.release(held)
        held = node
    tree.release(held)
    tree.check_integrity()
    return held


def known(tree: PrefixTree, salt: str, keys: str) -> int:
    """How many of the keys, from the first on, are found."""
    root = tree.root(salt)
    found = len(tree.follow(root, keys))
    root.holders -= 1  # unlike `release`, this does not count as a use
    tree._drop_if_bare(root)
    tree.check_integrity()
    return found


def test_a_chain_is_found_as_far_as_it_is_the_same() -> None:
    tree = PrefixTree(16 * SIZE)
    put(tree, "a", "doc1")
    assert [known(tree, "a", keys) for keys in ("doc1", "doc2", "do", "od", "doc1more", "")] == [4, 3, 2, 0, 4, 0]


def test_other_salts_find_nothing() -> None:
    tree = PrefixTree(16 * SIZE)
    put(tree, "a", "doc")
    assert known(tree, "b", "doc") == 0
    put(tree, "b", "doc")
    assert tree.used_bytes == 6 * SIZE, "each has its own"


def test_what_was_used_longest_ago_makes_room_leaves_first() -> None:
    tree = PrefixTree(6 * SIZE)
    put(tree, "a", "abc")
    put(tree, "a", "xyz")
    put(tree, "a", "abc")  # used again: now the other is older
    put(tree, "a", "m")
    assert [known(tree, "a", keys) for keys in ("abc", "xyz", "m")] == [3, 2, 1]
    put(tree, "a", "no")
    assert [known(tree, "a", keys) for keys in ("abc", "xyz", "m", "no")] == [3, 0, 1, 2]
    assert tree.num_dropped == 3


def test_a_chunk_in_the_middle_stays_while_there_is_one_behind_it() -> None:
    tree = PrefixTree(3 * SIZE)
    put(tree, "a", "ab")
    put(tree, "a", "ac")  # the branch at `a`
    put(tree, "a", "x")
    assert [known(tree, "a", keys) for keys in ("ab", "ac", "x")] == [1, 2, 1]


def test_what_is_held_stays_and_all_above_it() -> None:
    tree = PrefixTree(3 * SIZE)
    end = put(tree, "a", "abc")
    tree.hold(end)
    assert tree.reserve([SIZE]) == []
    assert (known(tree, "a", "abc"), tree.num_dropped) == (3, 0), "nothing is dropped in vain"
    tree.release(end)
    (region,) = tree.reserve([2 * SIZE])
    assert known(tree, "a", "abc") == 1
    tree.free(region)
    tree.check_integrity()


def test_more_than_there_ever_is_drops_nothing() -> None:
    tree = PrefixTree(3 * SIZE)
    put(tree, "a", "abc")
    assert tree.reserve([4 * SIZE]) == []
    assert known(tree, "a", "abc") == 3


def test_room_is_made_for_as_many_as_there_ever_is() -> None:
    tree = PrefixTree(5 * SIZE)
    put(tree, "a", "abc")
    held = put(tree, "a", "xy")
    tree.hold(held)
    regions = tree.reserve([SIZE, SIZE, SIZE, SIZE])
    assert len(regions) == 3
    assert [known(tree, "a", keys) for keys in ("abc", "xy")] == [0, 2]
    for region in regions:
        tree.free(region)
    tree.release(held)
    tree.check_integrity()
    assert tree.used_bytes == 2 * SIZE


def test_nothing_is_dropped_where_what_is_held_lies_in_between() -> None:
    tree = PrefixTree(5 * SIZE)
    put(tree, "a", "ab")
    held = put(tree, "b", "x")  # in the middle
    put(tree, "c", "cd")
    tree.hold(held)
    assert tree.reserve([3 * SIZE]) == [] and tree.num_dropped == 0, "four are free at best, in two pieces"
    first, second = tree.reserve([2 * SIZE, 2 * SIZE, SIZE])
    assert [known(tree, salt, keys) for salt, keys in (("a", "ab"), ("b", "x"), ("c", "cd"))] == [0, 1, 0]
    for region in (first, second):
        tree.free(region)
    tree.release(held)
    tree.check_integrity()


def test_of_two_that_fill_the_same_chunk_the_first_counts() -> None:
    tree = PrefixTree(4 * SIZE)
    root = tree.root("a")
    first, second = tree.reserve([SIZE, SIZE])
    node = tree.add(root, "k", first)
    assert tree.add(root, "k", second) is node
    assert node.region == first and tree.used_bytes == SIZE
    tree.release(root)
    tree.check_integrity()


class Colliding(bytes):
    """A key whose hash is that of every other."""

    def __hash__(self) -> int:
        return 7

    def __eq__(self, other: object) -> bool:
        return bytes(self) == bytes(other) if isinstance(other, bytes) else NotImplemented


def test_keys_of_the_same_hash_are_told_apart() -> None:
    tree = PrefixTree(4 * SIZE)
    root = tree.root("a")
    nodes = {}
    for text in (b"one", b"two"):
        (region,) = tree.reserve([SIZE])
        nodes[text] = tree.add(root, Colliding(text), region)
    assert [tree.follow(root, [Colliding(text)]) for text in (b"one", b"two")] == [[nodes[b"one"]], [nodes[b"two"]]]
    assert tree.follow(root, [Colliding(b"three")]) == []
    tree.release(root)
    tree.check_integrity()


def test_a_tree_that_is_empty_is_forgotten() -> None:
    tree = PrefixTree(2 * SIZE)
    for number in range(50):
        put(tree, f"tenant-{number}", "k")
        known(tree, f"guest-{number}", "k")
    assert len(tree._roots) == 2


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_uses_keeps_every_byte_accounted_for(seed: int) -> None:
    draw = random.Random(seed)
    tree, held = PrefixTree(40 * ALIGN), []
    for _ in range(400):
        end = put(
            tree, draw.choice("ab"), "".join(draw.choices("xyz", k=draw.randint(1, 5))), draw.randint(1, 6 * ALIGN)
        )
        if draw.random() < 0.2 and end.region is not None:
            tree.hold(end)
            held.append(end)
        if len(held) > 3:
            tree.release(held.pop(draw.randrange(len(held))))
    for node in held:
        tree.release(node)
    tree.check_integrity()
    assert 0 < tree.used_bytes <= tree.capacity_bytes


def test_regions_that_are_given_back_join() -> None:
    regions = Regions(10 * ALIGN + 5)
    taken = [regions.take(1) for _ in range(10)]
    assert regions.take(1) is None and None not in taken
    for index in (3, 5, 4, 0, 9):
        regions.give_back(taken[index])
    rest = [taken[index] for index in (1, 2, 6, 7, 8)]
    regions.check_integrity(rest)
    assert regions.take(3 * ALIGN) == Region(3 * ALIGN, 6 * ALIGN)
    assert regions.take(3 * ALIGN) is None, "free, but not in one piece"
    with pytest.raises(AssertionError):
        regions.check_integrity(rest)
