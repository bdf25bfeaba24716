"""What must hold of every recipe: each test here runs over all that are registered, and over a toy that `conftest`
defines in one place."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvsluice.compression import bound_nbytes, make_cache, make_compressor
from kvsluice.compression import slots as s
from kvsluice.compression.interfaces import EncodedLayer, LayerObs, Part, SequenceCache
from kvsluice.compression.layout import grown_tier, layer_layout, layer_specs, sealed_end
from kvsluice.compression.recipe import Recipe, fill, get_recipe, neutral, recipe_names, resolve
from kvsluice.compression.sizes import encoded_nbytes
from kvsluice.errors import FrameMismatch

N, NEW = 761, 110  # as the fixture `prompt` has them


def held(thing: object) -> dict[int, Tensor]:
    """Every tensor that can be reached from an object, by the address of its storage."""
    found: dict[int, Tensor] = {}
    seen, todo = set(), [thing]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, (type, ModuleType, FunctionType)):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            found[one.untyped_storage().data_ptr()] = one
        else:
            todo += gc.get_referents(one)
    return found


def state(cache: Any) -> list[Tensor]:
    """All rows of a cache that are in use, in a fixed order."""
    out: list[Tensor] = []
    for _, layer in sorted(cache._layers.items()):
        out += layer.shared_tensors()
        out += [] if layer.grown is None else layer.grown.tensors()
        out += layer.tail.rows() if layer.tail.num_rows else []
    return [bits(t) for t in out]


def bits(tensor: Tensor) -> Tensor:
    """8-bit floats as bytes, because torch compares and fills none."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def same(left: SequenceCache, right: SequenceCache) -> bool:
    a, b = state(left), state(right)
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(left: list[Tensor], right: list[Tensor], atol: float = 2e-5) -> bool:
    return all(torch.allclose(x, y, atol=atol) for x, y in zip(left, right, strict=True))


# --- the invariants -----------------------------------------------------------------------------------------


def test_at_rate_1_native_codecs_and_full_budget_it_equals_exact(recipe: Recipe, prompt: Any, lab: Any) -> None:
    encoded, passed = lab.prefill(neutral(recipe), prompt)
    assert all(len(rows) == N for rows in passed)
    outs = lab.decode(lab.load(neutral(recipe), prompt, encoded), prompt, N, N + NEW)
    exact = get_recipe("exact")
    expected = lab.decode(lab.load(exact, prompt, lab.prefill(exact, prompt)[0]), prompt, N, N + NEW)
    assert close(outs, expected)
    assert torch.allclose(expected[0][-1], lab.dense(prompt, 0, torch.arange(N), N + NEW - 1), atol=2e-5)


def test_caches_stepped_in_turn_do_not_touch_each_other(recipe: Recipe, lab: Any) -> None:
    prompts = [lab.make_prompt(lab.make_shape(), N, 40, seed=seed) for seed in (1, 2)]
    encoded = [lab.prefill(recipe, one)[0] for one in prompts]
    alone = [lab.decode(lab.load(recipe, p, e), p, N, N + 40) for p, e in zip(prompts, encoded, strict=True)]
    caches = [lab.load(recipe, p, e) for p, e in zip(prompts, encoded, strict=True)]
    for position in range(N, N + 40):
        for one, cache, expected in zip(prompts, caches, alone, strict=True):
            outs = lab.step(cache, one, position, position + 1)
            cache.seal(position + 1)
            assert all(torch.equal(out[0], e[position - N]) for out, e in zip(outs, expected, strict=True))


def test_a_layer_built_in_pieces_equals_one_shot(recipe: Recipe, prompt: Any, lab: Any) -> None:
    expected, passed = lab.prefill(recipe, prompt)
    compressor = make_compressor(recipe, prompt.shape)
    for layer, rows in enumerate(passed):
        pieces = [prompt.obs(layer, piece, 0) for piece in rows.split(97)]
        joined = {name: torch.cat([getattr(p, name) for p in pieces]) for name in ("positions", "k_pre", "k", "v")}
        window = compressor.query_window(layer)
        whole = prompt.obs(layer, rows, window, compressor.wants_mass)
        seen = {"q_window": whole.q_window, "mass": whole.mass, "query_peak": whole.query_peak}
        obs = LayerObs(layer, num_prompt_tokens=N, **seen, **joined)
        ready, selected = compressor.finish_layer(obs)
        for one in ready:
            for part, group in expected[one.layer].tensors.items():
                assert all(torch.equal(tensor, one.tensors[part][name]) for name, tensor in group.items())
        if layer + 1 < len(passed):
            assert torch.equal(rows if selected is None else rows[selected], passed[layer + 1])


