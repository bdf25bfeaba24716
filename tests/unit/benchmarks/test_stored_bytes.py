"""What requests write to a store: counted from shapes as it is really written."""

from __future__ import annotations

import pytest
import torch

from kvsluice.benchmarks.stored_bytes import (
    ident_of,
    prompt_layer,
    rows_layer,
    shape_and_recipe,
    stored_bytes,
    stored_table,
)
from kvsluice.compression.interfaces import EncodedLayer
from kvsluice.kvstore.continuation import ContinuedChoice
from kvsluice.kvstore.frame import decode_frame
from kvsluice.kvstore.identity import frame_key
from kvsluice.kvstore.manifest import ChoiceState, EmittedToken, Manifest, frame_entry
from kvsluice.kvstore.memory import MemoryStore
from kvsluice.kvstore.sequences import Rows, SequenceWriter
from kvsluice.services.framing import FramePacker

MODEL, PROMPT, ANSWER, EVERY = "smollm2-135m", 600, 50, 16


def real(encoded: EncodedLayer) -> EncodedLayer:
    """The same shapes with memory behind them."""
    tensors = {
        part: {name: torch.zeros(one.shape, dtype=one.dtype) for name, one in group.items()}
        for part, group in encoded.tensors.items()
    }
    return EncodedLayer(encoded.layer, tensors)


def packed(ident, layers, num_tokens: int, begin: int) -> list[bytes]:
    packer = FramePacker(ident, num_tokens, begin=begin)
    return [frame for layer in layers for frame in packer.add(layer)] + packer.flush()


@pytest.mark.parametrize("name", ["exact", "sluice"])
async def test_the_count_is_what_a_store_really_takes(name):
    shape, recipe = shape_and_recipe(MODEL, name, PROMPT)
    ident, layers = ident_of(recipe), range(shape.num_layers)
    store = MemoryStore(1 << 30)
    writer = SequenceWriter(store, ident, 60.0)
    frames = packed(ident, [real(prompt_layer(recipe, shape, PROMPT, i, "float32")) for i in layers], PROMPT, 0)
    for data in frames:
        await writer.put_frame(data)
    entries = tuple(frame_entry(frame_key(ident, i), decode_frame(data)) for i, data in enumerate(frames))
    first = (ChoiceState((EmittedToken(49_151, -0.5),)),)
    await writer.commit(Manifest(ident, recipe.to_json(), (49_151,) * PROMPT, first, 2**63, entries))
    for end in range(EVERY, ANSWER, EVERY):
        begin = PROMPT + end - EVERY
        rows = packed(ident, [real(rows_layer(recipe, shape, EVERY, i, "float32")) for i in layers], EVERY, begin)
        await writer.extend([Rows(0, (begin, begin + EVERY), rows)], [ContinuedChoice((49_151,) * (end + 1))])
    counted = stored_bytes(MODEL, "float32", name, PROMPT, ANSWER, EVERY)
    assert counted.prompt_frames == len(frames) and counted.prompt_bytes == sum(map(len, frames))
    assert counted.num_values == len(await store.scan(""))
    # hashes and sizes in names vary by a few bytes each
    written = counted.prompt_bytes + counted.manifest_bytes + counted.rows_bytes + counted.continuations_bytes
    assert abs(written - writer.stored_bytes) <= 16 * counted.num_values * 3
    assert abs(counted.held_bytes - store.used_bytes) <= 16 * counted.num_values + counted.head_bytes


def test_the_page_says_what_a_row_takes():
    shape, recipe = shape_and_recipe("llama-3.1-8b", "exact", 8192)
    rows = rows_layer(recipe, shape, 1, 0, "bfloat16").tensors
    num_bytes = shape.num_layers * sum(one.nbytes for group in rows.values() for one in group.values())
    assert num_bytes == 128 * 1024
    assert "| llama-3.1-8b, bfloat16 | `exact` |" in stored_table()
