"""Calls of every op that has compiled kernels, at shapes of real models, as the service makes them; for
`compile_kernels.py`. They run on the CPU, and no number that comes out means anything."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kvsluice.benchmarks.synthetic import SyntheticLayers
from kvsluice.compression import make_cache
from kvsluice.compression.interfaces import SequenceCache
from kvsluice.compression.recipe import ModelShape, Recipe, get_recipe, resolve
from kvsluice.kernels.attention_mass import attention_mass
from kvsluice.kernels.attention_partial import attention_partial, merge_partials
from kvsluice.kernels.causal_attention.triton import merge
from kvsluice.kernels.dispatch import TRITON, forced
from kvsluice.kernels.landmarks import score_landmarks, select_chunks
from kvsluice.kernels.quantize import dequantize, dequantize_chunks, quantize
from kvsluice.kernels.rms_norm import add_rms_norm, rms_norm
from kvsluice.kernels.rope import apply_rope
from kvsluice.kernels.seal import MOVE_FIELDS, SEAL_FIELDS, SealKey, move_rows, seal_blocks
from kvsluice.kernels.sparse_reconstruct import low_rank_chunks
from kvsluice.kernels.step_attention import (
    Layout,
    StepAttention,
    recall_block,
    sequence_block,
    serves,
    step_tables,
)
from kvsluice.kernels.step_attention.tables import CHOICE_FIELDS
from kvsluice.kernels.step_attention.triton.launch import choose_ranked
from kvsluice.kernels.swiglu import swiglu
from kvsluice.kernels.window_saliency import window_saliency

NUM_TOKENS = 8192
NUM_LAYERS = 2  # the fewest that recipes with selective propagation take
ROWS = 96  # of a prompt, a multiple of every group
CHUNK = 8

Case = tuple[str, Callable[[], object]]


@dataclass(frozen=True)
class Shape:
    """A model's sizes that kernels are compiled for."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype = torch.bfloat16

    def zeros(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(*size, dtype=dtype or self.dtype)


LLAMA = Shape("llama-3.1-8b", 32, 8, 128, 4096, 14336)
SMOLLM = Shape("smollm2-135m", 9, 3, 64, 576, 1536)
PHI = Shape("phi-3-mini", 32, 32, 96, 3072, 8192)
FULL = Shape("llama-3.1-8b fp32", 32, 8, 128, 4096, 14336, torch.float32)
SHAPES = (LLAMA, SMOLLM, PHI, FULL)

CHOSEN = '{"retrieval": {"kind": "chunks", "chunk": 4, "outliers": 48, "landmark_bits": 8}, "key_codec": '
STEPS = {
    "exact": ("exact", ""),
    "kivi": ("kivi", ""),
    "kivi-2bit": ("kivi-2bit", ""),
    "fp8": ("fp8", ""),
    "mikv": ("mikv", '{"budget": {"kind": "uniform", "rate": 0.4, "recent": 0.5}}'),
    "snapkv": ("snapkv", ""),
    "streaming": ("streaming", ""),
    "lowrank": ("lowrank", ""),
    "xkv": ("xkv", ""),
    "xkv-kv": ("xkv-kv", ""),
    "shadowkv": ("shadowkv", ""),
    "sluice": ("sluice", ""),
    "sluice-lowrank8": ("sluice-full", CHOSEN + '{"kind": "lowrank", "share": 0.5, "bits": 8}}'),
    "sluice-channel4": (
        "sluice-full",
        CHOSEN + '{"kind": "affine", "bits": 4, "group": 32, "axis": "channel"}}',
    ),
    "sluice-fp8": ("sluice-full", CHOSEN + '{"kind": "float8"}}'),
    "sluice-recall": (
        "sluice",
        '{"propagation": {"kind": "tsp", "window": 64, "chunk_aligned": true, "recall": 0.05, "recall_bits": 4}}',
    ),
}
WINDOW = 1024
QUICK = {  # every kernel, every packing and every dtype once
    "llama-3.1-8b": (
        "rows",
        "attention",
        "landmarks",
        "choosing",
        "packing",
        "sparse",
        "sealing",
        "kivi-2bit",
        "fp8",
        "sluice-lowrank8",
        "sluice-recall",
        "sluice host",
    ),
    "smollm2-135m": ("exact", "mikv", "sluice-channel4", "shadowkv window", "sluice host"),
    "phi-3-mini": ("attention", "sealing", "sluice-fp8"),
    "llama-3.1-8b fp32": ("attention", "landmarks", "exact"),
}


def cases(quick: bool) -> Iterator[Case]:
    """Names, and calls that launch kernels; with `quick` those of the test suite."""
    for shape in SHAPES:
        actions: dict[str, Callable[[], object]] = {
            op.__name__: partial(_forced, op, shape)
            for op in (rows, attention, landmarks, choosing, packing, sparse, sealing)
        }
        for name in STEPS:
            actions[name] = partial(step, shape, name, None)
            actions[f"{name} window"] = partial(step, shape, name, WINDOW)
        for name in ("sluice", "shadowkv"):
            actions[f"{name} host"] = partial(step, shape, name, None, Host())
        for name in QUICK[shape.name] if quick else actions:
            yield f"{shape.name} {name}", actions[name]


def _forced(op: Callable[[Shape], object], shape: Shape) -> None:
    with forced(TRITON):
        op(shape)


def rows(shape: Shape) -> None:
    """Ops on rows."""
    d, hidden = shape.head_dim, shape.hidden_size
    fused = shape.zeros(ROWS, shape.num_heads + 2 * shape.num_kv_heads, d)
    x = shape.zeros(ROWS, hidden)
    rms_norm(x, x[0], 1e-5)
    rms_norm(fused[:, : shape.num_heads], x[0, :d], 1e-5)
    add_rms_norm(x, x, x[0], 1e-5)
    angles = torch.zeros(ROWS, d)
    apply_rope(fused[:, : shape.num_heads], angles, angles)
    swiglu(*shape.zeros(ROWS, 2 * shape.intermediate_size).chunk(2, -1))
    part = (shape.zeros(ROWS, shape.num_heads, d), torch.zeros(shape.num_heads, ROWS))
    merge([part, part], shape.dtype)


def attention(shape: Shape) -> None:
    """Ops that multiply queries and keys."""
    d = shape.head_dim
    q, k = shape.zeros(300, shape.num_heads, d), shape.zeros(700, shape.num_kv_heads, d)
    at = torch.arange(700)
    heads_first = k.transpose(0, 1)
    for window in (None, 100):
        out = attention_partial(q[:2], heads_first, heads_first, at, at[-2:], window)
        attention_mass(q, k, at[-300:], at, window)
    merge_partials([out, out])
    window_saliency(q[:32], k, 5, "max")


def landmarks(shape: Shape) -> None:
    """Ops that choose chunks."""
    q, count, heads = shape.zeros(2, shape.num_heads, shape.head_dim), 5000, shape.num_kv_heads
    means = shape.zeros(count, heads, shape.head_dim)
    score_landmarks(q, means)
    scores = score_landmarks(q, means.to(torch.int8), shape.zeros(count, heads, dtype=torch.float16))
    select_chunks(scores, heads, 256, torch.zeros(2, heads, count, dtype=torch.bool))
    select_chunks(scores[..., :500], heads, 64, None)


def choosing(shape: Shape) -> None:
    """The choice of chunks of a decode step over prompts longer than those of `step`."""
    heads = shape.num_kv_heads
    table, at = torch.zeros(1, CHOICE_FIELDS, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    chosen, counts = torch.zeros(1, heads, 512, dtype=torch.int32), torch.zeros(1, heads, dtype=torch.int32)
    for most in (8192, 31744, 65536):
        choose_ranked(table, at, torch.zeros(1, heads, most), chosen, counts)


def packing(shape: Shape) -> None:
    """Ops that pack rows and read them."""
    d, x = shape.head_dim, shape.zeros(ROWS, shape.num_kv_heads, shape.head_dim)
    chosen = torch.zeros(9, dtype=torch.int64)
    for bits, group, axis in ((4, 32, "channel"), (2, 32, "channel"), (4, 32, "token"), (2, 32, "token")):
        packed = quantize(x, bits, group, axis)
        dequantize(*packed, bits, group, axis, d)
        dequantize_chunks(*packed, chosen, chosen, CHUNK, bits, group, axis, d)
    rank = 160
    packed = quantize(torch.zeros(ROWS, rank), 8, rank, "token")
    dequantize(*packed, 8, rank, "token", rank)


def sparse(shape: Shape) -> None:
    """Ops that rebuild chosen chunks."""
    d, heads = shape.head_dim, shape.num_kv_heads
    basis = torch.zeros(160, heads, d, dtype=torch.bfloat16)
    low_rank_chunks(torch.zeros(9, CHUNK, 160), basis, torch.zeros(9, dtype=torch.int64))
    k = torch.zeros(2, heads, 512, d)
    at = torch.zeros(2, heads, 512, dtype=torch.int64)
    attention_partial(shape.zeros(2, shape.num_heads, d), k, k, at, at[:, 0, 0], valid=at == 0)


TOKEN = Layout("token", bits=4, group=64)
SEALED = {  # keys, values, bits of landmarks
    "lowrank8": (Layout("lowrank", bits=8, rank=160), TOKEN, 8),
    "channel4": (Layout("channel", bits=4, group=32), TOKEN, 8),
    "channel2": (Layout("channel", bits=2, group=32), Layout("token", bits=2, group=32), 0),
    "balanced": (Layout("token", bits=2, group=32, balanced=True), Layout("lowrank", bits=16, rank=160), 0),
    "float8": (Layout("float8"), Layout("float8"), 16),
    "dense": (Layout("dense", dtype=torch.bfloat16), Layout("dense", dtype=torch.float32), 0),
}


def sealing(shape: Shape) -> None:
    """Ops that seal generated rows."""
    heads, d = shape.num_kv_heads, shape.head_dim
    table, angles = torch.zeros(9, SEAL_FIELDS, dtype=torch.int64), torch.zeros(32 * 9, d)
    for keys, values, bits in SEALED.values():
        key = SealKey(keys, values, shape.dtype, 32, 4, bits, keys.kind == "lowrank", heads, d)
        seal_blocks(key, table, angles, angles)
    move_rows(torch.zeros(9, MOVE_FIELDS, dtype=torch.int64), heads * d * shape.dtype.itemsize, 32)


class Pages(NamedTuple):
    """See `HeldPages`."""

    views: tuple[Tensor, ...]


class Host:
    """Host memory without a bound."""

    page_nbytes = 1 << 20

    def take(self, num_pages: int) -> Pages:
        return Pages((torch.zeros(self.page_nbytes, dtype=torch.uint8),) * num_pages)


def step(shape: Shape, name: str, window: int | None, host: Host | None = None) -> None:
    """A decode step's attention over the caches of two sequences, whose values may lie in host memory."""
    base, slots = STEPS[name]
    sizes = ModelShape(
        NUM_LAYERS, shape.num_heads, shape.num_kv_heads, shape.head_dim, 1 << 30, (window,) * NUM_LAYERS,
        shape.hidden_size,
    )  # fmt: skip
    resolved = resolve(get_recipe(base, slots), sizes, NUM_TOKENS, {"tsp_layer": 0, "fastkv_layer": 0, "tsp_rate": 0.3})
    assert resolved.fallback_reason is None, f"{name}: {resolved.fallback_reason}"
    cache = _cache(shape, resolved.recipe, sizes, host)
    assert (cache.host_nbytes() > 0) == (host is not None)
    views = cache.views()
    assert serves(views, shape.head_dim), f"{name} is not served"
    block, recall = sequence_block(views), cache.recall_view()
    block.recall = None if recall is None else recall_block(recall, views, block)
    tables = step_tables([block] * 2).padded(4)
    counts, brought = torch.zeros(2, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    frequencies = torch.zeros(shape.head_dim // 2)
    attend = StepAttention(tables, shape.num_kv_heads, frequencies, 1.0, counts, brought=brought)
    at = torch.zeros(4, dtype=torch.int64)
    for layer in range(NUM_LAYERS):
        q = shape.zeros(len(at), shape.num_heads, shape.head_dim)
        fused = shape.zeros(len(at), shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
        k_pre, v = fused[:, shape.num_heads : -shape.num_kv_heads], fused[:, -shape.num_kv_heads :]
        attend.append(layer, k_pre, k_pre.contiguous(), v, at)
        attend.attend(layer, q, at, window)
        recalled = attend.recall(layer, fused, at)
        if recalled is not None:
            at = torch.cat((at, recalled[1]))


def _cache(shape: Shape, recipe: Recipe, sizes: ModelShape, host: Host | None) -> SequenceCache:
    cache = make_cache(recipe, sizes, NUM_TOKENS, lambda x, positions: x, host)
    generator = torch.Generator().manual_seed(zlib.crc32(shape.name.encode()))
    layers = SyntheticLayers(recipe, sizes, NUM_TOKENS, shape.dtype, generator)
    for layer in range(NUM_LAYERS):
        cache.add_layer(layers.layer(layer))
    row = shape.zeros(1, shape.num_kv_heads, shape.head_dim)
    for layer in range(NUM_LAYERS):
        cache.append(layer, row, row, row, torch.tensor([NUM_TOKENS]))
    cache.reserve(1, row)
    return cache
