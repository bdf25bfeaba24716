"""The prefill engine on a tiny model: order of events, packing, cancelling, faults."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvsluice.compression.interfaces import EncodedLayer, Part
from kvsluice.errors import (
    DuplicateRequest,
    InternalError,
    InvalidRecipe,
    InvalidRequest,
    RequestCancelled,
    StoreUnavailable,
)
from kvsluice.models.forward import forward_tokens
from kvsluice.models.sampling import SamplerState
from kvsluice.services.prefill import pack as pack_module
from kvsluice.services.prefill import state

# fp32 sums of at most 512 terms in another order: 512 * 2^-24 relative to values of order 1, with room for 4 layers
TOLERANCE = 2e-4


def test_layers_are_handed_over_in_order_and_the_first_tokens_before_the_last(prefill, prompt, sink) -> None:
    engine, out = prefill.engine(), sink("a")
    engine.submit(prefill.job("a", prompt(50)), out)
    prefill.run(engine)
    expected = [("a", "start", 0)]
    for layer in range(3):
        expected += [("a", "layer", layer), ("a", "start", layer + 1)]
    assert out.log == [*expected, ("a", "tokens", None), ("a", "layer", 3), ("a", "done", None)]


def test_layer_0_is_handed_over_before_the_last_layer_starts(prefill, prompt, sink) -> None:
    engine, log = prefill.engine(chunk=16, pack=16), []
    sinks = [sink(name, log) for name in "ab"]
    for out, length in zip(sinks, (70, 64), strict=True):
        engine.submit(prefill.job(out.name, prompt(length)), out)
    prefill.run(engine)
    for name in "ab":
        assert log.index((name, "layer", 0)) < log.index((name, "start", 3))


def test_first_token_and_kv_equal_the_dense_pass(model, prefill, prompt, sink) -> None:
    engine, out, ids = prefill.engine(chunk=16, pack=48), sink("a"), prompt(77)
    engine.submit(prefill.job("a", ids), out)
    prefill.run(engine)
    logits = forward_tokens(model, torch.tensor(ids))[-1]
    assert out.token_ids == [int(logits.argmax())]
    x = model.embed(torch.tensor(ids))
    _, k_pre, v = model.qkv(0, x)
    encoded = out.layers[0].tensors
    torch.testing.assert_close(encoded[Part.VALUES]["rows"], v, atol=TOLERANCE, rtol=TOLERANCE)
    k = model.rotate(k_pre, torch.arange(77), 77)
    torch.testing.assert_close(encoded[Part.KEYS]["rows"], k, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_pack_of_several_prompts_gives_what_each_gives_alone(prefill, prompt, sink) -> None:
    lengths = (5, 61, 16, 33, 100)
    alone, together = [], prefill.engine(chunk=16, pack=64)
    packed = [sink(str(i)) for i in range(len(lengths))]
    for i, length in enumerate(lengths):
        engine, out = prefill.engine(chunk=16, pack=16), sink(str(i))
        engine.submit(prefill.job(str(i), prompt(length, i)), out)
        prefill.run(engine)
        alone.append(out)
        together.submit(prefill.job(str(i), prompt(length, i)), packed[i])
    prefill.run(together)
    for one, other in zip(alone, packed, strict=True):
        assert one.token_ids == other.token_ids
        for a, b in zip(one.layers, other.layers, strict=True):
            for part in a.tensors:
                for name in a.tensors[part]:
                    torch.testing.assert_close(
                        a.tensors[part][name], b.tensors[part][name], atol=TOLERANCE, rtol=TOLERANCE
                    )


def test_a_short_prompt_overtakes_a_long_one(prefill, prompt, sink) -> None:
    engine, log = prefill.engine(chunk=16, pack=16), []
    engine.submit(prefill.job("long", prompt(400)), sink("long", log))
    for _ in range(30):
        engine.step()
    engine.submit(prefill.job("short", prompt(12)), sink("short", log))
    prefill.run(engine)
    assert log.index(("short", "done", None)) < log.index(("long", "start", 2))
    assert log[-1] == ("long", "done", None)


def test_every_choice_gets_its_own_first_token(model, prefill, prompt, sink, sampling) -> None:
    engine, out, ids = prefill.engine(), sink("a"), prompt(40)
    params = sampling.drawn(n=6, seed=11, logprobs=3)
    engine.submit(prefill.job("a", ids, params), out)
    prefill.run(engine)
    logits = forward_tokens(model, torch.tensor(ids))[-1]
    wanted = [SamplerState(params, i, ids, 97, (1,)).sample(logits).token_id for i in range(6)]
    assert out.token_ids == wanted
    assert len(set(wanted)) > 1
    assert all(len(token.top) == 3 and token.logprob < 0 for token in out.sampled)


def test_when_the_first_tokens_end_the_request_the_last_layer_is_not_encoded(prefill, prompt, sink, sampling) -> None:
    engine, out = prefill.engine(), sink("a")
    engine.submit(prefill.job("a", prompt(40), sampling.greedy(max_tokens=1)), out)
    prefill.run(engine)
    assert [token.finish_reason for token in out.sampled] == ["length"]
    assert [layer.layer for layer in out.layers] == [0, 1, 2]
    assert out.log[-1][1] == "done"


@pytest.mark.parametrize("after_steps", [0, 1, 4, 9, 13])
def test_cancelling_takes_effect_before_the_next_item(prefill, prompt, sink, after_steps: int) -> None:
    engine, log = prefill.engine(chunk=16, pack=16), []
    victim, other = sink("victim", log), sink("other", log)
    engine.submit(prefill.job("victim", prompt(60)), victim)
    for _ in range(after_steps):
        assert engine.step()
    calls = len(log)
    engine.submit(prefill.job("other", prompt(20)), other)
    assert engine.cancel("victim")
    assert not engine.cancel("victim")
    assert isinstance(victim.error, RequestCancelled)
    prefill.run(engine)
    assert [entry for entry in log[calls:] if entry[0] == "victim"] == [("victim", "error", None)]
    assert other.num_ends == 1 and other.error is None
    assert (engine.num_requests, engine.num_pending_tokens) == (0, 0)


def test_a_sink_may_cancel_its_own_prompt(prefill, prompt, sink) -> None:
    engine = prefill.engine()
    for verb in ("start", "layer", "tokens"):
        out = sink(verb, on_call=lambda v, _, verb=verb: v == verb and engine.cancel(verb))
        engine.submit(prefill.job(verb, prompt(40)), out)
        prefill.run(engine)
        assert isinstance(out.error, RequestCancelled)
        assert [called for _, called, _ in out.log[-2:]] == [verb, "error"]
        assert engine.num_requests == 0


@pytest.mark.parametrize("verb", ["start", "layer", "tokens"])
def test_a_sink_may_cancel_another_prompt(prefill, prompt, sink, verb: str) -> None:
    engine, alone = prefill.engine(chunk=16, pack=64), sink("alone")
    engine.submit(prefill.job("alone", prompt(30, 1)), alone)
    prefill.run(engine)
    by = sink("by", on_call=lambda v, _: v == verb and engine.cancel("victim"))
    victim, third = sink("victim"), sink("third")
    order = (victim, by, third) if verb == "start" else (by, victim, third)
    for out in order:
        engine.submit(prefill.job(out.name, prompt(30, 1)), out)
    prefill.run(engine)
    assert isinstance(victim.error, RequestCancelled) and victim.num_ends == 1
    for out in (by, third):
        assert out.error is None and out.num_ends == 1 and out.token_ids == alone.token_ids
    assert (engine.num_requests, engine.num_pending_tokens) == (0, 0)


def test_a_prompt_that_is_held_back_waits_and_loses_nothing(prefill, prompt, sink) -> None:
    engine, gate = prefill.engine(chunk=16, pack=64), [True]
    slow, other, alone = sink("slow", is_ready=lambda: gate[0]), sink("other"), sink("alone")
    engine.submit(prefill.job("slow", prompt(60)), slow)
    engine.step()
    gate[0] = False
    engine.submit(prefill.job("other", prompt(30)), other)
    prefill.run(engine)
    assert other.num_ends == 1
    assert (slow.num_ends, slow.log[-1]) == (0, ("slow", "layer", 0))
    assert not engine.step()
    gate[0] = True
    prefill.run(engine)
    engine.submit(prefill.job("alone", prompt(60)), alone)
    prefill.run(engine)
    assert slow.token_ids == alone.token_ids


def test_a_fault_in_one_pack_fails_its_prompts_once_and_no_others(monkeypatch, model, prefill, prompt, sink) -> None:
    engine = prefill.engine(chunk=16, pack=64)
    early, packed = sink("early"), [sink("a"), sink("b")]
    engine.submit(prefill.job("early", prompt(16)), early)
    engine.step()  # early is a layer ahead, so it shares no pack with the others
    for out in packed:
        engine.submit(prefill.job(out.name, prompt(16)), out)
    finish_layer = type(model).finish_layer

    def fail_once(self, layer, x, attn):
        if layer == 0:  # only the pack of a and b runs it from now on
            raise RuntimeError("secret detail")
        return finish_layer(self, layer, x, attn)

    monkeypatch.setattr(type(model), "finish_layer", fail_once)
    prefill.run(engine)
    assert early.error is None and early.num_ends == 1
    for out in packed:
        assert isinstance(out.error, InternalError) and out.num_ends == 1
        assert "secret" not in out.error.message
    assert engine.num_requests == 0


@pytest.mark.parametrize("faulty_layer", [0, 2, 3])
def test_a_prompt_that_breaks_its_pack_fails_alone(monkeypatch, prefill, prompt, sink, faulty_layer) -> None:
    good_ids = [prompt(length, length) for length in (20, 45)]
    engine, alone = prefill.engine(chunk=16, pack=128), [sink("0"), sink("1")]
    for out, ids in zip(alone, good_ids, strict=True):
        engine.submit(prefill.job(out.name, ids), out)
        prefill.run(engine)
    attend = pack_module.attend_rows

    def attend_or_fail(prompt, q, begin, end):
        if prompt.layer == faulty_layer and prompt.num_prompt_tokens == 30:
            raise RuntimeError("fault")
        return attend(prompt, q, begin, end)

    monkeypatch.setattr(pack_module, "attend_rows", attend_or_fail)
    bad, good = sink("bad"), [sink("0"), sink("1")]
    engine.submit(prefill.job("0", good_ids[0]), good[0])
    engine.submit(prefill.job("bad", prompt(30)), bad)
    engine.submit(prefill.job("1", good_ids[1]), good[1])
    prefill.run(engine)
    assert isinstance(bad.error, InternalError) and bad.num_ends == 1
    for one, other in zip(alone, good, strict=True):
        assert other.error is None and other.log == one.log
        assert other.token_ids == one.token_ids
    assert (engine.num_requests, engine.num_pending_tokens) == (0, 0)


def test_a_pack_too_large_for_the_memory_costs_no_prompt(monkeypatch, model, prefill, prompt, sink) -> None:
    engine, alone, packed = prefill.engine(chunk=16, pack=64), sink("a"), [sink("a"), sink("b")]
    engine.submit(prefill.job("a", prompt(30)), alone)
    prefill.run(engine)
    finish_layer = type(model).finish_layer

    def limited(self, layer, x, attn):
        if len(x) > 30 or (layer == 3 and len(x) > 1):
            raise torch.OutOfMemoryError("out of memory")
        return finish_layer(self, layer, x, attn)

    monkeypatch.setattr(type(model), "finish_layer", limited)
    for out in packed:
        engine.submit(prefill.job(out.name, prompt(30)), out)
    prefill.run(engine)
    for out in packed:
        assert out.error is None and out.token_ids == alone.token_ids
        for one, other in zip(alone.layers, out.layers, strict=True):
            for name in (Part.KEYS, Part.VALUES):
                torch.testing.assert_close(
                    one.tensors[name]["rows"], other.tensors[name]["rows"], atol=TOLERANCE, rtol=TOLERANCE
                )


@pytest.mark.parametrize("verb", ["start", "layer", "tokens", "ready", "done"])
def test_a_fault_of_a_receiver_fails_its_prompt_alone(prefill, prompt, sink, verb: str) -> None:
    def fault(called: str, layer: int | None = None) -> bool:
        if called == verb:
            raise StoreUnavailable("the receiver is gone")
        return True

    engine = prefill.engine(chunk=16, pack=64)
    bad, good = sink("bad", on_call=fault, is_ready=lambda: fault("ready")), sink("good")
    for out in (bad, good):
        engine.submit(prefill.job(out.name, prompt(30)), out)
    prefill.run(engine)
    assert good.num_ends == 1 and good.error is None
    if verb != "done":  # after that there is nobody left to tell
        assert isinstance(bad.error, StoreUnavailable) and bad.num_ends == 1
    assert engine.num_requests == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_prompt_whose_logits_are_not_finite_fails_alone(make_model, prefill, prompt, sink, value: float) -> None:
    model = make_model(seed=3)
    model.weights.embed = model.weights.embed.clone()  # the head keeps its own
    model.weights.embed[96] = value
    engine = prefill.engine(model=model, chunk=16, pack=64)
    good_ids = tuple(i % 90 for i in prompt(20))
    bad, good, alone = sink("bad"), sink("good"), sink("alone")
    engine.submit(prefill.job("bad", (*good_ids, 96)), bad)
    engine.submit(prefill.job("good", good_ids), good)
    prefill.run(engine)
    assert isinstance(bad.error, InternalError) and "finite" in bad.error.message
    assert bad.sampled == [] and good.error is None
    engine.submit(prefill.job("alone", good_ids), alone)
    prefill.run(engine)
    assert good.token_ids == alone.token_ids


def test_rows_that_were_not_selected_go_no_further_and_positions_stay(monkeypatch, prefill, prompt, sink) -> None:
    kept = torch.tensor([0, 3, 4, 17, 30, 39])
    seen: list = []

    class Selecting:
        wants_unrotated_keys = True
        wants_mass = wants_query_peak = False

        def query_window(self, layer: int) -> int:
            return 5

        def wants_hidden(self, layer: int) -> bool:
            return False

        def finish_layer(self, obs):
            seen.append((obs.layer, obs.positions.tolist(), obs.q_window.clone(), obs.k.clone(), obs.k_pre.clone()))
            return [EncodedLayer(obs.layer, {})], kept if obs.layer == 1 else None

    monkeypatch.setattr(state, "make_compressor", lambda *args: Selecting())
    engine, out = prefill.engine(chunk=16, pack=32), sink("a")
    engine.submit(prefill.job("a", prompt(40)), out)
    prefill.run(engine)
    assert [len(positions) for _, positions, *_ in seen] == [40, 40, 6, 6]
    assert seen[2][1] == kept.tolist() == seen[3][1]
    for _, positions, q_window, k, k_pre in seen:
        assert q_window.shape == (5, 4, 16)
        rotated = engine.model.rotate(k_pre, torch.tensor(positions), 40)
        torch.testing.assert_close(k, rotated)
    assert out.error is None


def test_a_selection_that_loses_the_last_row_is_an_error(monkeypatch, prefill, prompt, sink) -> None:
    make = state.make_compressor

    def losing(*args):
        compressor = make(*args)
        finish = compressor.finish_layer
        compressor.finish_layer = lambda obs: (finish(obs)[0], torch.tensor([0, 1]))
        return compressor

    monkeypatch.setattr(state, "make_compressor", losing)
    engine, out = prefill.engine(), sink("a")
    engine.submit(prefill.job("a", prompt(40)), out)
    prefill.run(engine)
    assert isinstance(out.error, InternalError)


def test_bad_prompts_are_refused_before_any_work(prefill, prompt, sink, sampling) -> None:
    engine = prefill.engine()
    for ids in ((), (5, 97), (-1, 5)):
        with pytest.raises(InvalidRequest, match="prompt"):
            engine.submit(prefill.job("a", ids), sink("a"))
    with pytest.raises(InvalidRequest, match="stop_token_ids"):
        engine.submit(prefill.job("a", (5,), replace(sampling.greedy(), stop_token_ids=(97,))), sink("a"))
    for name in ("fastkv", "shadowkv", "sluice"):
        with pytest.raises(InvalidRecipe, match=r"recipe\.(propagation|key_codec)\."):
            engine.submit(prefill.job("a", prompt(500), recipe=name), sink("a"))
    engine.submit(prefill.job("a", prompt(4)), sink("a"))
    with pytest.raises(DuplicateRequest):
        engine.submit(prefill.job("a", prompt(4)), sink("a"))
    assert engine.num_requests == 1
    prefill.run(engine)
