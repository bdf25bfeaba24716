"""The decode engine on a tiny model: admission, turns, forks, replay, faults."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from kvsluice.compression.interfaces import EncodedLayer
from kvsluice.compression.recipe import get_recipe
from kvsluice.errors import (
    DuplicateRequest,
    FrameMismatch,
    InternalError,
    InvalidRecipe,
    InvalidRequest,
    Overloaded,
    RequestCancelled,
)
from kvsluice.services.decode import engine as engine_module
from kvsluice.services.decode import step as step_module
from kvsluice.services.decode.engine import DecodeRequest, EmittedChoice, FailedEvent, FinishedEvent, OpenedEvent


@pytest.fixture
def spoil(monkeypatch):
    """spoil(verb, action): caches of requests with more than 1 prompt token run `action` when `verb` is called."""

    def arm(verb: str, action, num_prompt_tokens: int) -> None:
        make = engine_module.make_cache

        class Spoilt:
            def __init__(self, inner) -> None:
                self.inner = inner

            def __getattr__(self, name: str):
                return getattr(self.inner, name)

            def fork(self):
                return Spoilt(self.inner.fork())

        def spoilt_method(self, *args):
            return action(getattr(self.inner, verb), *args)

        setattr(Spoilt, verb, spoilt_method)

        def make_cache(recipe, shape, length, rope, host, summed):
            cache = make(recipe, shape, length, rope, host, summed)
            return Spoilt(cache) if length == num_prompt_tokens else cache

        monkeypatch.setattr(engine_module, "make_cache", make_cache)

    return arm


def fault(*args):
    raise RuntimeError("secret detail")


def alone(bench, encoded) -> list[list[int]]:
    """What every choice gives when nothing else runs, the first token included."""
    single = bench()
    single.start("x", encoded)
    single.run()
    return [[*c.token_ids, *single.tokens("x", i)] for i, c in enumerate(encoded.first)]


def test_a_request_opens_runs_and_finishes(bench, encode, prompt, sampling) -> None:
    encoded, b = encode(prompt(40), sampling.drawn(12)), bench()
    b.open("a", encoded)
    assert [type(e) for e in b.step()] == [OpenedEvent]
    assert b.engine.free_bytes < b.engine.capacity_bytes
    b.feed("a", encoded)
    b.run()
    assert len(b.tokens("a")) == 11, "the first of 12 tokens came from prefill"
    end = b.ended("a")
    assert end.steps == 11
    assert end.resident_bytes > 0 and end.bytes_read > 0
    assert [e.sampled[-1].finish_reason for e in b.events if hasattr(e, "sampled")] == [""] * 10 + ["length"]


def test_a_batch_gives_what_each_request_gives_alone(bench, encode, prompt, sampling) -> None:
    prompts = [encode(prompt(20 + 13 * i, i), sampling.drawn(10 + i, seed=i)) for i in range(6)]
    wanted = [alone(bench, encoded)[0] for encoded in prompts]
    for slots in (2, 4, 64):  # fewer slots than sequences: they take turns
        b = bench(max_num_seqs=slots)
        for i, encoded in enumerate(prompts):
            b.start(str(i), encoded)
        b.run()
        assert [[*e.first[0].token_ids, *b.tokens(str(i))] for i, e in enumerate(prompts)] == wanted


def test_requests_may_join_while_others_run(bench, encode, prompt, sampling) -> None:
    first, second = (encode(prompt(30, i), sampling.drawn(15, seed=i)) for i in range(2))
    b = bench()
    b.start("first", first)
    for _ in range(6):
        b.step()
    b.start("second", second)
    b.run()
    assert [*first.first[0].token_ids, *b.tokens("first")] == alone(bench, first)[0]
    assert [*second.first[0].token_ids, *b.tokens("second")] == alone(bench, second)[0]


def test_choices_draw_their_own_random_numbers_and_equal_separate_runs(bench, encode, prompt, sampling) -> None:
    encoded = encode(prompt(40), sampling.drawn(12, n=4, seed=5))
    together = alone(bench, encoded)
    assert len({tuple(choice) for choice in together}) == 4
    for index in range(4):
        b = bench()
        done = [replace(c, finish_reason="stop") if i != index else c for i, c in enumerate(encoded.first)]
        b.start("x", encoded, done)
        b.run()
        assert [*encoded.first[index].token_ids, *b.tokens("x", index)] == together[index]


def test_choices_share_the_prompt(bench, encode, prompt, sampling) -> None:
    ids = prompt(400)
    held, reserved = [], []
    for n in (1, 4):
        b = bench()
        b.start("x", encode(ids, sampling.drawn(4, n=n)))
        b.step()
        held.append(b.engine._runs["x"].held_bytes())
        reserved.append(b.engine.capacity_bytes - b.engine.free_bytes)
        own = next(iter(b.engine._runs["x"].choices.values())).cache.own_nbytes()
        b.run()
    assert held[1] == held[0] + 3 * own
    assert reserved[1] < 1.5 * reserved[0]


def test_an_ended_choice_frees_its_own_memory_and_the_last_one_the_prompt(bench, encode, prompt, sampling) -> None:
    b, encoded = bench(), encode(prompt(100), sampling.drawn(30, n=3))
    b.start("a", encoded)
    b.step()
    free = [b.engine.free_bytes]
    for index in range(3):
        assert b.engine.cancel("a", index)
        b.step()
        free.append(b.engine.free_bytes)
    demand = b.engine.demand(DecodeRequest("a", 1, 100, encoded.recipe, encoded.params))
    assert [after - before for before, after in pairwise(free)] == [
        demand.tail_bytes,
        demand.tail_bytes,
        demand.tail_bytes + demand.prompt_bytes,
    ]
    assert isinstance(b.ended("a"), FinishedEvent)


def test_what_is_held_is_freed_with_the_request(bench, encode, prompt, sampling) -> None:
    b, encoded = bench(), encode(prompt(100), sampling.drawn(30, n=2))
    b.start("a", encoded)
    b.step()
    caches = [weakref.ref(run.cache) for run in b.engine._runs["a"].choices.values()]
    b.engine.cancel("a", 0)
    assert [ref() is None for ref in caches] == [True, False]
    b.engine.cancel("a")
    assert all(ref() is None for ref in caches)


@pytest.mark.parametrize("stage", ["waiting", "open", "half", "running", "late"])
def test_cancelling_at_any_stage_frees_everything(bench, encode, prompt, sampling, stage: str) -> None:
    encoded = encode(prompt(50), sampling.drawn(20, n=2))
    need = bench().engine.demand(DecodeRequest("a", 1, 50, encoded.recipe, encoded.params)).total_bytes
    b = bench(capacity_bytes=need)
    if stage == "waiting":
        b.open("other", encoded)
    b.open("a", encoded)
    b.step()
    if stage == "half":
        for layer in encoded.layers[:2]:
            b.engine.add_layer("a", layer)
    if stage in ("running", "late"):
        b.feed("a", encoded)
        for _ in range(1 if stage == "running" else 15):
            b.step()
    assert b.engine.cancel("a")
    assert not b.engine.cancel("a")
    b.step()
    assert isinstance(b.ended("a").error, RequestCancelled)
    assert b.engine.free_bytes == (0 if stage == "waiting" else need)
    with pytest.raises(RequestCancelled):
        b.engine.add_layer("a", encoded.layers[0])
    b.engine.cancel("other")
    b.step()


def test_a_choice_cancelled_before_the_start_never_runs(bench, encode, prompt, sampling) -> None:
    b, encoded = bench(), encode(prompt(40), sampling.drawn(6, n=2))
    b.open("a", encoded)
    b.engine.cancel("a", 1)
    b.feed("a", encoded)
    b.run()
    assert len(b.tokens("a", 0)) == 5 and b.tokens("a", 1) == []
    assert isinstance(b.ended("a"), FinishedEvent)
    b.open("b", encoded)
    for index in range(2):
        b.engine.cancel("b", index)
    b.feed("b", encoded)
    b.run()
    assert b.ended("b").steps == 0


def test_requests_wait_for_bytes_in_order(bench, encode, prompt, sampling) -> None:
    encoded = encode(prompt(50), sampling.drawn(6))
    need = bench().engine.demand(DecodeRequest("a", 1, 50, encoded.recipe, encoded.params)).total_bytes
    b = bench(capacity_bytes=2 * need + need // 2, max_waiting=2)
    for name in "abcd":
        b.open(name, encoded)
    assert [e.request_id for e in b.step()] == ["a", "b"]
    assert b.engine.num_waiting == 2
    with pytest.raises(Overloaded, match="2 requests wait"):
        b.open("e", encoded)
    with pytest.raises(FrameMismatch, match="waiting"):
        b.engine.add_layer("c", encoded.layers[0])
    with pytest.raises(DuplicateRequest):
        b.open("c", encoded)
    b.feed("a", encoded)
    b.run()
    assert [e.request_id for e in b.events if isinstance(e, OpenedEvent)] == ["a", "b", "c"]
    for name in "bcd":
        b.feed(name, encoded)
        b.run()
    assert all(isinstance(b.ended(name), FinishedEvent) for name in "abcd")


def test_a_request_that_can_never_fit_is_refused_with_numbers(bench, encode, prompt, sampling) -> None:
    encoded, b = encode(prompt(50), sampling.drawn(6)), bench(capacity_bytes=10_000)
    with pytest.raises(InvalidRequest, match=r"\d+ bytes.*at most 10000 bytes"):
        b.open("a", encoded)
    with pytest.raises(InvalidRequest, match="num_prompt_tokens"):
        b.engine.open(DecodeRequest("b", 1, 0, encoded.recipe, encoded.params))
    with pytest.raises(InvalidRequest, match="credits"):
        b.engine.open(DecodeRequest("b", 1, 5, encoded.recipe, encoded.params, credits=-1))


def test_credits_pause_a_request_and_change_no_token(bench, encode, prompt, sampling) -> None:
    paused, other = (encode(prompt(30, i), sampling.drawn(12, seed=i)) for i in range(2))
    b = bench()
    b.start("paused", paused, credits=3)
    b.start("other", other)
    b.run()
    assert len(b.tokens("paused")) == 3 and isinstance(b.ended("other"), FinishedEvent)
    assert not b.engine.has_work
    b.engine.grant("paused", 5)
    b.run()
    assert len(b.tokens("paused")) == 8
    b.engine.grant("paused", 100)
    b.run()
    assert [*paused.first[0].token_ids, *b.tokens("paused")] == alone(bench, paused)[0]


def test_more_choices_than_slots_take_turns(bench, encode, prompt, sampling) -> None:
    b = bench(max_num_seqs=2)
    for name in "abc":
        b.start(name, encode(prompt(20), sampling.drawn(40, n=2)))
    turns: Counter = Counter()
    b.step()
    b.events.clear()
    for _ in range(30):
        turns.update((e.request_id, e.choice) for e in b.step())
    assert set(turns.values()) == {10}
    for name in "abc":
        b.engine.cancel(name)


@pytest.mark.parametrize("replayed", [2, 5, 11])
def test_replaying_sent_tokens_goes_on_as_if_nothing_had_happened(bench, encode, prompt, sampling, replayed) -> None:
    params = sampling.drawn(20, n=2, repetition_penalty=1.3, presence_penalty=0.5)
    encoded = encode(prompt(40), params)
    wanted = alone(bench, encoded)
    b = bench()
    emitted = [EmittedChoice(tuple(wanted[0][:replayed])), EmittedChoice(tuple(wanted[1][:3]))]
    b.start("x", encoded, emitted, credits=0)
    b.run()
    assert b.tokens("x", 0) == b.tokens("x", 1) == [], "replayed tokens are not sent again"
    b.engine.grant("x", 100)
    b.run()
    assert [wanted[0][:replayed] + b.tokens("x", 0), wanted[1][:3] + b.tokens("x", 1)] == wanted
    assert b.of("x", FinishedEvent)[0].steps == 2 * 19
    first = {e.choice: e.first_index for e in reversed(b.events) if hasattr(e, "first_index")}
    assert first == {0: replayed, 1: 3}


@pytest.mark.parametrize("verb", ["attend", "append", "rows_until_seal", "fork"])
def test_a_fault_in_one_cache_fails_its_request_alone(bench, encode, prompt, sampling, spoil, verb: str) -> None:
    good, bad = encode(prompt(30), sampling.drawn(8)), encode(prompt(31), sampling.drawn(8, n=2))
    wanted = alone(bench, good)[0]
    spoil(verb, fault, num_prompt_tokens=31)
    b = bench()
    b.start("good", good)
    if verb in ("attend", "append"):
        b.start("bad", bad)
    else:
        with pytest.raises(InternalError):
            b.start("bad", bad)
    b.run()
    assert [*good.first[0].token_ids, *b.tokens("good")] == wanted
    error = b.ended("bad").error
    assert isinstance(error, InternalError) and "secret" not in error.message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_fail_their_request_alone(bench, encode, prompt, sampling, spoil, value) -> None:
    good, bad = encode(prompt(30), sampling.drawn(8)), encode(prompt(31), sampling.drawn(8, n=2))
    wanted = alone(bench, good)[0]
    spoil("attend", lambda attend, *args: attend(*args) * value, num_prompt_tokens=31)
    b = bench()
    b.start("bad", bad)
    b.start("good", good)
    b.run()
    assert [*good.first[0].token_ids, *b.tokens("good")] == wanted
    assert "finite" in b.ended("bad").error.message
    assert b.tokens("bad") == []


def test_a_poisoned_layer_fails_its_request_alone(bench, encode, prompt, sampling) -> None:
    good, bad = encode(prompt(30), sampling.drawn(8)), encode(prompt(31), sampling.drawn(8))
    wanted = alone(bench, good)[0]
    for layer in bad.layers:
        for group in layer.tensors.values():
            for tensor in group.values():
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
    b = bench()
    b.start("bad", bad)
    b.start("good", good)
    b.run()
    assert [*good.first[0].token_ids, *b.tokens("good")] == wanted
    assert isinstance(b.ended("bad").error, InternalError)


def test_a_fault_of_the_whole_step_fails_each_request_of_it_once(monkeypatch, bench, encode, prompt, sampling) -> None:
    encoded = encode(prompt(30), sampling.drawn(8, n=2))
    b = bench(max_num_seqs=4)
    for name in "abc":
        b.start(name, encoded)
    monkeypatch.setattr(step_module, "forward_rows", fault)
    b.step()
    monkeypatch.undo()
    assert [isinstance(b.of(name, FailedEvent), list) and len(b.of(name, FailedEvent)) for name in "abc"] == [1, 1, 0]
    b.run()
    assert isinstance(b.ended("c"), FinishedEvent)


def cut(layer: EncodedLayer, rows: int) -> EncodedLayer:
    return replace(layer, tensors={p: {n: t[rows:].clone() for n, t in g.items()} for p, g in layer.tensors.items()})


@pytest.mark.parametrize("case", ["missing", "twice", "unknown", "shape", "names"])
def test_layers_that_do_not_fit_are_refused_and_end_the_request(bench, encode, prompt, sampling, case: str) -> None:
    b, encoded = bench(), encode(prompt(30), sampling.drawn(8))
    b.open("a", encoded)
    bad = {
        "twice": encoded.layers[0],
        "unknown": replace(encoded.layers[0], layer=4),
        "shape": cut(encoded.layers[1], 3),
        "names": replace(encoded.layers[1], tensors={}),
    }
    b.engine.add_layer("a", encoded.layers[0])
    with pytest.raises(FrameMismatch):
        if case == "missing":
            b.engine.commit("a", encoded.ids, encoded.first)
        else:
            b.engine.add_layer("a", bad[case])
    b.step()
    assert isinstance(b.ended("a").error, FrameMismatch)


def test_a_commit_that_does_not_fit_the_request_is_refused(bench, encode, prompt, sampling) -> None:
    b, encoded = bench(), encode(prompt(30), sampling.drawn(8))
    cases = {
        "length": (encoded.ids[:-1], encoded.first),
        "choices": (encoded.ids, [*encoded.first, *encoded.first]),
        "none": (encoded.ids, [EmittedChoice(())]),
        "many": (encoded.ids, [EmittedChoice((5,) * 8)]),
        "vocabulary": (encoded.ids, [EmittedChoice((97,))]),
    }
    for name, (ids, emitted) in cases.items():
        b.open(name, encoded)
        for layer in encoded.layers:
            b.engine.add_layer(name, layer)
        with pytest.raises((FrameMismatch, InvalidRequest)):
            b.engine.commit(name, ids, emitted)
        b.step()
        assert isinstance(b.ended(name), FailedEvent)
    with pytest.raises(RequestCancelled):
        b.engine.commit("gone", encoded.ids, encoded.first)


def test_stop_tokens_end_a_choice_where_sampling_says(bench, encode, prompt, sampling) -> None:
    ids = prompt(40)
    tokens = alone(bench, encode(ids, sampling.drawn(20)))[0]
    stop = tokens[9]
    at = tokens.index(stop)
    for min_tokens in (0, at):
        b, encoded = bench(), encode(ids, sampling.drawn(20, stop_token_ids=(stop,), min_tokens=min_tokens))
        b.start("a", encoded)
        b.run()
        last = b.events[-2].sampled[-1]
        if min_tokens == 0:
            assert (last.finish_reason, last.stop_token) == ("stop", stop)
            assert [*encoded.first[0].token_ids, *b.tokens("a")] == tokens[: at + 1]
        assert isinstance(b.ended("a"), FinishedEvent)


def test_log_probabilities_are_reported(bench, encode, prompt, sampling) -> None:
    b, encoded = bench(), encode(prompt(40), sampling.drawn(5, logprobs=2))
    b.start("a", encoded)
    b.run()
    for event in b.events:
        for token in getattr(event, "sampled", ()):
            assert token.logprob < 0 and len(token.top) == 2
            assert token.top[0][1] >= token.top[1][1]


def test_caches_never_hold_more_than_was_reserved(bench, encode, prompt, sampling) -> None:
    b = bench()  # every step checks it, see DecodeBench.step
    for i, n in enumerate((1, 3)):
        b.start(str(i), encode(prompt(100 + i), sampling.drawn(70, n=n)))
    b.run()


@pytest.mark.parametrize("name", ["fastkv", "shadowkv", "sluice"])
def test_a_recipe_with_open_numbers_is_refused(bench, sampling, name: str) -> None:
    b = bench()
    with pytest.raises(InvalidRecipe, match=r"recipe\.(propagation|key_codec)\."):
        b.engine.open(DecodeRequest("a", 1, 500, get_recipe(name), sampling.greedy()))
    assert not b.engine.cancel("a")


@pytest.mark.parametrize("choice", [-1, 2, 10**6])
def test_a_choice_that_the_request_does_not_have_cannot_be_cancelled(bench, encode, prompt, sampling, choice) -> None:
    encoded = encode(prompt(20), sampling.drawn(4, n=2))
    b = bench()
    b.open("a", encoded)
    assert not b.engine.cancel("a", choice)
    b.feed("a", encoded)
    assert not b.engine.cancel("a", choice)
    b.run()
    assert isinstance(b.ended("a"), FinishedEvent)


def test_a_fault_that_meets_a_request_which_has_ended_fails_the_others(
    monkeypatch, bench, encode, prompt, sampling
) -> None:
    encoded = encode(prompt(20), sampling.drawn(4))
    b = bench()
    for name in "ab":
        b.start(name, encoded)

    def end_one_and_fail(*args):
        b.engine.cancel("a")
        raise RuntimeError("fault")

    monkeypatch.setattr(step_module, "forward_rows", end_one_and_fail)
    b.step()
    monkeypatch.undo()
    assert isinstance(b.ended("a").error, RequestCancelled)
    assert isinstance(b.ended("b").error, InternalError)