def test_appending_many_rows_equals_one_by_one(recipe: Recipe, prompt: Any, lab: Any) -> None:
    encoded, _ = lab.prefill(recipe, prompt)
    singles, bulk = lab.load(recipe, prompt, encoded), lab.load(recipe, prompt, encoded)
    outs = lab.decode(singles, prompt, N, N + NEW), lab.decode(bulk, prompt, N, N + NEW, run=64)
    assert close(*outs) and same(singles, bulk)


def test_nbytes_are_the_bytes_really_held(recipe: Recipe, prompt: Any, lab: Any) -> None:
    encoded, _ = lab.prefill(recipe, prompt)
    assert sum(one.nbytes() for one in encoded) == encoded_nbytes(recipe, prompt.shape, N, 4)
    cache = lab.load(recipe, prompt, encoded)
    bound = bound_nbytes(recipe, prompt.shape, N, NEW, 1, 4)
    for begin in range(N, N + NEW, 10):
        real = sum(t.untyped_storage().nbytes() for t in held(cache).values())
        assert cache.nbytes() == real == cache.shared_nbytes() + cache.own_nbytes() <= bound
        lab.decode(cache, prompt, begin, begin + 10)
    if recipe.window.seal_block:
        longer = bound_nbytes(recipe, prompt.shape, N, 10_000, 1, 4) - bound
        exact = bound_nbytes(get_recipe("exact"), prompt.shape, N, 10_000 - NEW, 1, 4)
        assert longer < exact  # what is sealed stays packed


def test_the_bound_counts_the_prompt_once_for_all_choices(recipe: Recipe, prompt: Any, lab: Any) -> None:
    cache = lab.load(recipe, prompt, lab.prefill(recipe, prompt)[0])
    forks = [cache, cache.fork(), cache.fork()]
    for one in forks:
        lab.decode(one, prompt, N, N + 50)
    held_bytes = cache.shared_nbytes() + sum(one.own_nbytes() for one in forks)
    assert held_bytes == sum(t.untyped_storage().nbytes() for t in held(forks).values())
    assert held_bytes <= bound_nbytes(recipe, prompt.shape, N, 50, 3, 4)


def test_a_fork_equals_an_independent_cache(recipe: Recipe, prompt: Any, lab: Any) -> None:
    encoded, _ = lab.prefill(recipe, prompt)
    other = lab.make_prompt(prompt.shape, N, NEW, seed=9)
    mother = lab.load(recipe, prompt, encoded)
    lab.decode(mother, prompt, N, N + 45)
    child = mother.fork()
    assert child.counter.bytes_read == 0 and child.shared_nbytes() == mother.shared_nbytes()
    lab.decode(mother, prompt, N + 45, N + NEW)
    outs = lab.decode(child, other, N + 45, N + NEW)
    single = lab.load(recipe, prompt, encoded)
    lab.decode(single, prompt, N, N + 45)
    expected = lab.decode(single, other, N + 45, N + NEW)
    assert all(torch.equal(x, y) for x, y in zip(outs, expected, strict=True)) and same(child, single)


def test_kept_positions_are_sorted_and_of_the_prompt(recipe: Recipe, prompt: Any, lab: Any) -> None:
    encoded, passed = lab.prefill(recipe, prompt)
    for one, rows in zip(encoded, passed, strict=True):
        assert rows.diff().gt(0).all() and rows[0] >= 0 and rows[-1] == N - 1
        for tensor in one.tensors.get(Part.POSITIONS, {}).values():
            assert tensor.diff(dim=0).gt(0).all() and tensor.min() >= 0 and tensor.max() < N
        cache = lab.load(recipe, prompt, encoded)
        held_rows = cache._layers[one.layer]
        segments = [x for x in (held_rows.base, held_rows.demoted) if x is not None]
        assert all(torch.isin(x.row_positions(), rows).all() for x in segments)
        if recipe.evicted.keeps:  # every row is there once, for every head
            every = torch.cat([x.row_positions() for x in segments], dim=1).sort(dim=1).values
            between = torch.arange(recipe.window.sinks, sealed_end(recipe, N, N))
            assert torch.equal(every, between.expand(len(every), -1))


