"""Every byte of a stored sequence is flipped in turn: it is restored as it was, or lost, never as something else."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from kvsluice.compression.interfaces import EncodedLayer, Part
from kvsluice.compression.recipe import get_recipe
from kvsluice.errors import CorruptFrame, Fenced, SequenceLost
from kvsluice.kvstore.continuation import ContinuedChoice, decode_continuation
from kvsluice.kvstore.frame import decode_frame
from kvsluice.kvstore.head import decode_head, encode_head
from kvsluice.kvstore.identity import FrameIdent, frame_key
from kvsluice.kvstore.manifest import ChoiceState, EmittedToken, Manifest, decode_manifest, frame_entry
from kvsluice.kvstore.memory import MemoryStore
from kvsluice.kvstore.sequences import Rows, SequenceWriter
from kvsluice.kvstore.store import Head, HeadWrite
from kvsluice.services.decode.restore import Restored, Restoring, restore
from kvsluice.services.decode.sequence import EmittedChoice
from kvsluice.services.framing import FramePacker

LAYERS, HEADS, DIM, PROMPT, TTL_S = 2, 1, 4, (5, 6, 7, 8, 9, 10), 900.0
RECIPE = get_recipe("exact")
OLD = FrameIdent(request_id="r", epoch=3, tenant="t", model_fingerprint="m", recipe_fingerprint=RECIPE.fingerprint)
NEW = replace(OLD, epoch=4)
TOLD = ((1, 2, 3, 4, 5), (6, 7, 8, 9))
DECODERS = {
    "head": decode_head,
    "manifest": decode_manifest,
    "continuation": decode_continuation,
    "frame": decode_frame,
}
BOUNDED_S = 60.0
"""A restore takes milliseconds; one that hangs fails the test and does not stop the suite."""


class Bytes(MemoryStore):
    """A store whose heads are bytes as well, as they are in a remote one."""

    async def read_head(self, key: Any) -> Head | None:
        data = await self.get(key)
        return None if data is None else decode_head(data)

    async def compare_and_set_head(self, key: Any, expected: Head | None, new: Head, ttl_s: float) -> HeadWrite:
        current = await self.read_head(key)
        if current is not None and current.epoch > new.epoch:
            return HeadWrite.FENCED
        if current != expected:
            return HeadWrite.CHANGED
        await self.delete(key)
        await self.put(key, encode_head(new), ttl_s)
        return HeadWrite.WRITTEN

    def values(self) -> dict[str, bytes]:
        return {key: bytes(held.content) for key, held in self._values.items()}  # type: ignore[arg-type]


@dataclass
class Target:
    """Where layers go."""

    layers: list[EncodedLayer] = field(default_factory=list)

    async def add_layer(self, encoded: EncodedLayer) -> None:
        self.layers.append(encoded)

    async def commit(self, prompt_ids: Any, emitted: Any) -> None:
        raise AssertionError("the caller commits")


def layers(num_rows: int, seed: int) -> list[EncodedLayer]:
    generator = torch.Generator().manual_seed(seed)
    return [
        EncodedLayer(i, {Part.TAIL: {name: torch.randn(num_rows, HEADS, DIM, generator=generator) for name in "kv"}})
        for i in range(LAYERS)
    ]


def packed(encoded: list[EncodedLayer], begin: int, num_rows: int) -> list[bytes]:
    packer = FramePacker(OLD, num_rows, begin=begin)
    return [frame for layer in encoded for frame in packer.add(layer)] + packer.flush()


async def stored() -> dict[str, bytes]:
    """A sequence of two choices, as a worker leaves it."""
    store, size = Bytes(1 << 20), len(PROMPT)
    writer = SequenceWriter(store, OLD, TTL_S)
    frames = packed(layers(size, 0), 0, size)
    for data in frames:
        await writer.put_frame(data)
    entries = tuple(frame_entry(frame_key(OLD, i), decode_frame(data)) for i, data in enumerate(frames))
    first = tuple(ChoiceState((EmittedToken(ids[0], -0.5),)) for ids in TOLD)
    await writer.commit(Manifest(OLD, RECIPE.to_json(), PROMPT, first, 7, entries))
    choices = [ContinuedChoice(ids) for ids in TOLD]
    extents = [(0, 0, 2), (0, 2, 4), (1, 0, 3)]
    rows = [
        Rows(choice, (size + begin, size + end), packed(layers(end - begin, 1 + i), size + begin, end - begin))
        for i, (choice, begin, end) in enumerate(extents)
    ]
    await writer.extend(rows, choices)
    return store.values()


async def restored(values: dict[str, bytes]) -> list[Any] | None:
    """All that is restored of what lies in a store, as plain values; None where it is lost."""
    store, target = Bytes(1 << 20), Target()
    for key, value in values.items():
        await store.put(key, value, TTL_S)  # type: ignore[arg-type]
    emitted = [EmittedChoice(ids, "") for ids in TOLD]
    wanted = Restoring(NEW, RECIPE, len(PROMPT), LAYERS, 1 << 20, emitted, TTL_S)
    try:
        async with asyncio.timeout(BOUNDED_S):
            found = await restore(store, wanted, target)
    except (CorruptFrame, SequenceLost):
        return None
    return _plain(found, target)


def _plain(found: Restored, target: Target) -> list[Any]:
    kept = [(one.begin, layer) for choice in found.emitted for one in choice.kept for layer in one.layers]
    return [
        found.found.manifest.prompt_ids,
        [(choice.token_ids, choice.finish_reason, len(choice.kept)) for choice in found.emitted],
        *(
            (begin, layer.layer, part, name, tensor.dtype, tensor.shape, tensor.numpy().tobytes())
            for begin, layer in [*((0, layer) for layer in target.layers), *kept]
            for part, group in layer.tensors.items()
            for name, tensor in group.items()
        ),
    ]


def kind_of(key: str) -> str:
    return key.split(":")[1]


async def test_a_sequence_with_a_flipped_byte_is_whole_or_lost():
    values, draw = await stored(), random.Random(0)
    whole = await restored(values)
    assert whole is not None and len(whole) == 2 + 2 * LAYERS * 4
    assert {kind_of(key) for key in values} == {"head", "manifest", "continuation", "frame"}
    for key, value in values.items():
        for offset in range(len(value)):
            flipped = value[:offset] + bytes([value[offset] ^ draw.randrange(1, 256)]) + value[offset + 1 :]
            found = await restored(values | {key: flipped})
            assert found in (None, whole), f"byte {offset} of a {kind_of(key)} is restored as something else"


async def test_no_decoder_takes_a_flipped_bit():
    for key, value in (await stored()).items():
        decode, data = DECODERS[kind_of(key)], bytearray(value)
        decode(bytes(data))
        for bit in range(8 * len(data)):
            data[bit // 8] ^= 1 << bit % 8
            with pytest.raises(CorruptFrame):
                decode(bytes(data))
            data[bit // 8] ^= 1 << bit % 8


async def test_a_sequence_that_is_cut_short_or_mixed_up_is_lost():
    values = await stored()
    for key, value in values.items():
        for cut in {0, 1, len(value) // 2, len(value) - 1}:
            assert await restored(values | {key: value[:cut]}) is None
        assert await restored(values | {key: value + b"\0"}) is None
        for other, instead in values.items():
            if other != key:
                assert await restored(values | {key: instead}) is None, f"a {kind_of(other)} in place of {kind_of(key)}"


async def test_a_later_owner_is_still_seen():
    values = await stored()
    (key,) = [key for key in values if kind_of(key) == "head"]
    head = decode_head(values[key])
    with pytest.raises(Fenced):
        await restored(values | {key: encode_head(Head(NEW.epoch + 1, head.manifest))})
