"""What `kvsluice bench kernels` runs: each operation at a model's shapes, with the bytes that it must move and what its
matrix products compute.

`n` rows of a prompt, H query heads, Hkv KV heads of size d, D hidden size, F width of the feed-forward block. Bytes are
those of inputs and outputs, each once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..compression.codec_slots import CodecFilling
from ..compression.slots import Affine, LowRank
from ..kernels.attention_mass import attention_mass
from ..kernels.attention_partial import attention_partial, merge_partials
from ..kernels.causal_attention import causal_attention
from ..kernels.landmarks import chunk_means, min_cosine_outliers, score_landmarks, select_chunks
from ..kernels.quantize import Axis, dequantize, dequantize_chunks, quantize
from ..kernels.rms_norm import add_rms_norm, rms_norm
from ..kernels.rope import apply_rope
from ..kernels.sparse_reconstruct import ChunkSegment, low_rank_chunks, sparse_attention
from ..kernels.swiglu import swiglu
from ..kernels.window_saliency import window_saliency
from ..models.config import ModelConfig
from ..models.rope import RotaryEmbedding

CHUNK = 4
WINDOW = 64
GROUP = 64  # channels that share a scale
SELECTED_TOKENS = 2048
MASS_ROWS = 256
OUTLIER_CHUNK, OUTLIERS = 8, 48
FOLDERS = frozenset(
    "attention_mass attention_partial causal_attention landmarks quantize rms_norm rope sparse_reconstruct swiglu "
    "window_saliency".split()
)


@dataclass(frozen=True)
class Case:
    """One operation on one set of inputs.

    Attributes:
        folder: of the operation in `kernels/`.
        flops: of its matrix products.
        reference: what it is compared with, where that is another call and not another implementation.
        link_bytes: that come from host memory.
    """

    name: str
    folder: str
    action: Callable[[], object]
    bytes_moved: float
    flops: float = 0.0
    reference: Callable[[], object] | None = None
    link_bytes: float = 0.0


@dataclass(frozen=True)
class Inputs:
    """Draws the tensors of the cases."""

    config: ModelConfig
    num_tokens: int
    device: torch.device
    dtype: torch.dtype
    seed: int

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers."""
        drawn = torch.empty(shape, dtype=self.dtype, device=self.device)
        return drawn.normal_(generator=torch.Generator(self.device).manual_seed(self.seed)).to(dtype or self.dtype)

    def positions(self, begin: int, end: int) -> Tensor:
        """int64 [end - begin]."""
        return torch.arange(begin, end, device=self.device)

    def kv(self) -> Tensor:
        """[n, Hkv, d]."""
        return self.random(self.num_tokens, self.config.num_kv_heads, self.config.head_dim)

    def queries(self, rows: int) -> Tensor:
        """[rows, H, d]."""
        return self.random(rows, self.config.num_heads, self.config.head_dim)


def nbytes(*tensors: Any) -> float:
    """Bytes of tensors, and of those in tuples; anything else has none."""
    return float(sum(t.nbytes if isinstance(t, Tensor) else nbytes(*t) if isinstance(t, tuple) else 0 for t in tensors))


def case(name: str, op: Callable[..., Any], *args: Any, flops: float = 0.0, **kwargs: Any) -> Case:
    """A case that reads every tensor among its positional arguments once, and writes what it returns."""
    return Case(name, folder(op), partial(op, *args, **kwargs), nbytes(*args) + nbytes(op(*args, **kwargs)), flops)


def folder(op: Callable[..., Any]) -> str:
    """Where an operation of `kernels/` lies."""
    return op.__module__.split(".")[-2]


Builder = Callable[[Inputs], Iterator[Case]]


def row_cases(given: Inputs) -> Iterator[Case]:
    """What is done to every row between the matrix products."""
    config, n = given.config, given.num_tokens
    x, weight = given.random(n, config.hidden_size), given.random(config.hidden_size)
    yield case("rms_norm", rms_norm, x, weight, config.rms_norm_eps)
    yield case("add_rms_norm", add_rms_norm, x, x.clone(), weight, config.rms_norm_eps)
    cos, sin = RotaryEmbedding(config.rope, config.head_dim, given.device).tables(given.positions(0, n), n)
    yield case("rope", apply_rope, given.queries(n), cos, sin)
    gate, up = given.random(n, 2 * config.intermediate_size).chunk(2, -1)
    yield case("swiglu", swiglu, gate, up)


