"""Recall: rows that were not propagated come back in decode, whoever decodes and however the rows come together."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kvsluice.compression import make_cache
from kvsluice.compression.interfaces import EncodedLayer, Part
from kvsluice.compression.recipe import Recipe, get_recipe
from kvsluice.compression.sizes import encoded_nbytes
from kvsluice.errors import FrameMismatch, InvalidRequest
from kvsluice.kernels.rope import apply_rope
from kvsluice.models.forward import Rows, forward_rows
from kvsluice.models.model import Model
from kvsluice.services.decode.engine import DecodeRequest, EmittedChoice
from kvsluice.services.decode.start import check_ranks
from kvsluice.services.model_shape import model_shape
from tests.integration.engines.test_kept_rows import EVERY, TOKENS, check_going_on, kept_of, run_keeping
from tests.integration.engines.test_kept_sessions import first_turn, next_turn
from tests.integration.engines.test_overflow import pressed, run_with_depot, wipe
from tests.integration.engines.test_tiers import arena, oversubscribed, run_all

T, SIZE, STEPS = 1, 240, 24
TSP = {"kind": "tsp", "layer": T, "rate": 0.3, "window": 32, "kernel": 7, "recall": 0.1, "recall_step": 4}
CHUNKS = {
    "propagation": TSP | {"window": 40, "chunk_aligned": True, "recall_step": 8, "recall_bits": 4},
    "retrieval": {
        "kind": "chunks", "chunk": 4, "outliers": 0, "budget_tokens": 24, "budget_rate": 0.05, "landmark_bits": 8
    },
    "window": {"kind": "ends", "sinks": 4, "local": 16, "seal_block": 16},
}  # fmt: skip


def plain(**changed) -> Recipe:
    """Identity codecs, attention to every row that is there."""
    return get_recipe("exact", json.dumps({"propagation": TSP | changed}))


def chunks(every: int = 1, **changed) -> Recipe:
    """Packed rows, of which a step attends to few; rows that are generated are sealed."""
    slots = json.loads(json.dumps(CHUNKS))
    slots["propagation"] |= changed
    slots["retrieval"]["select_every"] = every
    return get_recipe("sluice", json.dumps(slots))


RECIPES = {"plain": plain(), "chunks": chunks(), "chunks of every fourth": chunks(4)}


@pytest.fixture(params=sorted(RECIPES))
def recipe(request) -> Recipe:
    return RECIPES[request.param]


def cache_of(model, encoded):
    size = len(encoded.ids)
    cache = make_cache(encoded.recipe, model_shape(model.config), size, lambda x, at: model.rotate(x, at, size))
    for layer in encoded.layers:
        cache.add_layer(layer)
    return cache


@torch.inference_mode()
def run(model, cache, size: int, ids, most: int = 1, seen=None):
    """Pass known tokens behind a prompt, `most` at once. Returns the last layer's rows."""
    at, out = size, []
    while at < size + len(ids):
        count = min(most, cache.rows_until_seal(at), size + len(ids) - at)
        rows = torch.tensor(ids[at - size : at - size + count])
        out.append(forward_rows(model, [Rows(rows, torch.arange(at, at + count), cache, size)]))
        at += count
        if seen is not None:
            seen.append(cache._recall.chunks.held)
        cache.seal(at)
    return torch.cat(out)


