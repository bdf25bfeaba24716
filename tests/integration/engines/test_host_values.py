"""Decoding with values in host memory: the same tokens, and both memories given back."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvsluice.compression.recipe import get_recipe
from kvsluice.errors import InvalidRequest, RequestCancelled
from kvsluice.kernels.dispatch import TRITON, forced
from kvsluice.services.decode.engine import FailedEvent, FinishedEvent
from kvsluice.services.decode.host_pages import HostPages

PAGE = 4096


def sparse(name: str = "sluice-full"):
    """A recipe whose steps attend to 32 of some hundreds of rows and whose answers are sealed on the way."""
    recipe = get_recipe(name)
    retrieval = recipe.retrieval.to_dict() | {"budget_tokens": 32, "budget_rate": 0.01, "outliers": 2}
    window = recipe.window.to_dict() | {"local": 16, "seal_block": 16}
    return get_recipe(name, json.dumps({"retrieval": retrieval, "window": window}))


def arena(num_pages: int = 64) -> HostPages:
    return HostPages(num_pages * PAGE, torch.device("cpu"), PAGE)


@pytest.fixture
def long_prompt(encode, prompt, sampling):
    """A prompt of 420 tokens through the recipe, two choices."""
    return encode(prompt(420), sampling.drawn(40, n=2, seed=3), sparse())


def answers(bench, encoded, names=("a",)) -> list[list[list[int]]]:
    for name in names:
        bench.start(name, encoded)
    bench.run()
    return [[bench.tokens(name, choice) for choice in range(encoded.params.n)] for name in names]


def test_the_same_tokens_wherever_values_lie(bench, long_prompt) -> None:
    (wanted,) = answers(bench(), long_prompt)
    host = arena()
    b = bench(host=host)
    assert answers(b, long_prompt, ("a", "b")) == [wanted, wanted]
    assert 0 < b.ended("a").resident_bytes < bench().engine.demand(_request(long_prompt)).total_bytes
    assert b.engine.host_free_bytes == b.engine.host_capacity_bytes
    assert host.num_free == host.num_pages


@pytest.mark.parametrize("lookahead", [True])
def test_the_same_tokens_through_the_hot_set(bench, encode, prompt, sampling) -> None:
    """The batched kernels, under the interpreter."""
    encoded = encode(prompt(420), sampling.drawn(5, seed=3), sparse())
    with forced(TRITON):
        (wanted,), (found,) = answers(bench(), encoded), answers(bench(host=arena()), encoded)
    assert found == wanted


def _request(encoded):
    from kvsluice.services.decode.engine import DecodeRequest

    return DecodeRequest("x", 1, len(encoded.ids), encoded.recipe, encoded.params)


def test_values_on_the_host_take_no_memory_of_the_device(bench, long_prompt) -> None:
    request = _request(long_prompt)
    near, far = bench().engine.demand(request), bench(host=arena()).engine.demand(request)
    assert near.host_bytes == 0
    assert far.host_bytes % PAGE == 0
    assert far.total_bytes < near.total_bytes < far.total_bytes + far.host_bytes


def test_a_request_waits_for_host_memory_and_one_that_never_fits_is_refused(bench, long_prompt) -> None:
    need = bench(host=arena()).engine.demand(_request(long_prompt)).host_bytes // PAGE
    b = bench(host=arena(need))
    b.start("a", long_prompt)
    b.open("b", long_prompt)
    assert b.engine.num_waiting == 1
    b.run()
    b.feed("b", long_prompt)
    b.run()
    assert [type(b.ended(name)) for name in "ab"] == [FinishedEvent, FinishedEvent]
    with pytest.raises(InvalidRequest, match=r"num_prompt_tokens: .* bytes of host memory; allowed: at most"):
        bench(host=arena(need - 1)).open("c", long_prompt)


@pytest.mark.parametrize("stage", ["opened", "part", "running"])
def test_a_cancelled_request_gives_its_pages_back(bench, long_prompt, stage: str) -> None:
    host = arena()
    b = bench(host=host)
    b.open("a", long_prompt)
    b.step()
    if stage == "part":
        b.engine.add_layer("a", long_prompt.layers[0])
    if stage == "running":
        b.feed("a", long_prompt)
        b.step()
    assert (host.num_free < host.num_pages) == (stage != "opened")
    assert b.engine.cancel("a")
    b.step()
    assert isinstance(b.ended("a"), FailedEvent)
    assert isinstance(b.ended("a").error, RequestCancelled)
    assert host.num_free == host.num_pages


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(st.sampled_from(["open", "step", "cancel", "choice"]), min_size=3, max_size=14))
def test_any_order_leaves_both_memories_whole(bench, long_prompt, actions: list[str]) -> None:
    """`step` checks after each one that ledgers, arena and caches agree."""
    host = arena(40)
    b = bench(host=host)
    names: list[str] = []
    for action in actions:
        if action == "open":
            names.append(f"r{len(names)}")
            b.open(names[-1], long_prompt)
            b.step()
            if names[-1] in {e.request_id for e in b.events if type(e).__name__ == "OpenedEvent"}:
                b.feed(names[-1], long_prompt)
        elif names and action != "step":
            b.engine.cancel(names[len(b.events) % len(names)], 1 if action == "choice" else None)
        b.step()
    for name in names:
        b.engine.cancel(name)
    b.run()
    b.step()
    assert host.num_free == host.num_pages
    assert b.engine.host_free_bytes == b.engine.host_capacity_bytes