def test_the_state_is_rebuilt_by_replay(recipe: Recipe, prompt: Any, lab: Any) -> None:
    encoded, _ = lab.prefill(recipe, prompt)
    live = lab.load(recipe, prompt, encoded)
    lab.decode(live, prompt, N, N + 77)
    copied = [
        EncodedLayer(e.layer, {p: {n: t.clone() for n, t in g.items()} for p, g in e.tensors.items()}) for e in encoded
    ]
    again = lab.load(recipe, prompt, copied)
    lab.decode(again, prompt, N, N + 77)
    assert same(live, again)
    late = lab.decode(live, prompt, N + 77, N + NEW), lab.decode(again, prompt, N + 77, N + NEW)
    assert all(torch.equal(x, y) for x, y in zip(*late, strict=True))


@pytest.mark.parametrize("every", [16, 40])
def test_rows_that_were_kept_before_sealing_rebuild_the_state(
    recipe: Recipe, every: int, prompt: Any, lab: Any
) -> None:
    encoded, _ = lab.prefill(recipe, prompt)
    alone = lab.load(recipe, prompt, encoded)
    kept, begin, last = [], N, N + NEW - 30
    for position in range(N, last):
        lab.step(alone, prompt, position, position + 1)
        after = position + 1
        drops = alone.rows_until_seal(position) == 1
        if after - begin >= every or drops or after == last:
            kept.append((begin, alone.rows(begin, after)))
            begin = after
        alone.seal(after)
    other = lab.load(recipe, prompt, encoded)
    for at, layers in kept:
        other.put_rows(at, layers)
    assert all(torch.equal(a, b) for a, b in zip(state(alone), state(other), strict=True))
    assert other.nbytes() <= bound_nbytes(recipe, prompt.shape, N, NEW, 1, 4)
    for a, b in zip(*(lab.decode(cache, prompt, last, N + NEW) for cache in (alone, other)), strict=True):
        assert torch.equal(a, b)


def test_rows_that_do_not_follow_are_refused(recipe: Recipe, prompt: Any, lab: Any) -> None:
    encoded, _ = lab.prefill(recipe, prompt)
    cache, other = (lab.load(recipe, prompt, encoded) for _ in range(2))
    lab.step(cache, prompt, N, N + 1)
    rows = cache.rows(N, N + 1)
    wrong = {
        "begin": (N + 1, rows),
        "layers": (N, rows[1:]),
        "order": (N, rows[::-1]),
        "tensors": (N, [EncodedLayer(one.layer, {Part.KEYS: one.tensors[Part.TAIL]}) for one in rows]),
        "shape": (N, [EncodedLayer(one.layer, {Part.TAIL: {"k": one.tensors[Part.TAIL]["k"][:, :1],
                                                           "v": one.tensors[Part.TAIL]["v"]}}) for one in rows]),
        "dtype": (N, [EncodedLayer(one.layer, {Part.TAIL: {name: t.to(torch.int8) for name, t in
                                                           one.tensors[Part.TAIL].items()}}) for one in rows]),
        "none": (N, [EncodedLayer(one.layer, {Part.TAIL: {name: t[:0] for name, t in
                                                          one.tensors[Part.TAIL].items()}}) for one in rows]),
    }  # fmt: skip
    before = [t.clone() for t in state(other)]
    for what, (begin, layers) in wrong.items():
        with pytest.raises(FrameMismatch):
            other.put_rows(begin, layers)
            pytest.fail(what)
    assert all(torch.equal(a, b) for a, b in zip(before, state(other), strict=True)), "nothing was appended"
    other.put_rows(N, rows)


def test_sealing_follows_positions_alone(recipe: Recipe, prompt: Any, lab: Any) -> None:
    encoded, _ = lab.prefill(recipe, prompt)
    cache = lab.load(recipe, prompt, encoded)
    for position in range(N, N + NEW):
        lab.step(cache, prompt, position, position + 1)
        cache.seal(position + 1)
        expected = sealed_end(recipe, N, position + 1) if recipe.window.seal_block else sealed_end(recipe, N, N)
        assert all(layer.tail.begin == expected for layer in cache._layers.values())
    before = state(cache)
    cache.seal(N + NEW)
    assert all(x is y or torch.equal(x, y) for x, y in zip(before, state(cache), strict=True))