class Layerwise:
    """The same in plain torch, for identity codecs: lists of rows, a row of a step after the other."""

    def __init__(self, model, ids, selected, hidden, plan) -> None:
        self.model, self.plan, self.size = model, plan, len(ids)
        self.kept: list[list[tuple[int, torch.Tensor, torch.Tensor]]] = [[] for _ in range(model.config.num_layers)]
        self.hidden = hidden  # position -> what is kept of it behind T
        self.held: list[tuple[int, int]] = []
        x, at = model.embed(torch.tensor(ids)), torch.arange(len(ids))
        for layer in range(model.config.num_layers):
            x, _ = self.layer(layer, x, at)
            if layer == T:
                x, at = x[selected], at[selected]

    def layer(self, layer: int, x, at):
        """Rows at ascending positions through a layer; also the attention of the last of them, by position."""
        cos, sin = self.model.rope_tables(at, self.size)
        q, k, v = self.model.qkv(layer, x)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        self.kept[layer] += [(int(p), k[i], v[i]) for i, p in enumerate(at)]
        outs, weights = [], None
        group = q.shape[1] // k.shape[1]
        for i, p in enumerate(at.tolist()):
            rows = [row for row in self.kept[layer] if row[0] <= p]
            keys, values = (torch.stack([row[n] for row in rows]).repeat_interleave(group, 1) for n in (1, 2))
            weights = torch.softmax(torch.einsum("hd,nhd->hn", q[i], keys) / q.shape[-1] ** 0.5, -1)
            outs.append(torch.einsum("hn,nhd->hd", weights, values))
        mass = {row[0]: float(weights[:, n].mean()) for n, row in enumerate(rows)}
        return self.model.finish_layer(layer, x, torch.stack(outs)), mass

    def step(self, token: int, position: int):
        x, at = self.model.embed(torch.tensor([token])), torch.tensor([position])
        for layer in range(self.model.config.num_layers):
            x, mass = self.layer(layer, x, at)
            if layer == T:
                here = {p for p, _ in self.held}
                wanted = [p for p in self.hidden if p not in here and mass[p] > 1 / (position + 1)]
                best = sorted(sorted(wanted, key=lambda p: -mass[p])[: self.plan.a_row])
                gone = self.held[: max(0, len(self.held) + len(best) - self.plan.capacity)]
                self.held = [*self.held[len(gone) :], *((p, position) for p in best)]
                for deep in range(T + 1, self.model.config.num_layers):
                    self.kept[deep] = [row for row in self.kept[deep] if row[0] not in {p for p, _ in gone}]
                if best:
                    x = torch.cat((torch.stack([self.hidden[p] for p in best]), x))
                    at = torch.cat((torch.tensor(best), at))
        return x[-1]


@torch.inference_mode()
def test_a_step_does_what_plain_torch_does(model, encode, prompt, sampling) -> None:
    encoded = encode(prompt(SIZE), sampling.greedy(), plain())
    cache, ids, seen = cache_of(model, encoded), prompt(STEPS, seed=5), []
    hidden = cache._recall.hidden
    numbers = list(range(len(hidden)))
    positions = [hidden.position(n) for n in numbers]
    selected = torch.tensor([p for p in range(SIZE) if p not in set(positions)])
    rows = dict(zip(positions, hidden.read(numbers), strict=True))
    wanted = Layerwise(model, encoded.ids, selected, rows, cache._recall.plan)
    held = []
    expected = [(wanted.step(token, SIZE + i), held.append(list(wanted.held)))[0] for i, token in enumerate(ids)]
    got = run(model, cache, SIZE, ids, seen=seen)
    assert seen == held
    assert len(held[-1]) == cache._recall.plan.capacity < sum(len(set(step)) for step in held), "some made room"
    torch.testing.assert_close(got, torch.stack(expected), atol=2e-4, rtol=2e-4)


def test_rows_in_one_pass_do_what_they_do_one_by_one(model, encode, prompt, sampling, recipe) -> None:
    encoded = encode(prompt(SIZE), sampling.greedy(), recipe)
    ids = prompt(STEPS, seed=5)
    one, block = cache_of(model, encoded), cache_of(model, encoded)
    alone, together = run(model, one, SIZE, ids), run(model, block, SIZE, ids, most=7)
    assert one._recall.chunks.held == block._recall.chunks.held and one._recall.chunks.held
    torch.testing.assert_close(alone, together, atol=2e-4, rtol=2e-4)
    assert one.nbytes() == block.nbytes()


