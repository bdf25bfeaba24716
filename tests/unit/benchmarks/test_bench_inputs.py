"""What the bench feeds the engines, and what it compares them with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvsluice.benchmarks import baseline, host_cases, step_cases
from kvsluice.benchmarks.kernel_cases import Inputs
from kvsluice.benchmarks.selection import HeldSelection, force
from kvsluice.benchmarks.synthetic import SyntheticLayers
from kvsluice.compression.recipe import fill, get_recipe, recipe_names, resolve
from kvsluice.compression.retrieval import Landmarks
from kvsluice.compression.slots import ChunkLandmarks
from kvsluice.kernels.dispatch import REFERENCE, TRITON, forced
from kvsluice.models.config import SHAPES
from kvsluice.models.forward import forward_tokens
from kvsluice.models.model import Model
from kvsluice.models.sampling import SamplingParams
from kvsluice.models.weights import random_weights
from kvsluice.services.decode.engine import DecodeEngine, DecodeRequest, EmittedChoice, FinishedEvent
from kvsluice.services.model_shape import model_shape
from kvsluice.services.prefill.flops import prompt_flops

CPU = torch.device("cpu")


def small(name: str, **changes) -> Model:
    """A published shape made narrow and four layers deep, with random weights."""
    full = SHAPES[name]
    config = replace(
        full,
        num_layers=4,
        hidden_size=64,
        intermediate_size=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        vocab_size=127,
        layer_windows=full.layer_windows[:4],
        **changes,
    )
    return Model(config, random_weights(config, torch.float32, CPU, seed=1), "random")


@pytest.mark.parametrize("name", recipe_names())
def test_caches_take_synthetic_layers_of_every_recipe(name):
    model = small("llama-3.1-8b")
    shape, context = model_shape(model.config), 1500
    resolved = resolve(get_recipe(name), shape, context, {"key_codec": {"kind": "lowrank", "rank": 16, "bits": 8}})
    assert resolved.fallback_reason is None
    engine = DecodeEngine(model, 1 << 30)
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    engine.open(DecodeRequest("r", 1, context, resolved.recipe, params))
    layers = SyntheticLayers(resolved.recipe, shape, context, model.dtype, torch.Generator().manual_seed(0))
    for layer in range(4):
        engine.add_layer("r", layers.layer(layer))
    engine.commit("r", [3] * context, [EmittedChoice((5,))])
    events = []
    while engine.has_work:
        events += engine.step()
    assert isinstance(events[-1], FinishedEvent), events[-1]  # logits that are not finite would have failed it


def test_synthetic_values_have_unit_variance_whatever_packs_them():
    shape = model_shape(SHAPES["llama-3.1-8b"])
    for name in ("exact", "kivi", "sluice", "shadowkv", "fp8"):
        recipe = fill(get_recipe(name), shape, {})
        encoded = SyntheticLayers(recipe, shape, 4096, torch.float32, torch.Generator().manual_seed(0)).layer(0)
        for codec, part, prefix in ((recipe.key_codec, 1, ""), (recipe.value_codec, 2, "value_")):
            names = codec.basis_specs(shape.num_kv_heads, shape.head_dim)
            basis = {one: encoded.tensors[3][prefix + one] for one in names}
            rows = codec.build().reader(encoded.tensors[part], basis, shape.head_dim, 1).read_all().float()
            assert float(rows.std()) == pytest.approx(1, abs=0.1), (name, part)
            assert abs(float(rows.mean())) < 0.1


@pytest.mark.parametrize("name", ["llama-3.1-8b", "smollm2-135m", "mistral-7b-v0.1", "qwen2.5-7b", "qwen3-8b"])
def test_transformers_computes_with_our_weights_and_no_copy_of_them(name):
    model = small(name)
    other = baseline.transformers_model(model)
    ids = torch.arange(40) % 127
    with torch.no_grad():
        got = other(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(got, forward_tokens(model, ids), rtol=1e-4, atol=1e-4)
    ours = model.weights.layers[1].qkv.untyped_storage().data_ptr()
    assert other.model.layers[1].self_attn.v_proj.weight.untyped_storage().data_ptr() == ours


def test_a_baseline_step_appends_to_its_cache():
    model = small("llama-3.1-8b")
    step = baseline.decode_step(baseline.transformers_model(model), model, 50, seed=0)
    first = [int(step()) for _ in range(3)]
    again = baseline.decode_step(baseline.transformers_model(model), model, 50, seed=0)
    assert [int(again()) for _ in range(3)] == first


def test_operations_of_a_prompt():
    config = SHAPES["llama-3.1-8b"]
    shape, n = model_shape(config), 131_072

    def flops(recipe, shape=shape, n=n) -> float:
        return prompt_flops(config, shape, recipe, n).of_model

    whole = flops(None)
    # 1.8e15 of projections and 4.5e15 of causal attention
    assert whole == pytest.approx(6.3e15, rel=0.03)
    exact = flops(fill(get_recipe("exact"), shape, {}))
    assert 30.9 / 32 < exact / whole < 31.5 / 32
    sluice = flops(fill(get_recipe("sluice"), shape, {"tsp_layer": 15, "tsp_rate": 0.2}))
    assert 0.5 < sluice / exact < 0.6
    windowed = replace(shape, layer_windows=(4096,) * 32)
    assert flops(None, windowed) < 0.4 * whole
    assert flops(None, windowed, 4096) == flops(None, shape, 4096)


@pytest.mark.parametrize("share", [0.0, 0.6, 0.9, 1.0])
def test_a_share_of_the_chunks_stays(share):
    held = HeldSelection(share, seed=3)
    chosen = torch.zeros(1, 2, 50, dtype=torch.int64)
    before = None
    for _ in range(20):
        held.begin_step()
        places = [held.replaced(chosen, 400) for _ in range(3)]
        assert all(place.shape == chosen.shape and bool((place.diff(dim=-1) > 0).all()) for place in places)
        assert int(max(place.max() for place in places)) < 400
        assert not torch.equal(places[0], places[1])
        if before is not None:
            for now, last in zip(places, before, strict=True):
                for head in range(2):
                    stayed = len(set(now[0, head].tolist()) & set(last[0, head].tolist()))
                    assert stayed == round(share * 50)
        before = places
    assert held.hit_rate == pytest.approx(share)
    assert held.calls == 60


def test_more_stays_where_nearly_all_chunks_are_chosen():
    held = HeldSelection(0.0, seed=3)
    last: set[int] = set()
    for _ in range(4):
        held.begin_step()
        now = set(held.replaced(torch.zeros(1, 1, 30, dtype=torch.int64), 40)[0, 0].tolist())
        if last:
            assert len(now & last) == 20
        last = now
    assert held.hit_rate == pytest.approx(20 / 30)


def test_a_batched_step_keeps_the_same_share(monkeypatch):
    """Rows of another table are left alone, and what is chosen is what sequences one by one would be given."""
    from kvsluice.kernels.step_attention.tables import CHOICE_FIELDS

    monkeypatch.setattr("kvsluice.benchmarks.selection.held._is_capturing", lambda x: False)
    held = HeldSelection(0.6, seed=3)
    table = torch.zeros(3, CHOICE_FIELDS, dtype=torch.int64)
    table[0, 2], table[0, 9] = 400, 50
    table[2, 2], table[2, 7], table[2, 9] = 300, 80, 30
    counts = torch.tensor([[50, 50], [-9, -9], [30, 20]], dtype=torch.int32)
    last: dict[tuple[int, int], set[int]] = {}
    for step in range(5):
        held.begin_step()
        table[2, 7] = 80 + 8 * step  # generated rows that were sealed, of which nothing is chosen
        for layer in range(2):
            chosen = torch.full((3, 2, 64), -7, dtype=torch.int32)
            held.choose(layer, table, chosen, counts)
            assert (chosen[1] == -7).all()
            for row, head, count, most in ((0, 0, 50, 400), (0, 1, 50, 400), (2, 0, 30, 300), (2, 1, 20, 300)):
                now = chosen[row, head].tolist()
                assert now[count:] == [-7] * (64 - count)
                assert len(set(now[:count])) == count and 0 <= min(now[:count]) <= max(now[:count]) < most
                if layer == 0:
                    if (row, head) in last:
                        assert len(last[row, head] & set(now[:count])) == round(0.6 * count)
                    last[row, head] = set(now[:count])
                else:
                    assert set(now[:count]) != last[row, head]
    assert held.hit_rate == pytest.approx(0.6)
    assert held.calls == 10


def test_selections_are_forced_within_the_context_only():
    retrieval = Landmarks(ChunkLandmarks(chunk=4, outliers=0, budget_tokens=8, budget_rate=1e-9))
    scores = torch.arange(20.0).expand(1, 2, 20)
    plain, _ = retrieval.select(scores, 2, None, 80)
    held = HeldSelection(0.5, seed=0)
    with force(held):
        forced, valid = retrieval.select(scores, 2, None, 80)
    assert valid is None
    assert forced.shape == plain.shape
    assert held.calls == 1
    assert torch.equal(retrieval.select(scores, 2, None, 80)[0], plain)
    assert plain.tolist() == [[[18, 19]] * 2]


def test_every_call_fetches_all_that_it_wants(monkeypatch):
    totals = torch.zeros(2, dtype=torch.int64)
    plain = host_cases.fetch_chosen

    def counted(key, table, chosen, counts, places, none, most_slots):
        plain(key, table, chosen, counts, places, totals, most_slots)

    monkeypatch.setattr(host_cases, "fetch_chosen", counted)
    monkeypatch.setattr(host_cases, "folder", lambda op: "hot_set")
    monkeypatch.setattr(host_cases, "SEQUENCES", 2)
    given = Inputs(small("llama-3.1-8b").config, 200, CPU, torch.float32, seed=0)
    assert list(host_cases.host_cases(given)) == [], "there is no kernel on a CPU"
    with forced(TRITON), torch.inference_mode():
        cases = list(host_cases.host_cases(given))
        for case in cases:
            totals.zero_()
            for _ in range(6):
                case.action()
            assert totals[0] == totals[1] > 0
            assert case.link_bytes > 0
    heads, dim = given.config.num_kv_heads, given.config.head_dim
    assert cases[1].link_bytes == 2 * heads * (200 // 8 // 4) * 8 * dim * 2


def test_a_step_over_many_caches_is_compared_with_each_by_itself(monkeypatch):
    monkeypatch.setattr(step_cases, "RECIPES", ("exact", "kivi", "sluice"))
    monkeypatch.setattr(step_cases, "SEQUENCES", (2,))
    given = Inputs(small("llama-3.1-8b").config, 200, CPU, torch.float32, seed=0)
    with forced(TRITON), torch.inference_mode():  # kernels are interpreted here, where there is no GPU
        cases = list(step_cases.step_cases(given))
        together = [case.action() for case in cases]
    # the prompt is too short for sluice
    assert [case.name for case in cases] == [f"step_attention, {name} × 2" for name in ("exact", "kivi")]
    with torch.inference_mode(), forced(REFERENCE):
        for case, got in zip(cases, together, strict=True):
            torch.testing.assert_close(got, torch.cat(case.reference()), rtol=1e-3, atol=1e-4)
            assert case.bytes_moved > 0
