"""A request that is kept in a store: its worker may die at any point, another one says the rest of the same answer."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest

from kvsluice.compression.recipe import get_recipe
from kvsluice.errors import Fenced, FrameMismatch, SequenceLost, StoreUnavailable
from kvsluice.kvstore.frame import decode_frame
from kvsluice.kvstore.identity import FrameIdent, frame_key, head_key
from kvsluice.kvstore.manifest import ChoiceState, EmittedToken, Manifest, frame_entry
from kvsluice.kvstore.memory import MemoryStore
from kvsluice.kvstore.sequences import SequenceWriter
from kvsluice.services.decode.engine import DecodeRequest, EmittedChoice, RowsEvent, TokensEvent
from kvsluice.services.decode.keeper import Keeper
from kvsluice.services.decode.restore import Restoring, restore
from kvsluice.services.decode.start import LEASH
from kvsluice.services.framing import FramePacker
from kvsluice.services.staging import PlainCopies
from kvsluice.services.telemetry import MemoryRecorder

EVERY, TOKENS, TTL_S, PROMPT = 8, 44, 60.0, 300
CHUNKS = (
    '{"retrieval": {"kind": "chunks", "chunk": 4, "outliers": 2, "budget_tokens": 32, "budget_rate": 0.05, '
    '"landmark_bits": 8, "select_every": 2}, "window": {"kind": "ends", "sinks": 4, "local": 16, "seal_block": 16}}'
)
RECALL = {"kind": "tsp", "layer": 1, "rate": 0.3, "window": 32, "recall": 0.1, "recall_step": 4}
RECIPES = {
    "exact": get_recipe("exact"),
    "kivi": get_recipe("kivi"),
    "chunks": get_recipe("sluice-full", CHUNKS),
    "recall": get_recipe("exact", json.dumps({"propagation": RECALL})),
}


class Target:
    """A request of an engine."""

    def __init__(self, engine, name: str) -> None:
        self.engine, self.name = engine, name

    async def add_layer(self, encoded) -> None:
        self.engine.add_layer(self.name, encoded)

    async def commit(self, prompt_ids, emitted) -> None:
        self.engine.commit(self.name, prompt_ids, emitted)


@dataclass
class Worker:
    """A decode engine that keeps its one request in a store."""

    bench: Any
    store: Any
    encoded: Any
    epoch: int

    def __post_init__(self) -> None:
        self.recorder = MemoryRecorder()
        self.fenced: list[Exception] = []
        recipe = self.encoded.recipe
        self.ident = FrameIdent(
            request_id="x",
            epoch=self.epoch,
            tenant="acme",
            model_fingerprint="ab" * 16,
            recipe_fingerprint=recipe.fingerprint,
        )
        self.writer = SequenceWriter(self.store, self.ident, TTL_S)
        size = len(self.encoded.ids)
        self.engine.open(DecodeRequest("x", self.epoch, size, recipe, self.encoded.params, keep_every=EVERY))
        self.keeper = Keeper(
            self.writer, self.ident, TTL_S, PlainCopies(), self._lengthen, self.fenced.append, self.recorder
        )

    @property
    def engine(self):
        return self.bench.engine

    def _lengthen(self, choice: int, rows: float) -> None:
        self.engine.lengthen("x", choice, rows, self.epoch)

    async def prefilled(self) -> None:
        """The prompt arrives."""
        packer, entries = FramePacker(self.ident, len(self.encoded.ids)), []
        for layer in self.encoded.layers:
            for data in packer.add(layer) + (packer.flush() if layer is self.encoded.layers[-1] else []):
                entries.append(frame_entry(frame_key(self.ident, len(entries)), decode_frame(data)))
                await self.keeper.frame(data)
            self.engine.add_layer("x", layer)
        choices = tuple(ChoiceState((EmittedToken(c.token_ids[0]),), c.finish_reason) for c in self.encoded.first)
        ids = self.encoded.ids
        self.keeper.manifest(Manifest(self.ident, "{}", ids, choices, 7, tuple(entries)), self.encoded.first)
        self.engine.commit("x", ids, self.encoded.first)

    async def restored(self, told: list[list[int]]) -> None:
        """It goes on after what was told."""
        emitted = [EmittedChoice(tuple(ids), "length" if len(ids) == TOKENS else "") for ids in told]
        size, recipe = len(self.encoded.ids), self.encoded.recipe
        target = Target(self.engine, "x")
        restored = await restore(self.store, Restoring(self.ident, recipe, size, 4, 1 << 24, emitted, TTL_S), target)
        await self.keeper.take_over(restored)
        await target.commit(restored.found.manifest.prompt_ids, restored.emitted)

    async def run(self, told: list[list[int]], most: int = TOKENS, patience: int = 200) -> None:
        """Step until every choice has told `most` tokens in all, or nothing happens any more; adds them to `told`."""
        idle = 0
        while min(map(len, told)) < most and idle < patience:
            idle = 0 if self.engine.has_work else idle + 1
            for event in self.bench.step():
                if isinstance(event, RowsEvent):
                    self.keeper.rows(event)
                elif isinstance(event, TokensEvent):
                    ids = [token.token_id for token in event.sampled]
                    told[event.choice] += ids
                    self.keeper.tokens(event.choice, ids, event.sampled[-1].finish_reason)
            await asyncio.sleep(0.001 if idle else 0)

    async def die(self) -> None:
        await self.keeper.close(delete=False)
        self.engine.cancel("x")


def first_of(encoded) -> list[list[int]]:
    return [list(choice.token_ids) for choice in encoded.first]


def answers(bench, encoded) -> list[list[int]]:
    """What is said without interruption, and without keeping anything."""
    b = bench()
    b.start("x", encoded)
    b.run()
    return [[*choice.token_ids, *b.tokens("x", i)] for i, choice in enumerate(encoded.first)]


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(64 << 20)


@pytest.fixture(scope="module")
def prompts() -> dict[str, Any]:
    return {}


@pytest.fixture
def prompted(prompts, encode, prompt, sampling):
    def make(name: str, n: int = 1):
        if (name, n) not in prompts:
            prompts[name, n] = encode(prompt(PROMPT), sampling.drawn(TOKENS, n=n, seed=5), RECIPES[name])
        return prompts[name, n]

    return make


@pytest.mark.parametrize("name", sorted(RECIPES))
async def test_workers_may_die_anywhere(bench, prompted, store, name) -> None:
    encoded = prompted(name)
    wanted, draw = answers(bench, encoded), random.Random(name)
    for trial in range(4):
        told, epoch = first_of(encoded), 10 * trial + 1
        stops = sorted(draw.sample(range(2, TOKENS), 3))
        worker = Worker(bench(), store, encoded, epoch)
        await worker.prefilled()
        for stop in stops:
            await worker.run(told, stop)
            await worker.die()
            before, worker = worker, Worker(bench(), store, encoded, worker.epoch + 1)
            await asyncio.sleep(0.01)
            try:
                await worker.restored(told)
            except SequenceLost:
                assert not before.recorder.events("decode.kept"), "it died before it was kept"
                await worker.prefilled()
                told = first_of(encoded)
        await worker.run(told)
        assert told == wanted, f"stopped at {stops}"
        assert worker.bench.ended("x").steps <= TOKENS - stops[-1] + LEASH * EVERY
        await worker.keeper.close(delete=True)


@pytest.mark.parametrize("name", sorted(RECIPES))
async def test_less_may_have_been_sent_than_is_kept(bench, prompted, store, name) -> None:
    encoded = prompted(name)
    wanted = answers(bench, encoded)
    told = first_of(encoded)
    worker = Worker(bench(), store, encoded, 1)
    await worker.prefilled()
    await worker.run(told, 30)
    await asyncio.sleep(0.02)
    await worker.die()
    for epoch, sent in enumerate((27, 21, 18, 9, 2), 2):
        told = [wanted[0][:sent]]
        worker = Worker(bench(), store, encoded, epoch)
        await worker.restored(told)
        await worker.run(told, sent + 3)
        await asyncio.sleep(0.02)
        assert worker.keeper.is_kept
        await worker.die()
    told = [wanted[0][:2]]
    worker = Worker(bench(), store, encoded, 9)
    await worker.restored(told)
    await worker.run(told)
    assert told == wanted
    await worker.keeper.close(delete=True)


async def test_choices_go_on_where_each_has_come_to(bench, prompted, store) -> None:
    encoded = prompted("kivi", n=3)
    told = first_of(encoded)
    worker = Worker(bench(max_num_seqs=2), store, encoded, 1)
    await worker.prefilled()
    await worker.run(told, 20)
    await worker.die()
    other = Worker(bench(max_num_seqs=2), store, encoded, 2)
    await other.restored(told)
    await other.run(told)
    assert told == answers(bench, encoded)
    assert await store.scan("kvsluice:frame:") != []
    await other.keeper.close(delete=True)
    left = await store.scan("")
    assert head_key(other.ident) in left, "it expires"
    names = [key for key in left if "frame" in key]
    assert len(left) == 1 + len(names) <= 4, "what its earlier owner had not named expires, all else is deleted"
    assert all(key.split(":")[3] == "1" for key in names)


class Blocking(MemoryStore):
    """A store that takes nothing while its gate is shut."""

    def __init__(self) -> None:
        super().__init__(64 << 20)
        self.gate = asyncio.Event()
        self.gate.set()

    async def put(self, *args) -> None:
        await self.gate.wait()
        await super().put(*args)


async def test_a_store_that_is_slow_holds_its_request_on_a_leash(bench, prompted) -> None:
    encoded, store = prompted("exact"), Blocking()
    told = first_of(encoded)
    worker = Worker(bench(), store, encoded, 1)
    await worker.prefilled()
    await worker.run(told, 10)
    store.gate.clear()
    await worker.run(told)
    assert len(told[0]) <= 10 + LEASH * EVERY
    at = len(told[0])
    await worker.die()
    store.gate.set()
    other = Worker(bench(), store, encoded, 2)
    await other.restored(told)
    await other.run(told)
    assert told == answers(bench, encoded)
    assert other.bench.ended("x").steps <= TOKENS - at + LEASH * EVERY, "no more is computed again than the leash"
    await other.keeper.close(delete=True)


async def test_a_store_that_fails_loses_no_request(bench, prompted, monkeypatch) -> None:
    encoded = prompted("chunks")
    wanted = answers(bench, encoded)
    for fails_after in (0, 2, 9):
        store = MemoryStore(64 << 20)
        puts = iter(range(10_000))

        async def put(key, value, ttl_s, put=store.put, puts=puts, fails_after=fails_after) -> None:
            if next(puts) >= fails_after:
                raise StoreUnavailable("the store is gone")
            await put(key, value, ttl_s)

        store.put = put
        told = first_of(encoded)
        worker = Worker(bench(), store, encoded, 1)
        await worker.prefilled()
        await worker.run(told)
        assert told == wanted and not worker.keeper.is_kept and not worker.fenced
        assert len(worker.recorder.events("decode.not_kept", error_type="StoreUnavailable")) == 1
        await worker.keeper.close(delete=True)


async def test_an_owner_that_wakes_up_late_is_fenced(bench, prompted, store) -> None:
    encoded = prompted("kivi")
    told = first_of(encoded)
    sleeper = Worker(bench(), store, encoded, 1)
    await sleeper.prefilled()
    await sleeper.run(told, 12)
    other, on_time = Worker(bench(), store, encoded, 2), [list(ids) for ids in told]
    await other.restored(on_time)
    await sleeper.run(told)
    assert [type(error) for error in sleeper.fenced] == [Fenced]
    await other.run(on_time)
    assert on_time == answers(bench, encoded)
    await sleeper.die()
    await other.keeper.close(delete=True)


async def kept(bench, prompted, store, tokens: int = 20) -> list[list[int]]:
    encoded = prompted("exact")
    told = first_of(encoded)
    worker = Worker(bench(), store, encoded, 1)
    await worker.prefilled()
    await worker.run(told, tokens)
    await asyncio.sleep(0.02)
    await worker.die()
    return told


@pytest.mark.parametrize("what", ["manifest", "continuation", "frame", "rows", "flipped", "swapped", "head", "nothing"])
async def test_what_cannot_be_used_is_lost_and_nothing_of_it_is(bench, prompted, store, what) -> None:
    told, encoded = await kept(bench, prompted, store), prompted("exact")
    frames = await store.scan("kvsluice:frame:")
    ordered = sorted(frames, key=lambda key: int(key.split(":")[-1]))
    if what in ("manifest", "continuation", "head"):
        store._values = {k: v for k, v in store._values.items() if not k.startswith(f"kvsluice:{what}:")}
        store._heads = {} if what == "head" else store._heads
        store.used_bytes = sum(v.charged_bytes for v in (*store._values.values(), *store._heads.values()))
    elif what in ("frame", "rows"):
        await store.delete(ordered[1 if what == "frame" else -1])
    elif what == "flipped":
        data = await store.get(ordered[0])
        await store.delete(ordered[0])
        await store.put(ordered[0], data[:100] + bytes([data[100] ^ 4]) + data[101:], TTL_S)
    elif what == "swapped":
        a, b = await store.get(ordered[0]), await store.get(ordered[1])
        for key, value in ((ordered[0], b), (ordered[1], a)):
            await store.delete(key)
            await store.put(key, value, TTL_S)
    worker = Worker(bench(), store, encoded, 2)
    if what == "nothing":
        await worker.restored(told)
    else:
        with pytest.raises(SequenceLost):
            await worker.restored(told)
    await worker.die()


async def test_other_tokens_than_were_sent_are_never_continued(bench, prompted, store) -> None:
    told, encoded = await kept(bench, prompted, store), prompted("exact")
    worker = Worker(bench(), store, encoded, 2)
    with pytest.raises(SequenceLost, match="other tokens"):
        await worker.restored([[*told[0][:3], told[0][3] ^ 1, *told[0][4:]]])
    with pytest.raises(SequenceLost, match="number of choices"):
        await worker.restored([told[0], told[0]])
    with pytest.raises(SequenceLost, match="another length"):
        worker.encoded = replace(encoded, ids=encoded.ids[:-1])
        await worker.restored(told)
    worker.encoded = encoded
    await worker.die()
    late = Worker(bench(), store, encoded, 1)
    with pytest.raises(Fenced):
        await late.restored(told)
    await late.die()


async def test_layers_that_do_not_fit_are_lost(bench, prompted, store, monkeypatch) -> None:
    told, encoded = await kept(bench, prompted, store), prompted("exact")
    worker = Worker(bench(), store, encoded, 2)

    def mismatch(*args) -> None:
        raise FrameMismatch("it does not fit")

    monkeypatch.setattr(worker.engine, "add_layer", mismatch)
    with pytest.raises(SequenceLost, match="does not fit"):
        await worker.restored(told)
    await worker.die()