@torch.inference_mode()
def test_a_layer_with_a_sliding_window_wants_what_it_sees(make_model, encode, prompt, sampling) -> None:
    """And rows beyond the window of a deep layer are attended to by none that come later."""
    width = 90
    model = make_model(model_type="mistral", sliding_window=width)
    for recipe in (plain(), chunks()):
        encoded = encode(prompt(SIZE), sampling.greedy(), recipe, model)
        ids, seen = prompt(STEPS, seed=5), []
        one, block = cache_of(model, encoded), cache_of(model, encoded)
        alone, together = run(model, one, SIZE, ids, seen=seen), run(model, block, SIZE, ids, most=7)
        torch.testing.assert_close(alone, together, atol=2e-4, rtol=2e-4)
        chunk = encoded.recipe.retrieval.chunk
        assert seen[-1] and all(p + chunk > stamp - width + 1 for p, stamp in seen[-1])


def test_without_recall_nothing_else_happens(bench, encode, prompt, sampling) -> None:
    """Numbers that only recall knows change neither the recipe nor what is sent of a prompt."""
    without = chunks(recall=0.0)
    assert without == chunks(recall=0, recall_bits=8, recall_step=4)
    assert without.fingerprint == chunks(recall=0.0, recall_bits=8).fingerprint != chunks().fingerprint
    encoded, more = (encode(prompt(SIZE), sampling.greedy(), one) for one in (without, chunks()))
    for plain_layer, layer in zip(encoded.layers, more.layers, strict=True):
        assert set(layer.tensors) - set(plain_layer.tensors) == ({Part.HIDDEN} if layer.layer == T else set())
        for part, group in plain_layer.tensors.items():
            assert all(torch.equal(tensor, layer.tensors[part][name]) for name, tensor in group.items())


def test_rows_that_all_go_on_leave_nothing_to_recall(bench, encode, prompt, sampling) -> None:
    wanted, found = bench(), bench()
    wanted.start("x", encode(prompt(SIZE), sampling.drawn(STEPS, seed=2)))
    found.start("x", encode(prompt(SIZE), sampling.drawn(STEPS, seed=2), plain(rate=1.0)))
    wanted.run()
    found.run()
    assert found.tokens("x") == wanted.tokens("x")
    assert found.ended("x").rows_recalled == 0


def test_another_engine_goes_on_from_what_is_kept(bench, encode, prompt, sampling, recipe) -> None:
    """With what was recalled, however few of the kept rows are of use, and from rows that it keeps itself."""
    encoded = encode(prompt(SIZE), sampling.drawn(TOKENS, seed=3), recipe)
    first = bench()
    first.start("x", encoded, keep_every=EVERY)
    kept = kept_of(run_keeping(first, "x"))
    assert any("recalled" in rows.layers[-1].tensors[Part.TAIL] for rows in kept)
    assert first.ended("x").rows_recalled > 0
    ids = (*encoded.first[0].token_ids, *first.tokens("x"))
    for told in (1, 2, EVERY + 1, 3 * EVERY + 2, TOKENS - 1):
        check_going_on(bench, encoded, kept, ids, told)


def test_who_has_nothing_but_tokens_goes_on_as_well(bench, encode, prompt, sampling, recipe) -> None:
    encoded = encode(prompt(SIZE), sampling.drawn(TOKENS, seed=3), recipe)
    first, other = bench(), bench()
    first.start("x", encoded)
    first.run()
    ids = (*encoded.first[0].token_ids, *first.tokens("x"))
    other.start("x", encoded, [EmittedChoice(ids[:30])])
    other.run()
    assert other.tokens("x") == list(ids[30:])


def test_choices_recall_for_themselves_whoever_runs_beside_them(bench, encode, prompt, sampling, recipe) -> None:
    encoded = encode(prompt(SIZE), sampling.drawn(TOKENS, n=3, seed=5), recipe)
    alone, beside = bench(), bench()
    alone.start("x", encoded)
    alone.run()
    beside.start("other", encode(prompt(90, seed=4), sampling.drawn(TOKENS)))
    beside.start("x", encoded)
    beside.start("third", encode(prompt(SIZE + 9, seed=4), sampling.drawn(12), recipe))
    beside.run()
    for choice in range(3):
        assert beside.tokens("x", choice) == alone.tokens("x", choice)
    assert beside.ended("x").rows_recalled == alone.ended("x").rows_recalled > 0


