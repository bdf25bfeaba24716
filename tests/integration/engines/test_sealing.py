"""Answers whose blocks are sealed together with those of others, as on a GPU; sealing itself is the reference's."""

from __future__ import annotations

import json

import pytest

from kvsluice.compression import cache as cache_module
from kvsluice.compression.recipe import get_recipe
from kvsluice.compression.sealing import Sealing
from kvsluice.kernels.dispatch import TRITON
from kvsluice.services.decode import step as step_module

LOWRANK = {"kind": "lowrank", "rank": 12, "bits": 8}
CHANNEL = {"kind": "affine", "bits": 4, "axis": "channel", "group": 16}


def sealing_recipe(keys: dict):
    """Blocks of 16 rows, the first of which is due after a few tokens."""
    recipe = get_recipe("sluice-full")
    retrieval = recipe.retrieval.to_dict() | {"budget_tokens": 32, "budget_rate": 0.01}
    window = recipe.window.to_dict() | {"local": 16, "seal_block": 16}
    return get_recipe("sluice-full", json.dumps({"retrieval": retrieval, "window": window, "key_codec": keys}))


@pytest.fixture
def model(make_model):
    """The interpreter takes its time for every layer."""
    return make_model(2)


@pytest.fixture
def lookahead() -> bool:
    """As on a GPU; the interpreter takes its time for every run."""
    return True


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch) -> None:
    for module in (step_module, cache_module):
        monkeypatch.setattr(module, "runs", lambda name, device: name == TRITON)


def answers(bench, encoded, names) -> dict[tuple[str, int], list[int]]:
    b = bench()
    for name in names:
        b.start(name, encoded[name])
    b.run()
    return {(name, i): b.tokens(name, i) for name in names for i in range(encoded[name].params.n)}


@pytest.fixture
def encoded(encode, prompt, sampling):
    return {
        "a": encode(prompt(126), sampling.drawn(5, n=2, seed=3), sealing_recipe(LOWRANK)),
        "b": encode(prompt(125, 1), sampling.drawn(5, seed=4), sealing_recipe(CHANNEL)),
        "c": encode(prompt(120, 2), sampling.drawn(3, seed=5), sealing_recipe(LOWRANK)),
    }


def test_neighbours_change_no_token(bench, encoded, monkeypatch) -> None:
    """Two recipes, two choices of a prompt, and a sequence that ends before the others; what is held is never more
    than what was reserved, which the bench checks after every step."""
    sealed, seal = [], Sealing.seal

    def counted(self: Sealing) -> None:
        sealed.append(self.is_packed)
        seal(self)

    monkeypatch.setattr(Sealing, "seal", counted)
    together = answers(bench, encoded, ("a", "b", "c"))
    assert len(sealed) == 3 and all(sealed)
    alone = {key: ids for name in encoded for key, ids in answers(bench, encoded, (name,)).items()}
    assert together == alone


def test_a_block_that_was_packed_is_let_go_with_its_request(bench, encoded) -> None:
    b = bench()
    for name in ("a", "b"):
        b.start(name, encoded[name])
    for _ in range(2):
        b.step()
    b.engine.cancel("a", 0)
    b.engine.cancel("b")
    b.run()
    assert len(b.tokens("a", 1)) == 4
