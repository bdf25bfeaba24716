"""Steps that are launched before the one under way is settled: what they say is what they would say one by one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

from kvsluice.errors import InternalError
from kvsluice.evals.pipeline import LocalPipeline
from kvsluice.kernels.dispatch import TRITON
from kvsluice.models.drawing import Drawn
from kvsluice.models.sampling import Sampled, SamplingParams
from kvsluice.services.decode import launch as launch_module
from kvsluice.services.decode import step as step_module
from kvsluice.services.decode.engine import FailedEvent, FinishedEvent, TokensEvent

PARAMS = (
    {"temperature": 0.0},
    {"n": 3, "seed": 4},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "seed": 1},
    {"min_p": 0.02, "logprobs": 3, "seed": 2},
    {"n": 2, "repetition_penalty": 1.4, "frequency_penalty": 0.3, "seed": 3},
    {"temperature": 0.0, "presence_penalty": 1.0, "logprobs": 0},
    {"logit_bias": {5: 6.0, 7: 5.0}, "seed": 8},
    {"n": 2, "stop_token_ids": tuple(range(2, 20)), "min_tokens": 5, "seed": 9},
    {"n": 4, "stop_token_ids": tuple(range(2, 12)), "temperature": 1.5, "seed": 10},
)


@pytest.fixture
def lookahead() -> bool:
    """Of engines that are not asked for the other way."""
    return True


@dataclass
class Told:
    """What a request was told of, whatever the order among requests."""

    sampled: dict[int, list] = field(default_factory=dict)
    ends: list = field(default_factory=list)


def told(b) -> dict[str, Told]:
    out: dict[str, Told] = {}
    for event in b.events:
        one = out.setdefault(event.request_id, Told())
        if isinstance(event, TokensEvent):
            known = one.sampled.setdefault(event.choice, [])
            assert not known or event.first_index == known[0][0] + len(known)
            known.extend((event.first_index, sampled) for sampled in event.sampled)
        elif isinstance(event, FinishedEvent):
            one.ends.append((event.steps, event.bytes_read))
        elif isinstance(event, FailedEvent):
            one.ends.append(type(event.error))
    return out


@pytest.fixture
def mixed(bench, encode, prompt):
    """mixed(...) -> what requests with all kinds of sampling are told that join one after the other."""
    requests = [
        encode(prompt(20 + 9 * i, i), SamplingParams(**{"max_tokens": 9 + 2 * i, "ignore_eos": True} | params))
        for i, params in enumerate(PARAMS)
    ]

    def run(lookahead: bool, slots: int) -> dict[str, Told]:
        b = bench(lookahead=lookahead, max_num_seqs=slots)
        for i, encoded in enumerate(requests):
            b.start(str(i), encoded, credits=3 if i % 3 == 1 else None)
            b.step()
            if i % 3 == 1:
                b.step()
                b.engine.grant(str(i), 2)
        while b.engine.has_work:
            b.step()
            if not b.engine.has_work:
                for i in range(1, len(requests), 3):
                    b.engine.grant(str(i), 5)
        return told(b)

    return run


@pytest.mark.parametrize("slots", [3, 64])
def test_tokens_and_counts_are_those_of_steps_one_by_one(mixed, slots: int) -> None:
    waiting, ahead = mixed(False, slots), mixed(True, slots)
    assert ahead.keys() == waiting.keys()
    for name, one in ahead.items():
        assert one.ends == waiting[name].ends and len(one.ends) == 1
        assert one.sampled.keys() == waiting[name].sampled.keys()
        for choice, sampled in one.sampled.items():
            expected = waiting[name].sampled[choice]
            assert [plain(token) for token in sampled] == [plain(token) for token in expected]
            # rows that are computed in vain make other batches, over which linear maps may round otherwise
            assert [numbers(token) for token in sampled] == [pytest.approx(numbers(token)) for token in expected]


def plain(token: tuple[int, Sampled]) -> tuple[object, ...]:
    index, sampled = token
    return index, sampled.token_id, sampled.finish_reason, sampled.stop_token, [i for i, _ in sampled.top]


def numbers(token: tuple[int, Sampled]) -> list[float]:
    return [0.0 if token[1].logprob is None else token[1].logprob, *(value for _, value in token[1].top)]


def test_a_step_is_launched_before_the_one_under_way_is_read(bench, encode, prompt, sampling, monkeypatch) -> None:
    order, plain = [], Drawn.read
    monkeypatch.setattr(Drawn, "read", lambda self: order.append("read") or plain(self))
    draw = launch_module.draw_rows
    monkeypatch.setattr(launch_module, "draw_rows", lambda *args: order.append("drawn") or draw(*args))
    b = bench()
    b.start("a", encode(prompt(30), sampling.drawn(6)))
    order.clear()  # prefill draws as well
    assert b.step() != [], "it was let in"
    assert order == ["drawn"]
    b.run()
    assert order == ["drawn", "drawn", "read", "drawn", "read", "drawn", "read", "drawn", "read", "read"]


def test_what_is_computed_in_vain_costs_no_credit_and_is_not_counted(bench, encode, prompt, sampling) -> None:
    encoded = encode(prompt(40), sampling.drawn(30, n=2))
    free = bench(lookahead=False)
    free.start("x", encoded)
    free.run()
    stop = free.tokens("x", 0)[5]
    assert stop not in free.tokens("x", 0)[:5] + free.tokens("x", 1)[:12]
    params = replace(encoded.params, stop_token_ids=(stop,))
    stopping = replace(encoded, params=params)
    b = bench()
    b.start("x", stopping, credits=6 + 12)
    b.run()
    assert len(b.tokens("x", 0)) == 6
    assert len(b.tokens("x", 1)) == 12, "every credit was good for a token"
    b.engine.cancel("x", 1)
    b.run()
    assert b.ended("x").steps == 6 + 12


@pytest.mark.parametrize("whole", [False, True])
def test_a_choice_that_is_cancelled_under_way_is_told_of_no_more(bench, encode, prompt, sampling, whole) -> None:
    other = encode(prompt(30), sampling.drawn(12))
    b = bench()
    b.start("a", encode(prompt(40), sampling.drawn(30, n=2)))
    b.start("b", other)
    for _ in range(4):
        b.step()
    before = len(b.tokens("a", 0))
    b.engine.cancel("a", None if whole else 0)
    b.engine.check_integrity()
    if whole:  # the same request comes again while the old one's step is under way
        b.start("a", other)
        b.run()
        assert len(b.tokens("b")) == 11
        assert [e.choice for e in b.of("a", TokensEvent)[2 * before :]] == [0] * 11
    else:
        b.run()
        assert len(b.tokens("a", 0)) == before == 3
        assert b.ended("a").steps == 3 + 29


def test_a_fault_at_launch_comes_after_the_tokens_before_it(monkeypatch, bench, encode, prompt, sampling) -> None:
    ends, goes_on = encode(prompt(30), sampling.drawn(4)), encode(prompt(31), sampling.drawn(9))
    b = bench()
    b.start("ends", ends)
    b.start("goes on", goes_on)
    for _ in range(3):
        b.step()

    def fault(*args):
        raise RuntimeError("secret")

    monkeypatch.setattr(step_module, "forward_rows", fault)
    b.step()
    monkeypatch.undo()
    assert len(b.tokens("ends")) == 3 and isinstance(b.ended("ends"), FinishedEvent)
    assert len(b.tokens("goes on")) == 3 and isinstance(b.ended("goes on").error, InternalError)
    assert not b.engine.has_work


@pytest.mark.parametrize("ahead", [False, True])
def test_a_device_that_fails_ends_every_request_of_the_step_and_then_the_engine(
    monkeypatch, bench, encode, prompt, sampling, ahead
) -> None:
    b = bench(lookahead=ahead)
    for name in "ab":
        b.start(name, encode(prompt(30), sampling.drawn(9)))

    def fault(self):
        raise RuntimeError("secret")

    b.step()
    with monkeypatch.context() as broken:
        broken.setattr(Drawn, "read", fault)
        while not b.of("a", FailedEvent):
            b.step()
    for name in "ab":
        assert isinstance(b.ended(name).error, InternalError) and "secret" not in b.ended(name).error.message
    assert b.engine.has_work
    with pytest.raises(RuntimeError, match="secret"):
        b.engine.step()
    b.engine._broken = None  # so that it can be looked into


def test_inputs_that_only_the_device_knows_are_looked_up_there() -> None:
    computation = step_module.StepComputation.__new__(step_module.StepComputation)
    computation.sampled = torch.tensor([40, 41, 42])
    ids = torch.tensor([7, step_module.sampled_by(2), 0, step_module.sampled_by(0)])
    assert computation.known(ids).tolist() == [7, 42, 0, 40]


def test_a_step_of_batched_kernels_is_fed_by_the_one_before(make_model, prompt, monkeypatch) -> None:
    model = make_model(2, hidden_size=128)
    drawn = SamplingParams(max_tokens=6, temperature=1.0, seed=5, n=2, ignore_eos=True)
    requests = [(prompt(60 + 30 * i, i), "exact", drawn) for i in range(2)]

    def answers(lookahead: bool) -> list[list[list[int]]]:
        pipeline = LocalPipeline(model, lookahead=lookahead)
        done = [one.token_ids for one in pipeline.generate_many(requests)]
        pipeline.check_integrity()
        return done

    expected = answers(False)
    rows = []
    inputs = step_module.StepRunner._inputs
    monkeypatch.setattr(step_module, "runs", lambda name, device: name == TRITON)
    monkeypatch.setattr(
        step_module.StepRunner, "_inputs", lambda self, batch: rows.extend(r[0] for r in batch) or inputs(self, batch)
    )
    assert answers(True) == expected
    assert sum(row < 0 for row in rows) >= 2 * 2 * 3, "tokens that the host did not know yet"