def test_what_is_held_is_no_more_than_was_reserved(bench, encode, prompt, sampling, recipe) -> None:
    """`step` of the bench compares them after each one; here that most of it was really used."""
    encoded = encode(prompt(SIZE), sampling.drawn(TOKENS, seed=3), recipe)
    host = arena()
    on_device, on_host = bench(), bench(host=host)
    for b in (on_device, on_host):
        b.start("x", encoded)
        b.run()
    assert on_host.tokens("x") == on_device.tokens("x")
    request = DecodeRequest("x", 1, SIZE, encoded.recipe, encoded.params)
    demand, away = on_device.engine.demand(request), on_host.engine.demand(request)
    assert 0.8 * demand.total_bytes < on_device.ended("x").resident_bytes <= demand.total_bytes
    packed = encoded.layers[T].tensors[Part.HIDDEN]
    hidden_bytes = sum(tensor.nbytes for name, tensor in packed.items() if name != "chunks")
    assert away.host_bytes >= hidden_bytes and away.prompt_bytes < demand.prompt_bytes - 0.9 * hidden_bytes
    assert host.num_free == host.num_pages


def test_turns_of_the_device_change_no_token(bench, encode, prompt, sampling, recipe) -> None:
    """Who is parked has its hidden rows and what was recalled with it."""
    encoded = [encode(prompt(SIZE + 4 * i, i), sampling.drawn(20, n=1 + i % 2, seed=i), recipe) for i in range(3)]
    wanted = [run_all(bench(), [one]) for one in encoded]
    b = oversubscribed(bench, encoded)
    assert run_all(b, encoded) == [answer for one in wanted for answer in one]
    assert b.engine.tier_snapshot().preemptions > 2


def test_the_store_changes_no_token(bench, encode, prompt, sampling, recipe) -> None:
    """Hidden rows in host memory leave it for the store, and come back to other pages."""
    encoded = [encode(prompt(SIZE + 4 * i, i), sampling.drawn(16, n=1 + i % 2, seed=i), recipe) for i in range(4)]
    wanted = [run_all(bench(), [one]) for one in encoded]
    b = pressed(bench, encoded)
    assert run_with_depot(b, encoded, lambda: wipe(b)) == [answer for one in wanted for answer in one]
    assert b.engine.tier_snapshot().store_reads >= 1


@pytest.mark.parametrize("length", [1, 3, 90, pytest.param(400, marks=pytest.mark.acceptance)])
def test_a_turn_goes_on_with_the_cache_or_with_what_is_stored(bench, encode, prompt, sampling, recipe, length) -> None:
    encoded = encode(prompt(SIZE), sampling.drawn(20, seed=3), recipe)
    b = bench(session_bytes=1 << 30)
    answer, kept = first_turn(b, encoded)
    history = (*answer, *prompt(length, seed=9))
    wanted = next_turn(bench(), encoded, sampling.drawn(12, seed=5), history, kept)
    assert next_turn(b, encoded, sampling.drawn(12, seed=5), history, kept, adopts=True) == wanted
    assert b.ended("two").rows_recalled > 0


def test_a_step_that_fails_leaves_nothing_recalled(bench, encode, prompt, sampling, recipe, monkeypatch) -> None:
    """Its rows run again, and bring back what they would have."""
    encoded = encode(prompt(SIZE), sampling.drawn(TOKENS, seed=3), recipe)
    wanted = bench()
    wanted.start("x", encoded)
    wanted.run()
    b, calls = bench(), iter(range(10_000))
    logits = Model.logits

    def failing(self, x):
        if next(calls) % 5 == 2:
            raise torch.OutOfMemoryError("no memory")
        return logits(self, x)

    b.start("x", encoded)
    b.start("y", encoded)
    monkeypatch.setattr(Model, "logits", failing)
    b.run()
    assert b.tokens("x") == b.tokens("y") == wanted.tokens("x")
    assert b.ended("x").rows_recalled == wanted.ended("x").rows_recalled


