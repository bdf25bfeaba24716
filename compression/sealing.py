"""Sealing of many choices at once: what is due in all of them is packed by a few launches.

    rows are ready ──pack_blocks──> packed behind the rows that are sealed ··· the block is due ──seal──> counted

The memory that blocks go to is there before (`rooms`), so sealing a block that was packed ahead moves numbers alone.
What a block's bits are depends neither on when it is packed nor on what is packed with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels.dispatch import TRITON, runs
from ..kernels.seal import MOVE_FIELDS, SEAL_FIELDS, SealKey, move_rows, seal_blocks
from .layout import sealed_end
from .rooms import NUM_PLACES, GrownRoom, Numbers, seal_key
from .segment import Kit, Tail

if TYPE_CHECKING:
    from .interfaces import SequenceCache
    from .layer_cache import LayerCache

Angles = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""positions and lengths of prompts, int64 [n], on the device -> cos and sin of RoPE, float32 [n, d], halves alike."""

ONE_BY_ONE = 2  # layers of a cache that are packed in a step where kernels do not pack many at once
_ANGLES = 2  # the field of a job


class Group(NamedTuple):
    """Layers of a choice that are packed alike.

    Attributes:
        numbers: of the layers, ascending.
    """

    key: SealKey
    tier: int
    layers: list[LayerCache]
    numbers: list[int]


class Sealing:
    """What one choice seals.

    Args:
        groups: layers that are packed alike, and how.

    Attributes:
        rooms: one a group; none before the first block is packed.
        places: int64 [layers, 8], addresses of what is packed in each layer, see `rooms`; None without rooms.
        read_nbytes: bytes that a block adds to what each query reads.
        is_packed: the block that is due next is packed in all layers.
    """

    def __init__(self, kit: Kit, groups: Sequence[Group]) -> None:
        self.kit = kit
        self.rooms: list[GrownRoom] = []
        self.places: Numbers | None = None
        self.read_nbytes = 0
        self.is_packed = False
        self._groups = groups
        self._tail = groups[0].layers[0].tail
        self._begin = self._tail.begin - self._sealed_before()
        self._capacity = 0

    @classmethod
    def of(cls, kit: Kit, layers: Sequence[LayerCache]) -> Sealing | None:
        """None where the kernels do not pack some layer's rows."""
        by_tier: dict[int, list[int]] = {}
        for number, layer in enumerate(layers):
            by_tier.setdefault(layer.grown_tier, []).append(number)
        dtype = layers[0].tail.dtype
        groups = []
        for tier, numbers in by_tier.items():
            key = None if dtype is None else seal_key(kit, tier, dtype)
            if key is None:
                return None
            groups.append(Group(key, tier, [layers[number] for number in numbers], numbers))
        return cls(kit, groups)

    def _sealed_before(self) -> int:
        grown = self._groups[0].layers[0].grown
        return 0 if grown is None else grown.num_rows

    @property
    def num_layers(self) -> int:
        return sum(len(group.layers) for group in self._groups)

    @property
    def begin(self) -> int:
        """Position of the first row that was sealed while decoding."""
        return self._begin

    @property
    def num_rows(self) -> int:
        """Rows that are sealed."""
        return self._tail.begin - self._begin

    def is_ready(self, last_position: int) -> bool:
        """Whether the next block may be packed: its rows are here, the last one of the tail is not among them, as the
        device may still be writing it, and it will be due before `last_position`."""
        tail, recipe = self._tail, self.kit.recipe
        if self.is_packed or tail.num_rows <= recipe.block:
            return False
        return sealed_end(recipe, self.kit.num_prompt_tokens, last_position) >= tail.begin + recipe.block

    def make_room(self, last_position: int | None) -> list[GrownRoom]:
        """Have room for the next block and, where it is known that they come, for all others: admission has reserved
        it. Returns rooms that are no longer used, which work on the device may still read."""
        need = self.num_rows + self.kit.recipe.block
        if need <= self._capacity:
            return []
        if last_position is not None:
            need = max(need, sealed_end(self.kit.recipe, self.kit.num_prompt_tokens, last_position) - self._begin)
        retired = self.rooms
        self.rooms = [GrownRoom(self.kit, group.key, group.tier, group.layers, need) for group in self._groups]
        self._capacity = need
        self.read_nbytes = sum(room.read_nbytes for room in self.rooms)
        self._take_places()
        for room in self.rooms:
            for layer, segment in zip(room.layers, room.segments, strict=True):
                layer.grown = segment if segment.num_rows else None
        return retired

    def _take_places(self) -> None:
        self.places = np.empty((self.num_layers, NUM_PLACES), dtype=np.int64)
        for group, room in zip(self._groups, self.rooms, strict=True):
            self.places[group.numbers] = room.places()

    def relocated(self) -> None:
        """Say that what is sealed and what is sealed into lies elsewhere now."""
        for room in self.rooms:
            room.number()
        if self.rooms:
            self._take_places()

    def jobs(self) -> Iterator[tuple[SealKey, Numbers]]:
        """The jobs of the next block."""
        block = self.num_rows // self.kit.recipe.block
        for room in self.rooms:
            yield room.key, room.jobs(block)

    def positions(self) -> Numbers:
        """Of the next block's rows."""
        return np.arange(self._tail.begin, self._tail.begin + self.kit.recipe.block)

    def seal(self) -> None:
        """Count the block that was packed as sealed."""
        self.is_packed, block = False, self.kit.recipe.block
        for room in self.rooms:
            for layer, segment in zip(room.layers, room.segments, strict=True):
                segment.num_rows += block
                layer.grown = segment
                layer.tail.drop_first(block)

    def tensors(self) -> Iterator[Tensor]:
        """All rooms."""
        for room in self.rooms:
            yield from room.tensors()


