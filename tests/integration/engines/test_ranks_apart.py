"""What one rank alone may meet ends it, and with it all of them; what all meet ends a request."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from kvsluice.compression.cache import RecipeCache
from kvsluice.errors import FrameMismatch
from kvsluice.models.model import Model
from kvsluice.models.parallel import Ranks, RanksBroken
from kvsluice.services.decode import parallel as parallel_module
from kvsluice.services.decode.engine import DecodeEngine, DecodeRequest, FailedEvent
from kvsluice.services.decode.parallel import Follower, LeadingEngine


class Told:
    """Stands for the ranks of a model: `words` are what rank 0 says, and nobody else has any heads."""

    rank, size = 1, 1

    def __init__(self, leads: bool) -> None:
        self.leads, self.words, self.tensors = leads, [], []

    def tell(self, word, **fields) -> None:
        self.words.append({"word": word} | fields)

    def hear(self):
        return self.words.pop(0)

    def hand_out(self, parts) -> None:
        self.tensors.append(parts[0])

    def take(self, specs):
        return self.tensors.pop(0)

    def sum(self, x):
        return x


@pytest.fixture
def ranks(model):
    """Rank 0's engine and a follower of it, which hears what was told."""

    def make():
        lead, other = Told(leads=True), Told(leads=False)
        other.words, other.tensors = lead.words, lead.tensors
        engines = [
            kind(Model(model.config, model.weights, "tiny", told), 64 << 20, max_waiting=0)
            for kind, told in ((LeadingEngine, lead), (DecodeEngine, other))
        ]
        return engines[0], Follower(engines[1]), engines[1]

    return make


def open_one(engine, encoded, name="a") -> None:
    engine.open(DecodeRequest(name, 1, len(encoded.ids), encoded.recipe, encoded.params))


def follow(lead, follower) -> None:
    lead.stop()
    follower.run()


def out_of_memory(self, encoded) -> None:
    raise torch.OutOfMemoryError("secret")


@pytest.mark.parametrize("leads", [True, False])
def test_a_rank_without_memory_for_a_layer_does_not_go_on_without_the_request(
    ranks, encode, prompt, sampling, monkeypatch, leads: bool
) -> None:
    """The others would sum other rows with it."""
    encoded = encode(prompt(40), sampling.greedy())
    lead, follower, _ = ranks()
    open_one(lead, encoded)
    if leads:
        monkeypatch.setattr(RecipeCache, "add_layer", out_of_memory)
        with pytest.raises(RanksBroken):
            lead.add_layer("a", encoded.layers[0], 1)
    else:
        lead.add_layer("a", encoded.layers[0], 1)
        monkeypatch.setattr(RecipeCache, "add_layer", out_of_memory)
        with pytest.raises(RanksBroken):
            follow(lead, follower)


def test_what_all_ranks_refuse_ends_a_request_and_leaves_nothing_of_it(
    ranks, encode, prompt, sampling, monkeypatch
) -> None:
    encoded = encode(prompt(40), sampling.greedy())
    lead, follower, engine = ranks()
    for i in range(
        3
    ):  # cancelled while it waits for layers; with a layer that came twice; with one that cannot be read
        open_one(lead, encoded, f"{i}")
    lead.cancel("0", None, 1)
    lead.add_layer("1", encoded.layers[0], 1)
    with pytest.raises(FrameMismatch, match="twice"):
        lead.add_layer("1", encoded.layers[0], 1)
    with monkeypatch.context() as patch:
        patch.setattr(parallel_module, "check_tensors", lambda *args: out_of_memory(None, None))
        with pytest.raises(Exception, match="ran out of memory"):
            lead.add_layer("2", encoded.layers[0], 1)
    follow(lead, follower)
    assert follower._requests == {}
    for one in (lead, engine):
        assert one.free_bytes == one.capacity_bytes
    assert [type(event) for event in engine._events if isinstance(event, FailedEvent)] == [FailedEvent] * 3


@pytest.mark.parametrize("fails", ["empty_like", "cat"])
def test_a_rank_without_memory_for_what_it_gathers_does_not_take_it_for_the_next(monkeypatch, fails: str) -> None:
    """The others have sent it, and would not know that nobody wanted it."""
    rank = object.__new__(Ranks)
    rank.rank, rank.size, rank._sums = 0, 2, None
    monkeypatch.setattr(dist, "gather", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch, fails, lambda *args, **kwargs: out_of_memory(None, None))
    with pytest.raises(RanksBroken):
        rank.gather(torch.zeros(3, 2), 1)
