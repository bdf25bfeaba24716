"""More requests than the device holds: they take turns there, and none says anything else for it."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvsluice.compression.recipe import get_recipe, recipe_names
from kvsluice.errors import InvalidRequest, RequestCancelled
from kvsluice.kernels.dispatch import TRITON, forced
from kvsluice.models.sampling import SamplingParams
from kvsluice.services.decode.engine import DecodeRequest, FailedEvent, FinishedEvent
from kvsluice.services.decode.host_pages import HostPages
from kvsluice.services.decode.tiers import Place, TierPolicy

PAGE = 4096
PARAMS = (
    {"temperature": 0.0},
    {"n": 2, "seed": 4},
    {"seed": 2, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "logprobs": 1},
)


def arena(num_pages: int = 2048) -> HostPages:
    return HostPages(num_pages * PAGE, torch.device("cpu"), PAGE)


def sealing(name: str):
    """The recipe, sealing every 16 rows where it seals."""
    recipe = get_recipe(name)
    if not recipe.window.seal_block:
        return recipe
    return get_recipe(name, json.dumps({"window": recipe.window.to_dict() | {"seal_block": 16}}))


@pytest.fixture
def prompts(encode, prompt):
    """prompts(recipe) -> prompts with all kinds of sampling."""

    def make(recipe, tokens: int = 24, length: int = 200, params=PARAMS):
        return [
            encode(prompt(length + 7 * i, i), SamplingParams(max_tokens=tokens, ignore_eos=True, **one), recipe)
            for i, one in enumerate(params)
        ]

    return make


def demand(bench, encoded):
    request = DecodeRequest("x", 1, len(encoded.ids), encoded.recipe, encoded.params)
    return bench(host=arena()).engine.demand(request)


def oversubscribed(bench, encoded, time_slice: int = 3, **more):
    """An engine whose device holds the largest of the requests and no other."""
    most = max(demand(bench, one).total_bytes for one in encoded)
    policy = TierPolicy(time_slice=time_slice)
    return bench(capacity_bytes=most, tiers=policy, **{"host": arena()} | more)


def start_in_turn(b, encoded) -> None:
    """Start requests as they are let in."""
    left = {str(i): one for i, one in enumerate(encoded)}
    for name, one in left.items():
        b.open(name, one)
    while left:
        told = b.step()
        for event in told:
            if type(event).__name__ == "OpenedEvent":
                b.feed(event.request_id, left.pop(event.request_id))


def told(b, encoded) -> list[list[list[int]]]:
    return [[b.tokens(str(i), c) for c in range(one.params.n)] for i, one in enumerate(encoded)]


@pytest.mark.parametrize("name", recipe_names())
def test_turns_change_no_token(bench, prompts, name: str) -> None:
    encoded = prompts(sealing(name))
    alone = bench(host=arena())
    start_in_turn(alone, encoded)
    alone.run()
    b = oversubscribed(bench, encoded)
    start_in_turn(b, encoded)
    b.run()
    assert told(b, encoded) == told(alone, encoded)
    counts = b.engine.scheduler.tiers.counts
    assert counts.preemptions >= 3
    assert counts.resumes == counts.preemptions
    assert counts.bytes_down == counts.bytes_up > 0
    assert [b.ended(str(i)).steps for i in range(3)] == [alone.ended(str(i)).steps for i in range(3)]
    assert b.engine.host_free_bytes == b.engine.host_capacity_bytes
