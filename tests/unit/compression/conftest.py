"""A model-free prompt with realistic keys, run through a recipe layer by layer as prefill would; and a toy recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvsluice.compression import make_cache, make_compressor
from kvsluice.compression import slots as s
from kvsluice.compression.codec_slots import Specs, TensorSpec
from kvsluice.compression.filling import add_filling, forget_filling
from kvsluice.compression.interfaces import EncodedLayer, LayerObs, SequenceCache
from kvsluice.compression.recipe import ModelShape, Recipe, get_recipe, recipe_names, register, resolve, unregister

PROFILE = {"tsp_layer": 1, "fastkv_layer": 1, "tsp_rate": 0.3}


def frequencies(dim: int) -> Tensor:
    """Angles of RoPE with theta 10,000 at position 1, float32 [dim / 2]."""
    half = dim // 2
    return (10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)).float()


def rope(x: Tensor, positions: Tensor) -> Tensor:
    """Half-split RoPE, theta 10,000, on x [n, heads, d] at positions [n] or [n, heads]."""
    angles = positions.double()[..., None] * frequencies(x.shape[-1]).double().to(x.device)
    if positions.dim() == 1:
        angles = angles[:, None]
    cos, sin = angles.cos(), angles.sin()
    low, high = x.double().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


@dataclass
class Prompt:
    """Queries, keys and values of every layer for num_tokens + num_new positions, as random numbers.

    Keys have what real ones have: a few channels with a large offset, and low rank before RoPE.
    """

    shape: ModelShape
    num_tokens: int
    q: list[Tensor]
    k_pre: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]

    def obs(self, layer: int, rows: Tensor, query_window: int, wants_mass: bool = False) -> LayerObs:
        last = rows[len(rows) - query_window :]
        return LayerObs(
            layer=layer,
            positions=rows,
            num_prompt_tokens=self.num_tokens,
            k_pre=self.k_pre[layer][rows],
            k=self.k[layer][rows],
            v=self.v[layer][rows],
            q_window=self.q[layer][last],
            mass=self.mass(layer, rows) if wants_mass else None,
            query_peak=self.query_peak(layer, rows),
        )

    def mass(self, layer: int, rows: Tensor) -> Tensor:
        """What each of the rows receives from the queries of all, float32 [Hkv, n]."""
        q, k = self.q[layer][rows].float(), self.k[layer][rows].float()
        group = self.shape.num_heads // self.shape.num_kv_heads
        scores = torch.einsum("chd,mhd->hcm", q, k.repeat_interleave(group, dim=1)) / q.shape[-1] ** 0.5
        hidden = rows > rows[:, None]
        window = self.shape.layer_windows[layer]
        if window is not None:
            hidden |= rows <= rows[:, None] - window
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        return weights.sum(dim=1).unflatten(0, (-1, group)).sum(dim=1)

    def query_peak(self, layer: int, rows: Tensor) -> Tensor:
        """The largest |q| of every channel, float32 [Hkv, d]."""
        by_head = self.q[layer][rows].float().abs().amax(dim=0)
        return by_head.unflatten(0, (self.shape.num_kv_heads, -1)).amax(dim=1)


def make_shape(heads: int = 4, kv_heads: int = 2, dim: int = 16, layers: int = 4, windows=None) -> ModelShape:
    return ModelShape(layers, heads, kv_heads, dim, 8192, tuple(windows or (None,) * layers))


def make_prompt(shape: ModelShape, num_tokens: int, num_new: int = 0, seed: int = 0, dtype=torch.float32) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    n = num_tokens + num_new
    positions = torch.arange(n)
    prompt = Prompt(shape, num_tokens, [], [], [], [])
    for _ in range(shape.num_layers):
        width = shape.kv_width
        rank = max(2, width // 6)
        low = torch.randn(n, rank, generator=generator) @ torch.randn(rank, width, generator=generator)
        k_pre = low / rank**0.5 + 0.1 * torch.randn(n, width, generator=generator)
        k_pre[:, :: max(2, width // 4)] += 4.0
        k_pre = k_pre.view(n, shape.num_kv_heads, shape.head_dim).to(dtype)
        q = torch.randn(n, shape.num_heads, shape.head_dim, generator=generator)
        prompt.q.append(rope(2 * q, positions).to(dtype))
        prompt.k_pre.append(k_pre)
        prompt.k.append(rope(k_pre, positions))
        prompt.v.append(torch.randn(n, shape.num_kv_heads, shape.head_dim, generator=generator).to(dtype))
    return prompt


def prefill(recipe: Recipe, prompt: Prompt) -> tuple[list[EncodedLayer], list[Tensor]]:
    """Encoded layers, and the positions that passed each layer."""
    compressor = make_compressor(recipe, prompt.shape)
    rows, encoded, passed = torch.arange(prompt.num_tokens), [], []
    for layer in range(prompt.shape.num_layers):
        passed.append(rows)
        obs = prompt.obs(layer, rows, compressor.query_window(layer), compressor.wants_mass)
        ready, selected = compressor.finish_layer(obs)
        encoded += ready
        rows = rows if selected is None else rows[selected]
    return encoded, passed


def load(recipe: Recipe, prompt: Prompt, encoded: list[EncodedLayer]) -> SequenceCache:
    cache = make_cache(recipe, prompt.shape, prompt.num_tokens, rope)
    for one in encoded:
        cache.add_layer(one)
    return cache


def step(cache: SequenceCache, prompt: Prompt, begin: int, end: int) -> list[Tensor]:
    """Append and attend rows [begin, end) in every layer; no sealing."""
    at = torch.arange(begin, end)
    outs = []
    for layer in range(prompt.shape.num_layers):
        cache.append(layer, prompt.k_pre[layer][at], prompt.k[layer][at], prompt.v[layer][at], at)
        outs.append(cache.attend(layer, prompt.q[layer][at], at))
    return outs


def decode(cache: SequenceCache, prompt: Prompt, begin: int, end: int, run: int = 1) -> list[Tensor]:
    """Rows [begin, end) in runs of at most `run`, sealing when due: per layer [end - begin, H, d]."""
    steps = []
    while begin < end:
        stop = min(end, begin + min(run, cache.rows_until_seal(begin)))
        steps.append(step(cache, prompt, begin, stop))
        cache.seal(stop)
        begin = stop
    return [torch.cat(layer) for layer in zip(*steps, strict=True)]


def dense(prompt: Prompt, layer: int, rows: Tensor, position: int) -> Tensor:
    """Plain attention of the query at `position` over the given rows and all later ones up to it: [H, d]."""
    rows = torch.cat((rows, torch.arange(prompt.num_tokens, position + 1)))
    window = prompt.shape.layer_windows[layer]
    if window is not None:
        rows = rows[rows > position - window]
    q = prompt.q[layer][position].float()
    group = prompt.shape.num_heads // prompt.shape.num_kv_heads
    k = prompt.k[layer][rows].float().repeat_interleave(group, dim=1)
    v = prompt.v[layer][rows].float().repeat_interleave(group, dim=1)
    weights = torch.softmax(torch.einsum("hd,mhd->hm", q, k) / q.shape[-1] ** 0.5, dim=-1)
    return torch.einsum("hm,mhd->hd", weights, v)


@pytest.fixture(autouse=True)
def _one_thread_without_grad() -> Iterator[None]:
    """Tensors here are tiny: threads would only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """The functions above."""
    return SimpleNamespace(
        PROFILE=PROFILE,
        rope=rope,
        make_shape=make_shape,
        make_prompt=make_prompt,
        prefill=prefill,
        load=load,
        step=step,
        decode=decode,
        dense=dense,
        toy=TOY,
        replace=replace,
    )


