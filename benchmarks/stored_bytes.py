"""What requests write to a store, counted without a model: frames by their headers and shapes, names by encoding them.

For docs/store.md. Nothing is measured here, so the numbers are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..compression.interfaces import EncodedLayer, Part
from ..compression.layout import layer_specs
from ..compression.recipe import ModelShape, Recipe, get_recipe, resolve
from ..evals.pages import table
from ..kvstore.continuation import Continuation, ContinuedChoice, RowsEntry, encode_continuation
from ..kvstore.frame import Kind
from ..kvstore.head import encode_head
from ..kvstore.identity import (
    FrameIdent,
    ModelFingerprint,
    RecipeFingerprint,
    RequestId,
    TenantId,
    continuation_key,
    frame_key,
    head_key,
    manifest_key,
)
from ..kvstore.manifest import ChoiceState, EmittedToken, FrameEntry, Manifest, encode_manifest
from ..kvstore.store import Head
from ..models.config import SHAPES
from ..models.profiles import load_profile
from ..services.framing import FrameMeter
from ..services.model_shape import model_shape

PROMPT_TOKENS, ANSWER_TOKENS, KEEP_EVERY = 8192, 512, 16
EPOCH = 1_700_000_000_000_000  # as long as those of a gateway
CASES = (
    ("llama-3.1-8b", "bfloat16", "exact"),
    ("llama-3.1-8b", "bfloat16", "sluice"),
    ("llama-3.1-8b", "bfloat16", "kivi"),
    ("llama-3.1-8b", "bfloat16", "fastkv"),
    ("smollm2-135m", "float32", "exact"),
    ("smollm2-135m", "float32", "sluice"),
)


@dataclass(frozen=True)
class StoredBytes:
    """What one request writes, with one choice.

    Attributes:
        prompt_bytes, prompt_frames: of the prompt's frames, and how many they are.
        manifest_bytes: names and prompt.
        rows_bytes: of all generated rows that are kept.
        continuation_bytes: of the last continuation; the one before is deleted when the next one is there.
        continuations_bytes: of all that are written.
        head_bytes: of the head, always the same few.
        num_values: values and heads in the store at the end.
        names_bytes: of their names.
    """

    prompt_bytes: int
    prompt_frames: int
    manifest_bytes: int
    rows_bytes: int
    continuation_bytes: int
    continuations_bytes: int
    head_bytes: int
    num_values: int
    names_bytes: int

    @property
    def held_bytes(self) -> int:
        """Values, heads and names at the end."""
        own = self.prompt_bytes + self.manifest_bytes + self.rows_bytes + self.continuation_bytes
        return own + self.head_bytes + self.names_bytes


def ident_of(recipe: Recipe) -> FrameIdent:
    """An identity with fields as long as those of a running service."""
    return FrameIdent(
        request_id=RequestId("0" * 32),
        epoch=EPOCH,
        tenant=TenantId("default"),
        model_fingerprint=ModelFingerprint("0" * 32),
        recipe_fingerprint=RecipeFingerprint(recipe.fingerprint),
    )


def shape_and_recipe(model: str, recipe: str, num_tokens: int) -> tuple[ModelShape, Recipe]:
    """A built-in shape, and a recipe with every number that it has for such a prompt."""
    shape = model_shape(SHAPES[model])
    return shape, resolve(get_recipe(recipe), shape, num_tokens, load_profile(model, shape)).recipe


def prompt_layer(recipe: Recipe, shape: ModelShape, num_tokens: int, layer: int, dtype: str) -> EncodedLayer:
    """A layer of a prompt as prefill hands it over, without data."""
    specs = layer_specs(recipe, shape, num_tokens, layer, dtype)
    return EncodedLayer(
        layer,
        {
            part: {
                name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
                for name, spec in group.items()
            }
            for part, group in specs.items()
        },
    )


def rows_layer(recipe: Recipe, shape: ModelShape, num_rows: int, layer: int, dtype: str) -> EncodedLayer:
    """Generated rows of a layer as they are kept: dense, in the dtype of the exact ends; without data."""
    own = dtype if recipe.window.dtype == "native" else recipe.window.dtype
    rows = torch.empty(num_rows, shape.num_kv_heads, shape.head_dim, dtype=getattr(torch, own), device="meta")
    return EncodedLayer(layer, {Part.TAIL: {"k": rows, "v": rows}})


def _measured(ident: FrameIdent, num_tokens: int, begin: int, layers: Sequence[EncodedLayer]) -> tuple[int, int]:
    """Bytes and number of the frames of layers."""
    meter = FrameMeter(ident, num_tokens, begin=begin)
    num_bytes = sum(meter.measure(layer) for layer in layers) + meter.measure_rest()
    return num_bytes, meter.num_frames


def stored_bytes(
    model: str,
    dtype: str,
    recipe_name: str,
    prompt_tokens: int = PROMPT_TOKENS,
    answer_tokens: int = ANSWER_TOKENS,
    keep_every: int = KEEP_EVERY,
) -> StoredBytes:
    """What a request writes whose answer has `answer_tokens`, kept with `durability` `tokens`."""
    shape, recipe = shape_and_recipe(model, recipe_name, prompt_tokens)
    ident, vocab = ident_of(recipe), SHAPES[model].vocab_size
    layers = range(shape.num_layers)
    prompt = [prompt_layer(recipe, shape, prompt_tokens, layer, dtype) for layer in layers]
    prompt_bytes, prompt_frames = _measured(ident, prompt_tokens, 0, prompt)

    def entries(begin: int, count: int) -> list[FrameEntry]:
        # sizes and hashes as long as real ones
        return [
            FrameEntry(frame_key(ident, begin + i), 1 << 20, (1 << 64) - 1, Kind.PACKED, (0, shape.num_layers))
            for i in range(count)
        ]

    first = (ChoiceState((EmittedToken(vocab - 1, -0.5),)),)
    manifest = encode_manifest(
        Manifest(ident, recipe.to_json(), (vocab - 1,) * prompt_tokens, first, 2**63, tuple(entries(0, prompt_frames)))
    )
    rows_bytes = written = 0
    num_frames, kept, last = prompt_frames, list[RowsEntry](), 0
    for version, end in enumerate(range(keep_every, answer_tokens, keep_every), 1):
        begin = prompt_tokens + end - keep_every
        rows = [rows_layer(recipe, shape, keep_every, layer, dtype) for layer in layers]
        num_bytes, count = _measured(ident, keep_every, begin, rows)
        kept.append(RowsEntry(0, (begin, begin + keep_every), tuple(entries(num_frames, count))))
        rows_bytes, num_frames = rows_bytes + num_bytes, num_frames + count
        choices = (ContinuedChoice((vocab - 1,) * (end + 1)),)
        data = encode_continuation(Continuation(ident, manifest_key(ident), 2**64 - 1, version, choices, tuple(kept)))
        last, written = len(data), written + len(data)
    names: list[str] = [frame_key(ident, i) for i in range(num_frames)]
    names += [manifest_key(ident), continuation_key(ident, max(1, len(kept))), head_key(ident)]
    return StoredBytes(
        prompt_bytes=prompt_bytes,
        prompt_frames=prompt_frames,
        manifest_bytes=len(manifest),
        rows_bytes=rows_bytes,
        continuation_bytes=last,
        continuations_bytes=written,
        head_bytes=len(encode_head(Head(EPOCH, continuation_key(ident, max(1, len(kept)))))),
        num_values=len(names),
        names_bytes=sum(map(len, names)),
    )


def stored_table() -> str:
    """What requests of several models and recipes write, as a table."""
    header = ("model", "recipe", "prompt's frames", "a prompt token", "manifest", "a generated token",
              "continuations", "values at the end", "held at the end")  # fmt: skip
    lines = []
    for model, dtype, recipe in CASES:
        found = stored_bytes(model, dtype, recipe)
        kept = (ANSWER_TOKENS - 1) // KEEP_EVERY * KEEP_EVERY
        lines.append(
            (f"{model}, {dtype}", f"`{recipe}`", _mib(found.prompt_bytes), _kib(found.prompt_bytes / PROMPT_TOKENS),
             _kib(found.manifest_bytes), _kib(found.rows_bytes / kept), _kib(found.continuations_bytes),
             f"{found.num_values:,}", _mib(found.held_bytes))
        )  # fmt: skip
    return table(header, lines, numbers_from=2)


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 20):,.1f} MiB"


def _kib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 10):,.1f} KiB"