def attention_cases(given: Inputs) -> Iterator[Case]:
    """Attention of a whole prompt, of a step over all of it, and of what scores rows by it."""
    config, n = given.config, given.num_tokens
    k, v, at = given.kv(), given.kv(), given.positions(0, n)
    pair = 4.0 * config.num_heads * config.head_dim
    q = given.queries(n)
    yield case("causal_attention", causal_attention, q, k, v, at, at, last_rows=True, flops=pair * n * (n + 1) / 2)
    heads_first = k.transpose(0, 1), v.transpose(0, 1)
    yield case("attention_partial", attention_partial, q[:1], *heads_first, at, at[-1:])
    part = attention_partial(q[:1], *heads_first, at, at[-1:])
    parts = (part, part, part)
    moved = nbytes(parts, merge_partials(parts))
    yield Case("merge_partials", folder(merge_partials), partial(merge_partials, parts), moved)
    rows = min(MASS_ROWS, n)
    yield case("attention_mass", attention_mass, q[-rows:], k, at[-rows:], at, flops=pair * rows * (n - rows / 2))
    rows = min(WINDOW, n // 2)
    yield case("window_saliency", window_saliency, q[-rows:], k, 7, "max", flops=pair / 2 * rows * n)


def packing_cases(given: Inputs) -> Iterator[Case]:
    """Integers by token and by channel, all rows and chosen chunks."""
    x, d = given.kv(), given.config.head_dim
    packings: tuple[tuple[int, int, Axis], ...] = (
        (4, min(GROUP, d), "token"),
        (8, min(GROUP, d), "token"),
        (4, 32, "channel"),
    )
    for bits, group, axis in packings:
        name = f"{bits} bits by {axis}"
        packed = quantize(x, bits, group, axis)
        yield case(f"quantize, {name}", quantize, x, bits, group, axis)
        yield case(f"dequantize, {name}", dequantize, *packed, bits, group, axis, d)
        heads, chunks = chosen(given, given.num_tokens // CHUNK * CHUNK)
        whole = packed if len(x) % CHUNK == 0 else quantize(x[: len(x) // CHUNK * CHUNK], bits, group, axis)
        args = (*whole, heads, chunks, CHUNK, bits, group, axis, d)
        out = dequantize_chunks(*args)
        # of the packed rows only the chosen ones are read
        share = heads.numel() * CHUNK / (len(x) * x.shape[1])
        moved = nbytes(out, heads, chunks) + share * nbytes(*whole)
        action = partial(dequantize_chunks, *args)
        yield Case(f"dequantize_chunks, {name}", folder(dequantize_chunks), action, moved)


def chosen(given: Inputs, num_rows: int) -> tuple[Tensor, Tensor]:
    """heads and chunks int64 [M]: as many random chunks of each KV head as a step selects."""
    count = min(SELECTED_TOKENS, num_rows // 2) // CHUNK
    generator = torch.Generator().manual_seed(given.seed)
    num_heads = given.config.num_kv_heads
    chunks = torch.stack(
        [torch.randperm(num_rows // CHUNK, generator=generator)[:count].sort().values for _ in range(num_heads)]
    )
    heads = torch.arange(num_heads).repeat_interleave(count)
    return heads.to(given.device), chunks.flatten().to(given.device)


def landmark_cases(given: Inputs) -> Iterator[Case]:
    """Building landmarks, scoring them, choosing."""
    rows = given.num_tokens // OUTLIER_CHUNK * OUTLIER_CHUNK
    k, q = given.kv()[:rows], given.queries(1)
    yield case("chunk_means", chunk_means, k, CHUNK)
    yield case("min_cosine_outliers", min_cosine_outliers, k, OUTLIER_CHUNK, OUTLIERS)
    means = chunk_means(k, CHUNK)
    scale = (means.abs().amax(dim=-1) / 127).half()
    codes = (means / scale.float()[..., None]).round().clamp(-127, 127).to(torch.int8)
    yield case("score_landmarks, int8", score_landmarks, q, codes, scale)
    yield case("score_landmarks, bf16", score_landmarks, q, means.to(torch.bfloat16))
    scores = score_landmarks(q, codes, scale)
    count = min(SELECTED_TOKENS, rows // 2) // CHUNK
    yield case("select_chunks", select_chunks, scores, given.config.num_kv_heads, count, None)


def sparse_cases(given: Inputs) -> Iterator[Case]:
    """Attention of a step over its chosen chunks, keys low-rank or by channel, values in 4 bits."""
    config = given.config
    rank = max(2, round(0.156 * config.num_kv_heads * config.head_dim / 2) * 2)
    low_rank = LowRank(rank=min(rank, given.num_tokens), bits=8)
    yield sparse_case(given, "keys low-rank at 8 bits", low_rank)
    yield sparse_case(given, "keys 4 bits by channel", Affine(bits=4, axis="channel", group=32))
    heads, _ = chosen(given, given.num_tokens // CHUNK * CHUNK)
    coefficients = given.random(len(heads), CHUNK, rank, dtype=torch.float32)
    basis = given.random(rank, config.num_kv_heads, config.head_dim, dtype=torch.bfloat16)
    flops = 2.0 * coefficients.numel() * config.head_dim
    yield case("low_rank_chunks", low_rank_chunks, coefficients, basis, heads, flops=flops)


def sparse_case(given: Inputs, name: str, keys: CodecFilling) -> Case:
    """`sparse_attention` of one row over keys that are packed so."""
    config = given.config
    num_rows = given.num_tokens // 32 * 32
    rows = given.kv()[:num_rows]
    readers = []
    for filling in (keys, Affine(bits=4, axis="token", group=min(GROUP, config.head_dim))):
        codec = filling.build()
        basis = codec.fit(rows)
        readers.append(codec.reader(codec.encode(rows, basis), basis, config.head_dim, CHUNK))
    rotary = RotaryEmbedding(config.rope, config.head_dim, given.device)

    def rope(x: Tensor, at: Tensor) -> Tensor:
        return apply_rope(x, *rotary.tables(at, num_rows))

    segment = ChunkSegment(
        readers[0],
        readers[1],
        num_rows // CHUNK,
        lambda chunks: chunks * CHUNK,
        rope if keys.domain == "pre_rope" else None,
    )
    _, chunks = chosen(given, num_rows)
    chunks = chunks.view(1, config.num_kv_heads, -1)
    q, at = given.queries(1), given.positions(num_rows, num_rows + 1)
    read = sum(chunks.numel() * reader.chunk_nbytes + reader.basis_nbytes for reader in readers)
    action = partial(sparse_attention, q, at, chunks, None, [segment], CHUNK)
    return Case(f"sparse_attention, {name}", folder(sparse_attention), action, float(read) + 2 * nbytes(q, chunks))


BUILDERS: tuple[Builder, ...] = (row_cases, attention_cases, packing_cases, landmark_cases, sparse_cases)