# --- a recipe in one place: its codec, its slot, its registration -------------------------------------------


class SignedReader:
    """int8 codes [n, Hkv, d] times a float32 scale a row."""

    basis_nbytes = 0

    def __init__(self, tensors: Mapping[str, Tensor], chunk: int) -> None:
        self.codes, self.scale, self.chunk = tensors["codes"], tensors["scale"], chunk
        self.chunk_nbytes = chunk * (self.codes.shape[2] + 4)

    def read(self, heads: Tensor, chunks: Tensor) -> Tensor:
        at = (chunks[:, None] * self.chunk + torch.arange(self.chunk), heads[:, None])
        return self.codes[at] * self.scale[at][..., None]

    def read_all(self) -> Tensor:
        return self.codes * self.scale[..., None]


@dataclass(frozen=True)
class Signed(s.CodecFilling):
    """Symmetric int8, one scale a row and head."""

    slot = ("key_codec", "value_codec")
    kind = "toy-signed"

    def build(self) -> Signed:
        return self

    def fit(self, rows: Tensor, query_peak: Tensor | None = None) -> dict[str, Tensor]:
        return {}

    def encode(self, rows: Tensor, basis: Mapping[str, Tensor], summed: Any = None) -> dict[str, Tensor]:
        scale = rows.float().abs().amax(-1) / 127 + 1e-12
        return {"codes": (rows / scale[..., None]).round().to(torch.int8), "scale": scale}

    def reader(self, tensors: Mapping[str, Tensor], basis: Any, head_dim: int, chunk: int) -> SignedReader:
        return SignedReader(tensors, chunk)

    def tensor_specs(self, num_rows: int, num_kv_heads: int, head_dim: int, native: str) -> Specs:
        return {
            "codes": TensorSpec("int8", (num_rows, num_kv_heads, head_dim)),
            "scale": TensorSpec("float32", (num_rows, num_kv_heads)),
        }


TOY = Recipe(
    "toy",
    key_codec=Signed(),
    value_codec=Signed(),
    retrieval=s.ChunkLandmarks(chunk=2, outliers=3, budget_tokens=40),
    window=s.ExactEnds(sinks=2, local=6, seal_block=6),
)


forget_filling(Signed)  # other tests must not see it


@pytest.fixture(scope="module", autouse=True)
def _toy() -> Iterator[None]:
    add_filling(Signed)
    register(TOY)
    yield
    unregister("toy")
    forget_filling(Signed)


# --- the cases of the invariants ----------------------------------------------------------------------------

AFFINE = {"kind": "affine", "bits": 4, "axis": "channel", "group": 32}
LOWRANK = {"kind": "lowrank", "bits": 8, "rank": 12}
# `sluice` attends to more rows than the prompts here have
FEW_ROWS = """{"retrieval": {"kind": "chunks", "chunk": 4, "outliers": 0, "budget_tokens": 256, "budget_rate": 0.06,
 "landmark_bits": 8}}"""
SLOTS = {"sluice": FEW_ROWS, "sluice-full": FEW_ROWS}
CASES = [(name, LOWRANK) for name in (*recipe_names(), "toy")] + [("sluice", AFFINE)]
N, NEW = 761, 110


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]['kind']}" if case[0] == "sluice" else case[0])
def recipe(request: pytest.FixtureRequest) -> Recipe:
    """Every registered recipe and the toy, resolved for a prompt of N rows; `sluice` with both kinds of keys."""
    name, codec = request.param
    resolved = resolve(get_recipe(name, SLOTS.get(name, "")), make_shape(), N, PROFILE | {"key_codec": codec})
    assert resolved.fallback_reason is None
    return resolved.recipe


@pytest.fixture(scope="session")
def prompt() -> Prompt:
    """N rows of prompt and NEW to come; read only."""
    return make_prompt(make_shape(), N, NEW)