def chosen_chunks(cache: Any, layer: int, q: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's choice for a query, made with its own selection: chunks and valid [1, Hkv, K]."""
    one = cache._layers[layer]
    segments = [x for x in (one.base, one.grown) if x is not None]
    scores = torch.cat([one.kit.retrieval.score(q, x.summary) for x in segments], dim=-1)
    heads = one.kit.shape.num_kv_heads
    chunks, valid = one.kit.retrieval.select(scores, heads, one._hidden_chunks(at, segments), N)
    return chunks, torch.ones_like(chunks, dtype=torch.bool) if valid is None else valid


def test_poisoned_unselected_chunks_leave_the_output_unchanged(recipe: Recipe, prompt: Any, lab: Any) -> None:
    if not recipe.retrieval.needs_grid:
        assert isinstance(recipe.retrieval, s.AttendAll)  # it reads all that it keeps
        return
    cache = lab.load(recipe, prompt, lab.prefill(recipe, prompt)[0])
    lab.decode(cache, prompt, N, N + NEW)
    at = torch.tensor([N + NEW - 1])
    for layer in range(4):
        q = prompt.q[layer][at]
        clean = cache.attend(layer, q, at)
        chunks, valid = chosen_chunks(cache, layer, q, at)
        one, begin, poisoned = cache._layers[layer], 0, 0
        for segment in (one.base, one.grown):
            if segment is None:
                continue
            wanted = torch.zeros(segment.num_rows, prompt.shape.num_kv_heads, dtype=torch.bool)
            for head in range(prompt.shape.num_kv_heads):
                mine = chunks[0, head][valid[0, head]] - begin
                mine = mine[(mine >= 0) & (mine < segment.num_chunks)]
                rows = mine[:, None] * recipe.retrieval.chunk + torch.arange(recipe.retrieval.chunk)
                wanted[rows.flatten(), head] = True
            begin += segment.num_chunks
            for tensor in (*segment.keys.values(), *segment.values.values()):
                if not tensor.is_floating_point():
                    continue
                keep = wanted if tensor.dim() > 1 and tensor.shape[1] == wanted.shape[1] else wanted.any(1)
                if len(tensor) != len(keep):  # groups of rows
                    keep = torch.stack([g.any(0) for g in keep.split(-(-len(keep) // len(tensor)))])
                tensor[~keep] = torch.nan
                poisoned += int((~keep).sum())
        assert poisoned > 0
        assert torch.equal(cache.attend(layer, q, at), clean) and clean.isfinite().all()


def chunk_bytes(codec: s.CodecFilling, chunk: int, dim: int) -> int:
    """Bytes of one chunk of one head, told anew."""
    if isinstance(codec, s.Affine):
        packed = chunk * dim * codec.bits // 8
        return packed + 4 * (dim if codec.axis == "channel" else chunk * -(-dim // codec.group))
    if isinstance(codec, s.LowRank):
        return chunk * (codec.rank * 2 if codec.bits == 16 else codec.rank * codec.bits // 8 + 4)
    return chunk * (dim + 4 if codec.kind == "toy-signed" else dim * 2)


def test_bytes_read_are_those_of_what_a_step_touches(recipe: Recipe, prompt: Any, lab: Any) -> None:
    cache = lab.load(recipe, prompt, lab.prefill(recipe, prompt)[0])
    steps = 50
    lab.decode(cache, prompt, N, N + steps)
    before, position = cache.counter.bytes_read, N + steps
    lab.step(cache, prompt, position, position + 1)
    heads, dim = prompt.shape.num_kv_heads, prompt.shape.head_dim
    item = 2 if recipe.window.dtype == "bfloat16" else 4
    sealed = sealed_end(recipe, N, position) if recipe.window.seal_block else sealed_end(recipe, N, N)
    expected = 0
    for layer in range(prompt.shape.num_layers):
        at = layer_layout(recipe, N, layer)
        specs = layer_specs(recipe, prompt.shape, N, layer, "float32")
        num_grown = sealed - at.sealed_end
        expected += 2 * heads * dim * item * (at.num_sinks + position + 1 - sealed)
        expected += sum(x.nbytes for part in (Part.BASIS, Part.POSITIONS) for x in specs.get(part, {}).values())
        if not recipe.retrieval.needs_grid:
            lead = layer_specs(recipe, prompt.shape, N, recipe.sharing.group(layer, 4)[0], "float32")
            for part in (Part.KEYS, Part.VALUES):
                expected += sum(x.nbytes for x in (specs.get(part) or lead.get(part, {})).values())
            expected += 4 * heads * at.num_demoted
            if num_grown and not recipe.budget.fixed:
                tier = recipe.tiers()[grown_tier(recipe, at)]
                for codec in (tier.key_codec, tier.value_codec):
                    expected += sum(x.nbytes for x in codec.tensor_specs(num_grown, heads, dim, "float32").values())
                    expected += sum(x.nbytes for x in codec.basis_specs(heads, dim).values())  # for these rows again
            continue
        chunk = recipe.retrieval.chunk
        num_chunks = (at.num_sealed + num_grown) // chunk
        chosen = min(recipe.retrieval.selected_chunks(N), num_chunks - recipe.retrieval.outliers)
        both = chunk_bytes(recipe.key_codec, chunk, dim) + chunk_bytes(recipe.value_codec, chunk, dim)
        expected += chosen * heads * both
        expected += num_chunks * heads * (dim + 2 if recipe.retrieval.landmark_bits == 8 else 2 * dim)
        expected += recipe.retrieval.outliers * heads * (4 + 2 * chunk * dim * item)
    assert cache.counter.bytes_read - before == expected


@pytest.mark.parametrize("window", [40, 300])
def test_a_sliding_window_hides_rows_also_from_selection(recipe: Recipe, window: int, lab: Any) -> None:
    shape = lab.make_shape(windows=(None, window, window, None))
    prompt = lab.make_prompt(shape, N, 60)
    plain = neutral(recipe)
    encoded, passed = lab.prefill(plain, prompt)
    outs = lab.decode(lab.load(plain, prompt, encoded), prompt, N, N + 60, run=8)
    for layer in range(4):
        assert torch.allclose(outs[layer][-1], lab.dense(prompt, layer, passed[layer], N + 59), atol=2e-5)
    encoded, _ = lab.prefill(recipe, prompt)
    cache = lab.load(recipe, prompt, encoded)
    lab.decode(cache, prompt, N, N + 60)
    at = torch.tensor([N + 59])
    for layer in (1, 2):
        clean = cache.attend(layer, prompt.q[layer][at], at)
        # values of rows outside the window must not matter, whatever was chosen
        one = cache._layers[layer]
        if one.sinks is not None and recipe.window.positions == "original":
            one.sinks[1].fill_(1e4)
        for segment in [x for x in (one.base, one.demoted) if x is not None]:
            for tensor in segment.values.values():
                if tensor.is_floating_point() and len(tensor) == segment.num_rows:
                    outside = segment.row_positions() <= N + 59 - window
                    bits(tensor)[outside.T if outside.dim() == 2 else outside] = 120  # large, and finite in any dtype
        assert torch.equal(cache.attend(layer, prompt.q[layer][at], at), clean)


@pytest.mark.parametrize(("group", "dim"), [(1, 64), (3, 96), (4, 128), (8, 64)])
def test_groups_of_heads_and_head_sizes(recipe: Recipe, group: int, dim: int, lab: Any) -> None:
    shape = lab.make_shape(heads=2 * group, kv_heads=2, dim=dim)
    prompt = lab.make_prompt(shape, N, 40)
    for variant in (neutral(recipe), recipe):
        encoded, passed = lab.prefill(variant, prompt)
        outs = lab.decode(lab.load(variant, prompt, encoded), prompt, N, N + 40, run=16)
        assert all(out.isfinite().all() for out in outs)
        if variant is not recipe:
            expected = [lab.dense(prompt, layer, passed[layer], N + 39) for layer in range(4)]
            assert all(torch.allclose(out[-1], e, atol=5e-5) for out, e in zip(outs, expected, strict=True))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_tokens=st.integers(20, 1200), num_new=st.integers(1, 80), run=st.integers(1, 50), seed=st.integers(0, 99))
def test_any_length_runs_within_its_bound(
    recipe: Recipe, num_tokens: int, num_new: int, run: int, seed: int, lab: Any
) -> None:
    shape = lab.make_shape(heads=2, kv_heads=1, dim=8, layers=3)
    changes: dict[str, Any] = {}
    for slot in ("key_codec", "value_codec"):
        if getattr(recipe, slot).kind == "lowrank":
            changes[slot] = s.LowRank(rank=4)
    if isinstance(recipe.budget, s.PyramidBudget):
        changes["budget"] = replace(recipe.budget, num_layers=None)
    wanted = fill(replace(recipe, **changes), shape, {})
    effective = resolve(wanted, shape, num_tokens, {}).recipe
    prompt = lab.make_prompt(shape, num_tokens, num_new, seed=seed)
    encoded, _ = lab.prefill(effective, prompt)
    cache = lab.load(effective, prompt, encoded)
    outs = lab.decode(cache, prompt, num_tokens, num_tokens + num_new, run=run)
    assert all(out.isfinite().all() for out in outs)
    assert cache.nbytes() <= bound_nbytes(effective, shape, num_tokens, num_new, 1, 4)
    plain = neutral(effective)
    encoded, passed = lab.prefill(plain, prompt)
    outs = lab.decode(lab.load(plain, prompt, encoded), prompt, num_tokens, num_tokens + num_new, run=run)
    expected = lab.dense(prompt, 2, passed[2], num_tokens + num_new - 1)
    assert torch.allclose(outs[2][-1], expected, atol=2e-5)


def test_bfloat16_runs(recipe: Recipe, lab: Any) -> None:
    shape = lab.make_shape()
    prompt = lab.make_prompt(shape, N, 40, dtype=torch.bfloat16)
    encoded, _ = lab.prefill(recipe, prompt)
    assert sum(one.nbytes() for one in encoded) == encoded_nbytes(recipe, shape, N, 2)
    cache = lab.load(recipe, prompt, encoded)
    outs = lab.decode(cache, prompt, N, N + 40)
    assert all(out.dtype == torch.bfloat16 and out.isfinite().all() for out in outs)
    assert cache.nbytes() <= bound_nbytes(recipe, shape, N, 40, 1, 2)


def test_a_layer_of_other_tensors_is_refused_by_name(recipe: Recipe, prompt: Any, lab: Any) -> None:
    encoded, _ = lab.prefill(recipe, prompt)
    cache = make_cache(recipe, prompt.shape, N, lab.rope)
    part = Part.KEYS if Part.KEYS in encoded[0].tensors else Part.TAIL
    tensors = dict(encoded[0].tensors[part])
    name = next(iter(tensors))
    for broken in (
        {part: tensors | {name: tensors[name][:-1]}},
        {part: tensors | {name: tensors[name].to(torch.int32)}},
        {part: {}},
        {Part.HIDDEN: {"x": tensors[name]}},
    ):
        with pytest.raises(FrameMismatch, match=f"{part.name}|HIDDEN"):
            cache.add_layer(EncodedLayer(0, dict(encoded[0].tensors) | broken))
    cache.add_layer(encoded[0])
    with pytest.raises(FrameMismatch, match="already"):
        cache.add_layer(encoded[0])
    with pytest.raises(FrameMismatch, match="none of"):
        cache.add_layer(EncodedLayer(99, encoded[0].tensors))


def test_indices_outside_the_prompt_are_refused(recipe: Recipe, prompt: Any, lab: Any) -> None:
    encoded, _ = lab.prefill(recipe, prompt)
    for part in (Part.POSITIONS, Part.OUTLIERS):
        for name, tensor in encoded[3].tensors.get(part, {}).items():
            if tensor.dtype != torch.int32:
                continue
            for value in (-1, N):
                broken = tensor.clone()
                broken[-1] = value
                group = dict(encoded[3].tensors[part]) | {name: broken}
                cache = make_cache(recipe, prompt.shape, N, lab.rope)
                with pytest.raises(FrameMismatch, match=f"{part.name}.{name} is not within"):
                    cache.add_layer(EncodedLayer(3, dict(encoded[3].tensors) | {part: group}))


def test_a_new_recipe_is_one_place_and_one_registration(lab: Any) -> None:
    assert "toy" in recipe_names() and get_recipe("toy") is lab.toy
    assert Recipe.from_json(lab.toy.to_json()) == lab.toy
