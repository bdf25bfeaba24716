"""Recall within the batched step: what sequences bring back one by one they bring back there, on the device's own
account, whoever runs beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from kvsluice.compression.codec_slots import Native
from kvsluice.compression.interfaces import Part
from kvsluice.compression.layout import recall_plan
from kvsluice.compression.recipe import Recipe
from kvsluice.kernels.dispatch import TRITON
from kvsluice.models.model import Model
from kvsluice.services.decode import step as step_module
from kvsluice.services.decode.engine import EmittedChoice
from tests.integration.engines.conftest import VOCAB
from tests.integration.engines.test_kept_rows import kept_of, run_keeping
from tests.integration.engines.test_kept_sessions import first_turn, next_turn
from tests.integration.engines.test_recall import chunks, plain
from tests.integration.engines.test_tiers import arena, oversubscribed, run_all

SIZE, STEPS = 180, 9


def quick(**changed) -> Recipe:
    """Rows as they are, which the interpreter reads soonest."""
    recipe = chunks(**{"layer": 0} | changed)
    return replace(recipe, key_codec=Native(), value_codec=Native())


@pytest.fixture
def lookahead() -> bool:
    """A step is launched before the one under way is settled: what the device has chosen is known later then."""
    return True


@pytest.fixture
def model(make_model):
    """The interpreter takes its time for every layer and KV head."""
    return make_model(2, num_key_value_heads=1)


@pytest.fixture
def kernels(monkeypatch) -> Iterator[Callable[[], int]]:
    """Steps take the batched path, as on a GPU. Gives in how many of them rows could come back."""
    taken = []
    recall = step_module.StepAttention.recall

    def counted(self, layer, like, positions):
        found = recall(self, layer, like, positions)
        if found is not None:
            taken.append(len(found[1]))
        return found

    monkeypatch.setattr(step_module, "runs", lambda name, device: name == TRITON)
    monkeypatch.setattr(step_module.StepAttention, "recall", counted)
    yield lambda: len(taken)


@pytest.fixture
def one_by_one(monkeypatch):
    """one_by_one(act) -> what `act` gives where no sequences run together."""

    def run(act):
        with monkeypatch.context() as patch:
            patch.setattr(step_module, "runs", lambda name, device: False)
            return act()

    return run


def run_watched(b, encoded: dict, looks: bool = True) -> tuple[dict, dict]:
    """Tokens of every request, and what was held after each step that `looks`, and at the end."""
    caches, held = {}, {name: [] for name in encoded}
    for name, one in encoded.items():
        b.start(name, one)
    while b.engine.has_work:
        b.step()
        caches |= {name: run.choices[0].cache for name, run in b.engine._runs.items() if run.choices}
        for name, cache in caches.items():
            if looks or not b.engine.has_work:
                recall = cache._catch_up()
                held[name].append(None if recall is None else recall.chunks.held)
    return {name: (b.tokens(name), b.ended(name).rows_recalled) for name in encoded}, held


def test_every_step_brings_back_what_it_does_alone(
    bench, encode, prompt, sampling, make_model, kernels, one_by_one
) -> None:
    """With several KV heads, and layers on both sides of T."""
    model = make_model(3)
    encoded = {"x": encode(prompt(SIZE), sampling.drawn(STEPS, seed=3), quick(layer=1), model)}
    wanted, held = one_by_one(lambda: run_watched(bench(model), encoded))
    assert kernels() == 0
    assert run_watched(bench(model), encoded) == (wanted, held)
    assert kernels() == STEPS - 1 and len({str(one) for one in held["x"]}) >= 6


def test_a_mixed_batch_recalls_what_its_sequences_do_one_by_one(
    bench, encode, prompt, sampling, kernels, one_by_one
) -> None:
    """Longer than there is room for what comes back, with others that recall nothing, or have another recipe, or run
    apart; two kinds of hidden rows, and choices that several positions share."""
    drawn = sampling.drawn(STEPS, seed=3)
    encoded = {
        "packed": encode(prompt(SIZE), drawn, chunks(layer=0)),
        "more bits": encode(prompt(SIZE + 61, 1), drawn, quick(recall=0.05, recall_bits=8)),
        "of every fourth": encode(prompt(SIZE + 20, 4), drawn, quick(every=4)),
        "without": encode(prompt(SIZE + 9, 2), drawn, quick(recall=0.0)),
        "exact": encode(prompt(90, 3), sampling.drawn(STEPS - 5, seed=4)),
        "apart": encode(prompt(120, 5), sampling.drawn(5, seed=4), plain(layer=0)),
    }
    wanted, held = one_by_one(lambda: run_watched(bench(), encoded, looks=False))
    assert run_watched(bench(), encoded, looks=False) == (wanted, held)
    assert kernels() >= STEPS - 1
    for name in ("packed", "more bits", "of every fourth"):
        assert wanted[name][1] > 4 * len(held[name][-1]) > 0, "some made room"


class Later:
    """Does recorded work when it is replayed, and not before, from the buffers that it was recorded with."""

    def __init__(self) -> None:
        self.replays = 0

    def capture(self, work):
        result = torch.full((2, VOCAB), torch.nan)

        def replay() -> None:
            self.replays += 1
            result.copy_(work())

        return replay, result


def test_a_replayed_step_reads_what_its_buffers_say(
    bench, encode, prompt, sampling, model, kernels, one_by_one
) -> None:
    """Of two sequences that take turns in the first place, and seal what they have generated."""
    encoded = {
        name: encode(prompt(SIZE + 22 + 3 * seed, seed), sampling.drawn(7, seed=seed), quick(recall_step=4))
        for seed, name in enumerate(("x", "y"))
    }
    wanted = one_by_one(lambda: run_watched(bench(), encoded, looks=False))
    b, graphs, step = bench(), Later(), step_module.StepRunner._together
    b.engine.runner._steps._graphs = graphs
    turned = []

    def in_turn(self, rows, blocks, places):
        turned.append(1)
        if len(rows) < 2 or len(turned) % 2:
            return step(self, rows, blocks, places)
        return step(self, rows[::-1], blocks[::-1], places[::-1]).flip(0)

    b.engine.runner._together = in_turn.__get__(b.engine.runner)
    assert run_watched(b, encoded, looks=False) == wanted
    assert graphs.replays >= 4


def test_another_engine_goes_on_from_what_is_kept(bench, encode, prompt, sampling, model, kernels, one_by_one) -> None:
    """What is kept of batched steps is what is kept of others, and whoever goes on has the same chunks."""
    encoded = encode(prompt(SIZE), sampling.drawn(7, seed=3), quick())

    def keep():
        b = bench()
        b.start("x", encoded, keep_every=3)
        return kept_of(run_keeping(b, "x")), (*encoded.first[0].token_ids, *b.tokens("x"))

    (wanted, ids), (kept, found) = one_by_one(keep), keep()
    assert found == ids and kernels()
    stamps = [[rows.layers[-1].tensors[Part.TAIL].get("recalled") for rows in one] for one in (wanted, kept)]
    assert any(one is not None for one in stamps[0])
    for one, other in zip(*stamps, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
    b = bench()
    b.start("x", encoded, [EmittedChoice(ids[:5], kept=kept)])
    b.run()
    assert b.tokens("x") == list(ids[5:])


def test_turns_of_the_device_change_no_token(bench, encode, prompt, sampling, model, kernels, one_by_one) -> None:
    """Who is parked takes what the device knows of its chunks along."""
    encoded = [encode(prompt(SIZE + 4 * i, i), sampling.drawn(6, seed=i), quick()) for i in range(2)]
    wanted = one_by_one(lambda: [run_all(bench(), [one]) for one in encoded])
    b = oversubscribed(bench, encoded)
    assert run_all(b, encoded) == [answer for one in wanted for answer in one]
    assert b.engine.tier_snapshot().preemptions > 1 and kernels()


def test_hidden_rows_in_host_memory_come_back_from_there(
    bench, encode, prompt, sampling, model, kernels, one_by_one
) -> None:
    encoded = encode(prompt(SIZE), sampling.drawn(6, seed=3), quick())
    ((wanted, recalled),) = one_by_one(lambda: run_watched(bench(), {"x": encoded}))[0].values()
    host = arena()
    b = bench(host=host)
    b.start("x", encoded)
    run = b.engine._runs["x"]
    assert run.host_bytes() > 0 and not run.choices[0].cache.runs_apart
    b.run()
    assert (b.tokens("x"), b.ended("x").rows_recalled) == (wanted, recalled)
    assert kernels() and host.num_free == host.num_pages


def test_sequences_whose_values_lie_in_host_memory_run_apart(bench, encode, prompt, sampling, model, kernels) -> None:
    """Rows that come back would share a hot set."""
    recipe = quick()
    encoded = encode(prompt(420), sampling.drawn(3, seed=3), replace(recipe, value_codec=chunks().value_codec))
    b = bench(host=arena())
    b.start("x", encoded)
    assert b.engine._runs["x"].choices[0].cache.runs_apart
    b.run()
    assert b.ended("x").rows_recalled > 0 and not kernels()


@pytest.mark.parametrize("outliers", [0, 2])
def test_layers_with_a_sliding_window_and_exact_chunks(
    bench, encode, prompt, sampling, make_model, kernels, one_by_one, outliers
) -> None:
    """Rows that come back see what is within the window before them, and exact chunks up to their own positions."""
    window = {} if outliers else {"model_type": "mistral", "sliding_window": 90}
    model, recipe = make_model(2, num_key_value_heads=1, **window), quick()
    recipe = replace(recipe, retrieval=replace(recipe.retrieval, outliers=outliers))
    encoded = {"x": encode(prompt(SIZE), sampling.drawn(6, seed=3), recipe, model)}
    wanted = one_by_one(lambda: run_watched(bench(model), encoded))
    assert run_watched(bench(model), encoded) == wanted
    assert wanted[1]["x"][-1] and kernels()


def test_a_turn_goes_on_with_the_cache(bench, encode, prompt, sampling, model, kernels, one_by_one) -> None:
    """Rows that the last turn has run in vain are undone, and what comes back is counted anew."""
    encoded = encode(prompt(SIZE), sampling.drawn(5, seed=3), quick())
    b = bench(session_bytes=1 << 30)
    answer, kept = first_turn(b, encoded)
    history, params = (*answer, *prompt(3, seed=9)), sampling.drawn(3, seed=5)
    wanted = one_by_one(lambda: next_turn(bench(), encoded, params, history, kept))
    assert next_turn(b, encoded, params, history, kept, adopts=True) == wanted
    end = b.ended("two")
    assert 0 < end.rows_recalled <= 8 * end.steps and kernels()


def test_a_step_that_fails_leaves_nothing_recalled(
    bench, encode, prompt, sampling, model, kernels, one_by_one, monkeypatch
) -> None:
    """Whatever the device had done of it: its rows run again, and bring back what they would have."""
    encoded = {name: encode(prompt(SIZE), sampling.drawn(5, seed=3), quick()) for name in "xy"}
    wanted = one_by_one(lambda: run_watched(bench(), encoded))[0]
    calls, finish_layer, logits = iter(range(10_000)), Model.finish_layer, Model.logits

    def failing(self, layer, x, attn):
        if layer == 1 and next(calls) % 7 == 2:
            raise torch.OutOfMemoryError("no memory")
        return finish_layer(self, layer, x, attn)

    def failing_late(self, x):
        if next(calls) % 7 == 5:
            raise torch.OutOfMemoryError("no memory")
        return logits(self, x)

    monkeypatch.setattr(Model, "finish_layer", failing)
    monkeypatch.setattr(Model, "logits", failing_late)
    assert run_watched(bench(), encoded, looks=False)[0] == wanted
    assert kernels()


def test_redone_steps_see_what_was_recalled(bench, encode, prompt, sampling, model, kernels) -> None:
    """A step that chose every chunk is what it is redone as."""
    encoded = encode(prompt(SIZE), sampling.drawn(8, seed=3), quick())
    retrieval = replace(encoded.recipe.retrieval, budget_tokens=4096)
    b = bench(quality_sample_rate=1.0)
    b.start("x", replace(encoded, recipe=replace(encoded.recipe, retrieval=retrieval)))
    b.run()
    quality, name = b.engine.figures.quality, encoded.recipe.name
    assert sum(quality.divergence[name].counts) >= 6
    assert quality.divergence[name].total < 1e-5
    assert b.ended("x").rows_recalled > 0 and kernels()


def test_what_is_held_is_no_more_than_was_reserved(bench, encode, prompt, sampling, model, kernels) -> None:
    """`step` of the bench compares them after each one; here that what the device needs is there from the start."""
    encoded = encode(prompt(SIZE), sampling.drawn(3, n=2, seed=3), quick())
    b = bench()
    b.start("x", encoded)
    b.step()
    plan = recall_plan(encoded.recipe, SIZE)
    for run in b.engine._runs["x"].choices.values():
        held = sum(tensor.nbytes for tensor in run.cache._recall.chunks.tensors())
        assert held == plan.state_nbytes
    b.run()