def test_redone_steps_see_what_was_recalled(bench, encode, prompt, sampling) -> None:
    """A step that chose every chunk is what it is redone as."""
    encoded = encode(prompt(SIZE), sampling.drawn(TOKENS, seed=3), chunks())
    retrieval = replace(encoded.recipe.retrieval, budget_tokens=4096)
    whole = replace(encoded, recipe=replace(encoded.recipe, retrieval=retrieval))
    b = bench(quality_sample_rate=1.0)
    b.start("x", whole)
    b.run()
    quality, name = b.engine.figures.quality, encoded.recipe.name
    assert sum(quality.divergence[name].counts) >= TOKENS - 1
    assert quality.divergence[name].total < 1e-6 * TOKENS
    assert b.ended("x").rows_recalled > 0


def test_hidden_rows_travel_as_the_layout_says(model, encode, prompt, sampling, recipe) -> None:
    shape = model_shape(model.config)
    encoded = encode(prompt(SIZE), sampling.greedy(), recipe)
    assert sum(layer.nbytes() for layer in encoded.layers) == encoded_nbytes(encoded.recipe, shape, SIZE, 4)
    without = replace(encoded.recipe, propagation=replace(encoded.recipe.propagation, recall=0.0))
    packed = encoded.layers[T].tensors[Part.HIDDEN]
    more = encoded_nbytes(encoded.recipe, shape, SIZE, 4) - encoded_nbytes(without, shape, SIZE, 4)
    assert more == sum(tensor.nbytes for tensor in packed.values())


def test_frames_bring_what_was_encoded(pipeline, bench, encode, prompt, sampling) -> None:
    params = sampling.drawn(TOKENS, seed=3)
    b, encoded = bench(), encode(prompt(SIZE), params, chunks())
    b.start("x", encoded)
    b.run()
    found = pipeline().generate(prompt(SIZE), chunks(), params)
    assert found.token_ids == [[*encoded.first[0].token_ids, *b.tokens("x")]]


@torch.inference_mode()
def test_recalled_rows_that_do_not_fit_are_refused(model, encode, prompt, sampling) -> None:
    encoded = encode(prompt(SIZE), sampling.greedy(), plain())
    cache = cache_of(model, encoded)
    run(model, cache, SIZE, prompt(4, seed=5))
    rows = cache.rows(SIZE, SIZE + 4)
    assert cache_of(model, encoded).put_rows(SIZE, rows) is None

    def changed(layer: int, **tensors):
        group = {**rows[layer].tensors[Part.TAIL], **tensors}
        group = {name: tensor for name, tensor in group.items() if tensor is not None}
        return [EncodedLayer(layer, {Part.TAIL: group}) if one.layer == layer else one for one in rows]

    def twice(one: EncodedLayer, count: int) -> EncodedLayer:
        """The last row that came back is another one that did."""
        tensors = {name: tensor.clone() for name, tensor in one.tensors[Part.TAIL].items()}
        tensors["recalled"][count - 1, 0] = tensors["recalled"][0, 0]
        return EncodedLayer(one.layer, {Part.TAIL: tensors})

    own = rows[T + 1].tensors[Part.TAIL]
    stamps = own["recalled"]
    propagated = next(p for p in range(SIZE) if cache._recall.hidden.number_at(p) is None)
    for broken in (
        changed(T, **{name: own[name] for name in ("recalled_k", "recalled_v")}, recalled=stamps),
        changed(T + 1, recalled=None),
        changed(T + 1, recalled=stamps.long()),
        changed(T + 1, recalled=stamps + torch.tensor([0, 4], dtype=torch.int32)),
        changed(T + 1, recalled=stamps.clone().fill_(propagated)),
        changed(T + 1, recalled_k=own["recalled_k"][:-1]),
        changed(T + 2, recalled=stamps.flip(0)),
        changed(T + 2, recalled_v=None),
        [*rows[: T + 1], *(twice(one, len(stamps)) for one in rows[T + 1 :])],
    ):
        with pytest.raises(FrameMismatch):
            cache_of(model, encoded).put_rows(SIZE, broken)


def test_several_ranks_refuse_it_by_name() -> None:
    check_ranks(chunks(recall=0.0), SimpleNamespace())
    check_ranks(chunks(), None)
    with pytest.raises(InvalidRequest) as caught:
        check_ranks(chunks(), SimpleNamespace())
    assert caught.value.field == "recipe.propagation.recall"