def prepare_seals(
    caches: Sequence[SequenceCache],
    last_positions: Sequence[int],
    most_layers: int,
    angles: Angles,
    retired: list[object],
) -> None:
    """Pack ahead what the caches will seal; what attention sees stays as it is.

    Args:
        last_positions: of the last row that each cache may ever have.
        most_layers: layers of all caches together, beyond which no further cache begins.
        retired: gets what is no longer used, to be kept until the device has done what came before.
    """
    ready: list[Sealing] = []
    for cache, last_position in zip(caches, last_positions, strict=True):
        sealing = cache.sealing()
        if sealing is None:
            cache.prepare_seal(last_position, ONE_BY_ONE)
        elif most_layers > 0 and sealing.is_ready(last_position):
            before = sealing.make_room(last_position)
            if before:
                cache.note_moved()
                retired.extend(before)
            ready.append(sealing)
            most_layers -= sealing.num_layers
    if ready:
        pack_blocks(ready, angles)


def pack_blocks(sealings: Sequence[Sealing], angles: Angles) -> None:
    """Pack the next block of some choices into their rooms, on the current stream, and wait for nothing."""
    tables: dict[SealKey, list[Numbers]] = {}
    positions: list[Numbers] = []
    lengths: list[int] = []
    first = 0
    for sealing in sealings:
        rotates = False
        for key, jobs in sealing.jobs():
            jobs[:, _ANGLES] = first
            tables.setdefault(key, []).append(jobs)
            rotates |= key.rotates
        if rotates:
            positions.append(sealing.positions())
            lengths.append(sealing.kit.num_prompt_tokens)
            first += len(positions[-1])
    device = next(sealings[0].tensors()).device
    spread = [np.full(len(at), length) for at, length in zip(positions, lengths, strict=True)]
    parts = [np.concatenate(one).ravel() for one in tables.values()] + positions + spread
    numbers = _sent(np.concatenate(parts), device)
    cos = sin = torch.empty(0, device=device)
    if first:
        at, of = numbers[-2 * first :].view(2, first)
        cos, sin = angles(at, of)
    begin = 0
    for key, own in tables.items():
        end = begin + sum(map(len, own)) * SEAL_FIELDS
        seal_blocks(key, numbers[begin:end].view(-1, SEAL_FIELDS), cos, sin)
        begin = end
    for sealing in sealings:
        sealing.is_packed = True


def own_angles(kit: Kit) -> Angles:
    """The angles that a cache's own rotation turns by: those of the first axis of each plane."""

    def angles(positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        half = kit.shape.head_dim // 2
        axes = torch.zeros(len(positions), 1, 2 * half, device=positions.device)
        axes[..., :half] = 1.0
        cos, sin = kit.rope(axes, positions)[:, 0].chunk(2, dim=-1)
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)

    return angles


def settle_tails(caches: Sequence[SequenceCache]) -> None:
    """Move the rows of tails that blocks were sealed from to the front, on a GPU in one launch for rows of a size."""
    moves: dict[tuple[torch.device, int], list[tuple[Sequence[Tail], Numbers]]] = {}
    moving = [tails for tails in (cache.moving_tails() for cache in caches) if tails]
    for tails in moving:
        first = tails[0]  # of all layers alike
        if not runs(TRITON, first.device):
            for tail in tails:
                tail.settle()
            continue
        entries = np.empty((2 * len(tails), MOVE_FIELDS), dtype=np.int64)
        entries[:, 0] = np.array([tail.room_addresses() for tail in tails]).ravel()
        entries[:, 1], entries[:, 2] = first.offset, first.num_rows
        moves.setdefault((first.device, first.row_nbytes // 2), []).append((tails, entries))
    for (device, row_nbytes), parts in moves.items():
        table = np.concatenate([entries for _, entries in parts])
        move_rows(_sent(table, device), row_nbytes, int(table[:, 1].min()))
        for tails, _ in parts:  # at once: who is asked again must not move them twice
            for tail in tails:
                tail.offset = 0


def _sent(numbers: Numbers, device: torch.device) -> Tensor:
    """Numbers on a device, without waiting for it."""
    if device.type != "cuda":
        return torch.from_numpy(numbers)
    pinned = torch.empty(numbers.shape, dtype=torch.int64, pin_memory=True)
    pinned.numpy()[...] = numbers
    return pinned.to(device, non_blocking=True)
