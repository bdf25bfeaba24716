"""What each method promises beyond the invariants: rows that it keeps, what its codecs do, what moves in decoding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvsluice.compression import bound_nbytes
from kvsluice.compression import slots as s
from kvsluice.compression.budgets import Ranked, others
from kvsluice.compression.interfaces import Part
from kvsluice.compression.layout import layer_layout
from kvsluice.compression.recipe import Recipe, get_recipe, resolve
from kvsluice.kernels.window_saliency import window_saliency

N = 500


def resolved(name: str, shape: Any, num_tokens: int = N, slots: str = "") -> Recipe:
    made = resolve(get_recipe(name, slots), shape, num_tokens, {})
    assert made.fallback_reason is None
    return made.recipe


def ranked(scores: Tensor, count: int) -> Tensor:
    """Ascending indices of the largest; ties go to the lower one."""
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values


def rows_of(encoded: Any) -> Tensor:
    """Kept positions [n, Hkv]."""
    return encoded.tensors[Part.POSITIONS]["rows"].long()


# --- which rows are kept ------------------------------------------------------------------------------------


def test_snapkv_keeps_its_window_and_what_the_window_attends_to_most(lab: Any) -> None:
    shape = lab.make_shape()
    prompt = lab.make_prompt(shape, N)
    encoded, _ = lab.prefill(resolved("snapkv", shape), prompt)
    for layer, one in enumerate(encoded):
        kept = rows_of(one)
        assert kept.shape == (50, 2)
        saliency = window_saliency(prompt.q[layer][N - 32 :], prompt.k[layer][:N], 7, "max")
        for head in range(2):
            best = ranked(saliency[head], 50 - 32)
            assert torch.equal(kept[:, head], torch.cat((best, torch.arange(N - 32, N))))


@given(
    num_tokens=st.integers(200, 200_000),
    rate=st.floats(0.02, 1.0),
    beta=st.floats(1.0, 100.0),
    window=st.integers(1, 64),
    num_layers=st.integers(2, 80),
)
def test_a_pyramid_spends_what_a_uniform_budget_would(
    num_tokens: int, rate: float, beta: float, window: int, num_layers: int
) -> None:
    budget = s.PyramidBudget(rate=rate, beta=beta, num_layers=num_layers)
    kept = [budget.kept_rows(layer, num_tokens, num_tokens, window) for layer in range(num_layers)]
    mean = int(num_tokens * rate)
    if mean <= window:
        assert kept == [window] * num_layers
        return
    assert sum(kept) == num_layers * mean
    assert kept == sorted(kept, reverse=True) and window <= kept[-1] and kept[0] <= num_tokens


def test_a_pyramid_of_slope_1_is_uniform(lab: Any) -> None:
    slots = '{"budget": {"kind": "pyramid", "rate": 0.1, "beta": 1}}'
    recipe = resolved("pyramidkv", lab.make_shape(), slots=slots)
    assert {layer_layout(recipe, N, layer).num_sealed for layer in range(4)} == {50}


def test_accumulated_scores_keep_heavy_hitters_and_as_many_recent_rows(lab: Any) -> None:
    shape = lab.make_shape()
    prompt = lab.make_prompt(shape, N)
    recipe = resolved("mikv", shape, slots='{"budget": {"kind": "uniform", "rate": 0.4, "recent": 0.5}}')
    encoded, _ = lab.prefill(recipe, prompt)
    at = layer_layout(recipe, N, 0)
    recent = max(0, round((at.num_sealed + at.num_tail) / 2) - at.num_tail)
    for layer, one in enumerate(encoded):
        kept, mass = rows_of(one), prompt.mass(layer, torch.arange(N))
        assert float(mass.sum()) == pytest.approx(4 * N, rel=1e-4)
        last = torch.arange(at.sealed_end - recent, at.sealed_end)
        for head in range(2):
            heavy = ranked(mass[head, : at.sealed_end - len(last)], at.num_sealed - len(last))
            assert torch.equal(kept[:, head], torch.cat((heavy, last)))


@pytest.mark.parametrize("shared", [False, True])
def test_ranking_takes_recent_rows_first_and_ties_by_position(shared: bool) -> None:
    scores = torch.tensor([[5.0, 1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 3.0, 0.0, 0.0, 0.0]])
    kept = Ranked(0.5, shared).keep(scores, 4, 0)
    assert kept.tolist() == ([0, 2, 4, 5] if shared else [[0, 1, 4, 5], [1, 2, 4, 5]])
    assert Ranked(0.5, shared).keep(scores, 2, 2).tolist() == ([0, 2] if shared else [[0, 1], [1, 2]])


def test_others_are_the_rest_in_order() -> None:
    assert others(torch.tensor([[0, 1], [2, 4]]), 5).tolist() == [[1, 0], [3, 2], [4, 3]]
    assert others(torch.tensor([0, 3]), 5).tolist() == [1, 2, 4]


def test_heads_that_share_their_rows_can_be_evicted_and_factored(lab: Any) -> None:
    shape = lab.make_shape()
    prompt = lab.make_prompt(shape, N, 1)
    slots = (
        '{"budget": {"kind": "uniform", "rate": 0.3, "heads": "shared"}, "key_codec": {"kind": "lowrank", "rank": 32}}'
    )
    recipe = resolved("snapkv", shape, slots=slots)
    encoded, _ = lab.prefill(recipe, prompt)
    outs = lab.decode(lab.load(recipe, prompt, encoded), prompt, N, N + 1)
    for layer, one in enumerate(encoded):
        kept = one.tensors[Part.POSITIONS]["chunks"].long()
        assert kept.shape == (150,) and len(one.tensors[Part.KEYS]["rows"]) == 150
        assert torch.allclose(outs[layer][0], lab.dense(prompt, layer, kept, N), atol=0.05)  # full rank, bfloat16


# --- codecs -------------------------------------------------------------------------------------------------


def test_float8_rounds_to_three_bits_of_mantissa_and_clips_what_comes_later() -> None:
    codec = s.Float8().build()
    rows = torch.randn(300, 2, 64, generator=torch.Generator().manual_seed(0)) * 3
    basis = codec.fit(rows)
    read = codec.reader(codec.encode(rows, basis), basis, 64, 1).read_all()
    step = basis["scale"] * 2.0**-9  # half the smallest denormal step is below this
    assert ((read - rows).abs() <= rows.abs() * 2.0**-4 + step).all()
    assert read.abs().max() == rows.abs().max()
    late = codec.reader(codec.encode(rows * 100, basis), basis, 64, 1).read_all()
    assert late.isfinite().all() and late.abs().max() == pytest.approx(float(rows.abs().max()))


def test_float8_of_zeros_is_zeros() -> None:
    codec = s.Float8().build()
    rows = torch.zeros(4, 1, 16)
    basis = codec.fit(rows)
    assert torch.equal(codec.reader(codec.encode(rows, basis), basis, 16, 1).read_all(), rows)


def attention(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(torch.einsum("qhd,mhd->hqm", q, k) / q.shape[-1] ** 0.5, dim=-1)


def test_balancing_changes_nothing_but_what_rounding_loses() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(n, 2, 32, generator=generator) for n in (16, 200))
    k[..., ::8] *= 20  # a few channels are large in keys and small in queries, as in real models
    q[..., ::8] /= 20
    peak = q.abs().amax(dim=0)
    wanted = attention(q, k)
    errors = {}
    for bits in (8, 2):
        for balanced in (True, False):
            codec = s.Affine(bits=bits, axis="token", group=32, balanced=balanced).build()
            basis = codec.fit(k, peak)
            read = codec.reader(codec.encode(k, basis), basis, 32, 1).read_all()
            errors[bits, balanced] = float((attention(q, read) - wanted).abs().max())
            assert set(basis) == ({"balance"} if balanced else set())
    assert errors[8, True] < 0.005
    assert errors[2, True] < 0.3 * errors[2, False]


def test_balancing_a_dead_channel_leaves_it_alone() -> None:
    codec = s.Affine(axis="token", balanced=True).build()
    k = torch.randn(40, 1, 32)
    k[..., 3] = 0
    basis = codec.fit(k, torch.ones(1, 32))
    read = codec.reader(codec.encode(k, basis), basis, 32, 1).read_all()
    assert read.isfinite().all() and basis["balance"][0, 0, 3] == 1


def test_a_layer_without_demoted_rows_seals_as_the_kept_ones(lab: Any) -> None:
    shape = lab.make_shape()
    prompt = lab.make_prompt(shape, N, 100)
    slots = (
        '{"budget": {"kind": "pyramid", "rate": 0.6, "beta": 20}, "evicted": {"kind": "demote", "balanced": true}, '
        '"scorer": {"kind": "snap", "window": 32}}'
    )
    recipe = resolved("mikv", shape, slots=slots)
    demoted = [layer_layout(recipe, N, layer).num_demoted for layer in range(4)]
    assert demoted[0] == 0 and demoted[-1] > 0
    cache = lab.load(recipe, prompt, lab.prefill(recipe, prompt)[0])
    outs = lab.decode(cache, prompt, N, N + 100)
    assert all(out.isfinite().all() for out in outs)
    assert cache.nbytes() <= bound_nbytes(recipe, shape, N, 100, 1, 4)


@pytest.mark.parametrize("budget", ['"kind": "uniform", "rate": 0.4', '"kind": "pyramid", "rate": 0.6'])
def test_demoted_rows_are_rotated_whatever_packs_the_kept_ones(budget: str, lab: Any) -> None:
    shape = lab.make_shape()
    prompt = lab.make_prompt(shape, N, 100)
    slots = (
        f'{{"budget": {{{budget}, "heads": "shared"}}, "scorer": {{"kind": "snap", "window": 32}}, '
        '"key_codec": {"kind": "lowrank", "share": 1.0}, "value_codec": {"kind": "dense", "dtype": "float32"}, '
        '"evicted": {"kind": "demote", "key_bits": 8, "value_bits": 8, "group": 16}}'
    )
    recipe = resolved("mikv", shape, slots=slots)
    outs = lab.decode(lab.load(recipe, prompt, lab.prefill(recipe, prompt)[0]), prompt, N, N + 100)
    for layer, out in enumerate(outs):  # generated rows are sealed in either tier by now
        expected = lab.dense(prompt, layer, torch.arange(N), N + 99)
        assert float((out[-1] - expected).norm() / expected.norm()) < 0.05


# --- layers that share --------------------------------------------------------------------------------------


def joined_rows(prompt: Any, layers: range, of_values: bool) -> Tensor:
    tensors = prompt.v if of_values else prompt.k_pre
    return torch.cat([tensors[layer][:N].flatten(1) for layer in layers], dim=1)


@pytest.mark.parametrize("name", ["xkv", "xkv-kv"])
def test_a_group_is_the_truncated_svd_of_its_layers_side_by_side(name: str, lab: Any) -> None:
    shape = lab.make_shape(layers=6)
    prompt = lab.make_prompt(shape, N)
    recipe = resolved(name, shape)
    encoded, _ = lab.prefill(recipe, prompt)
    cache = lab.load(recipe, prompt, encoded)
    for group in (range(4), range(4, 6)):
        for of_values in (False, True) if name == "xkv-kv" else (False,):
            codec = recipe.value_codec if of_values else recipe.key_codec
            whole = joined_rows(prompt, group, of_values)
            rank = codec.rank * len(group)
            u, sv, vt = torch.linalg.svd(whole.double(), full_matrices=False)
            best = (u[:, :rank] * sv[:rank]) @ vt[:rank]
            bases = [cache._layers[layer].base for layer in group]
            readers = [base.value_reader if of_values else base.key_reader for base in bases]
            read = torch.cat([reader.read_all().flatten(1) for reader in readers], dim=1)
            assert (read - whole).norm() <= 1.02 * (best - whole).norm() + 0.01 * whole.norm()
    part = Part.VALUES if name == "xkv-kv" else Part.KEYS
    assert [part in one.tensors for one in encoded] == [True, False, False, False, True, False]


def test_a_group_of_one_layer_is_that_layer_alone(lab: Any) -> None:
    shape = lab.make_shape()
    prompt = lab.make_prompt(shape, N)
    alone = resolved("xkv", shape, slots='{"sharing": {"kind": "none"}}')
    grouped = resolved("xkv", shape, slots='{"sharing": {"kind": "groups", "layers": 1}}')
    for one, other in zip(lab.prefill(alone, prompt)[0], lab.prefill(grouped, prompt)[0], strict=True):
        for part, tensors in one.tensors.items():
            assert all(torch.equal(tensor, other.tensors[part][key]) for key, tensor in tensors.items())


def test_layers_of_a_group_may_arrive_in_any_order(lab: Any) -> None:
    shape = lab.make_shape(layers=6)
    prompt = lab.make_prompt(shape, N, 8)
    recipe = resolved("xkv", shape)
    encoded, _ = lab.prefill(recipe, prompt)
    expected = lab.decode(lab.load(recipe, prompt, encoded), prompt, N, N + 8)
    late = lab.load(recipe, prompt, encoded[::-1])
    assert late.nbytes() == lab.load(recipe, prompt, encoded).nbytes()
    assert all(map(torch.equal, lab.decode(late, prompt, N, N + 8), expected))


# --- streaming ----------------------------------------------------------------------------------------------


def test_streaming_attends_to_sinks_right_before_the_local_rows(lab: Any) -> None:
    shape = lab.make_shape()
    prompt = lab.make_prompt(shape, N, 100)
    recipe = replace(resolved("streaming", shape), window=s.ExactEnds(4, 0, 0.1, 16, "native", "cache"))
    cache = lab.load(recipe, prompt, lab.prefill(recipe, prompt)[0])
    outs = lab.decode(cache, prompt, N, N + 100)
    for new in (0, 40, 99):
        position = N + new
        begin = (position + 1 - 1 - recipe.window.local_rows(N)) // 16 * 16  # sealed before this row came
        rows = torch.cat((torch.arange(4), torch.arange(begin, position + 1)))
        places = torch.arange(len(rows))
        for layer in range(shape.num_layers):
            k = lab.rope(prompt.k_pre[layer][rows], places)
            q_pre = lab.rope(prompt.q[layer][[position]], torch.tensor([-position]))
            q = lab.rope(q_pre, places[-1:])[0]
            weights = torch.softmax(torch.einsum("hd,mhd->hm", q, k.repeat_interleave(2, dim=1)) / 4, dim=-1)
            expected = torch.einsum("hm,mhd->hd", weights, prompt.v[layer][rows].repeat_interleave(2, dim=1))
            assert torch.allclose(outs[layer][new], expected, atol=2e-4)


def test_a_fresh_cache_has_nothing_to_seal(lab: Any) -> None:
    shape = lab.make_shape(layers=2)
    prompt = lab.make_prompt(shape, 512, 4)
    recipe = resolved("streaming", shape, 512, '{"window": {"kind": "ends", "sinks": 4, "seal_block": 16}}')
    encoded, _ = lab.prefill(recipe, prompt)
    cache, other = lab.load(recipe, prompt, encoded), lab.load(recipe, prompt, encoded)
    cache.seal(512)
    outs = lab.decode(cache, prompt, 512, 516), lab.decode(other, prompt, 512, 516)
    assert all(map(torch.equal, *outs))


def test_an_endless_stream_takes_constant_bytes(lab: Any) -> None:
    shape = lab.make_shape(layers=2)
    prompt = lab.make_prompt(shape, N, 1500)
    recipe = resolved("streaming", shape)
    cache = lab.load(recipe, prompt, lab.prefill(recipe, prompt)[0])
    held = []
    for begin in range(N, N + 1500, 100):
        lab.decode(cache, prompt, begin, begin + 100, run=8)
        held.append(cache.nbytes())
    assert len(set(held)) == 1
