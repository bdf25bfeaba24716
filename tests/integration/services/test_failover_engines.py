"""Real engines: a decode worker is lost in the middle of an answer, whose tokens are those of a run without a fault."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from kvsluice.errors import StoreUnavailable
from kvsluice.kvstore.frame import decode_frame
from kvsluice.kvstore.memory import MemoryStore

PROMPT = [(37 * i) % 250 + 3 for i in range(300)]
TOKENS = 70
MOST_CHOICES = 2
GREEDY = {"temperature": 0.0}
SEEDED = {"temperature": 0.9, "top_p": 0.95, "seed": 11, "presence_penalty": 0.5, "logprobs": 2}


class SharedStore(MemoryStore):
    """One that outlives the workers that use it. While it is `broken`, nothing works."""

    broken = False

    async def close(self) -> None:
        return None

    async def put(self, key, value, ttl_s):
        if self.broken:
            raise StoreUnavailable("the store is broken")
        await super().put(key, value, ttl_s)

    async def get(self, key):
        if self.broken:
            raise StoreUnavailable("the store is broken")
        return await super().get(key)


def slow_down(fleet) -> None:
    """Have every decode step take a while, so that a worker can be lost between two tokens that a client has seen."""

    def slowed(step):
        def run():
            time.sleep(0.004)
            return step()

        return run

    for engine in fleet.engines.values():
        if "step" not in vars(engine):
            engine.step = slowed(engine.step)


async def lost_at(fleet, position: int, store, **options):
    """The answer to a request whose decode worker is lost once so many tokens have come."""
    await fleet.add_decode(f"spare-{random.getrandbits(32)}", store)
    slow_down(fleet)
    stream = fleet.client.stream(PROMPT, max_tokens=TOKENS, ignore_eos=True, **options)
    came, was_lost = 0, False
    async for chunk in stream:
        came += len(chunk.token_ids)
        if came >= position and not was_lost:
            was_lost = True
            await fleet.lose(fleet.busy())
    assert was_lost
    return stream.completion


@pytest.mark.parametrize(
    ("durability", "recipe", "sampling"),
    [
        ("none", "exact", GREEDY),
        ("none", "sluice-full", SEEDED),
        ("handoff", "kivi", GREEDY),
        ("handoff", "streaming", SEEDED),
        ("tokens", "exact", SEEDED),
        ("tokens", "sluice-full", GREEDY),
        ("tokens", "kivi", SEEDED),
        ("tokens", "streaming", GREEDY),
        ("none", "recalling", GREEDY),
        ("handoff", "recalling", SEEDED),
        ("tokens", "recalling", SEEDED),
    ],
)
@pytest.mark.usefixtures("recalling")
async def test_the_stream_goes_on_token_for_token(make_real_fleet, durability, recipe, sampling):
    store = SharedStore(1 << 30)
    fleet = await make_real_fleet(store=store, store_keep_every=4)
    options = {"recipe": recipe, "durability": durability, **sampling}
    whole = await fleet.client.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True, **options)
    for position in (random.Random(recipe + durability).randrange(2, TOKENS - 12), 1):
        await until_empty(store)
        done = await lost_at(fleet, position, store, **options)
        assert done.token_ids == whole.token_ids
        assert done.text == whole.text
        assert len(done.choices[0].logprobs) == len(whole.choices[0].logprobs)
        report = done.durability
        assert report.migrations == 1
        if durability == "none":
            assert report.recomputed_prompt_tokens == len(PROMPT)
        elif position > 1:
            assert report.recomputed_prompt_tokens == 0, "it went on from the store"
        if durability == "tokens" and position > 1:
            assert report.recomputed_tokens <= 2 * 4 + 1
            assert report.kept
    await fleet.until_idle()


async def test_all_choices_of_all_streams_go_on(make_real_fleet):
    store = SharedStore(1 << 30)
    fleet = await make_real_fleet(store=store, store_keep_every=4)
    levels = ["none", "handoff", "tokens", "tokens"]
    options = [
        {"recipe": "sluice-full", "durability": level, "temperature": 0.8, "seed": i, "n": 2, "ignore_eos": True}
        for i, level in enumerate(levels)
    ]
    slow_down(fleet)
    prompts = [PROMPT[: 150 + 50 * i] for i in range(len(levels))]
    whole = [await fleet.client.generate(p, max_tokens=60, **o) for p, o in zip(prompts, options, strict=True)]
    await fleet.add_decode("spare", store)
    slow_down(fleet)
    streams = [fleet.client.stream(p, max_tokens=60, **o) for p, o in zip(prompts, options, strict=True)]

    async def read(stream):
        async for _ in stream:
            pass
        return stream.completion

    running = [asyncio.create_task(read(stream)) for stream in streams]
    while not all(engine.num_running >= 2 for engine in fleet.engines.values()):  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.1)
    await fleet.lose("worker-0")
    for task, want in zip(running, whole, strict=True):
        done = await task
        assert [choice.token_ids for choice in done.choices] == [choice.token_ids for choice in want.choices]
    await fleet.until_idle()
    await until_empty(store)


async def test_a_store_that_breaks_loses_nothing(make_real_fleet):
    store = SharedStore(1 << 30)
    fleet = await make_real_fleet(store=store, store_keep_every=4)
    options = {"recipe": "exact", "durability": "tokens", **GREEDY}
    whole = await fleet.client.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True, **options)
    await fleet.add_decode("spare", store)
    slow_down(fleet)
    stream = fleet.client.stream(PROMPT, max_tokens=TOKENS, ignore_eos=True, **options)
    came, lost = 0, False
    async for chunk in stream:
        came += len(chunk.token_ids)
        store.broken = came > 20
        if came > 40 and not lost:
            lost = True
            await fleet.lose(fleet.busy())
    assert stream.completion.token_ids == whole.token_ids
    assert not stream.completion.durability.kept
    assert stream.completion.durability.recomputed_prompt_tokens == len(PROMPT)
    await fleet.until_idle()


class FlippingStore(SharedStore):
    """One that gives values of a kind back with a flipped bit, from when it is told which."""

    kind = ""
    draw = random.Random(0)

    async def get(self, key):
        data = await super().get(key)
        if data is None or self.kind not in (key.split(":")[1], self._place(key, data)):
            return data
        bit = self.draw.randrange(8 * len(data))
        return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]

    @staticmethod
    def _place(key, data) -> str:
        """What a frame holds."""
        if ":frame:" not in key:
            return ""
        return "rows" if decode_frame(data).tokens[0] else "prompt"


@pytest.mark.parametrize("kind", ["manifest", "continuation", "prompt", "rows"])
async def test_a_flipped_bit_costs_the_prompt_and_changes_nothing(make_real_fleet, kind):
    store = FlippingStore(1 << 30)
    fleet = await make_real_fleet(store=store, store_keep_every=4)
    options = {"recipe": "kivi", "durability": "tokens", "max_tokens": TOKENS, "ignore_eos": True, **SEEDED}
    whole = await fleet.client.generate(PROMPT, **options)
    await until_empty(store)
    await fleet.add_decode("spare", store)
    slow_down(fleet)
    stream, came, lost = fleet.client.stream(PROMPT, **options), 0, False
    async for chunk in stream:
        came += len(chunk.token_ids)
        if came >= 30 and not lost:
            lost, store.kind = True, kind
            await fleet.lose(fleet.busy())
    assert stream.completion.token_ids == whole.token_ids
    assert stream.completion.durability.migrations == 1
    assert stream.completion.durability.recomputed_prompt_tokens == len(PROMPT)
    await fleet.until_idle()


async def until_empty(store) -> None:
    """All that was kept is deleted in the end, also what lost workers had kept. Heads stay until their time is over, so
    that no earlier owner can come back, and so do rows that a worker had written, and not named, when it was lost."""
    store.check_integrity()
    async with asyncio.timeout(10):
        while not only_unnamed(store._values, store._heads):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def only_unnamed(values, heads) -> bool:
    """Whether nothing is left but rows of earlier owners, those of one time that they are written for each choice."""
    left: dict[str, set[tuple[int, int]]] = {}
    for key, held in values.items():
        _, kind, sequence, epoch, *_ = key.split(":")
        head = heads.get(f"kvsluice:head:{sequence}")
        tokens = decode_frame(held.content).tokens if kind == "frame" else (0, 0)
        if not tokens[0] or head is None or int(epoch) >= head.content.epoch:
            return False
        left.setdefault(sequence, set()).add(tokens)
    return all(len(extents) <= MOST_CHOICES for extents in left.values())


async def test_what_a_session_stores_is_counted_whole_wherever_it_went_on(make_real_fleet):
    store = SharedStore(1 << 30)
    fleet = await make_real_fleet(store=store, store_keep_every=4)
    options = {"temperature": 0.0}
    await fleet.client.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True, session_id="plain", **options)
    done = await lost_at(fleet, 40, store, session_id="moved", **options)
    assert done.durability.migrations == 1
    stored = {one.session_id: one.stored_bytes for one in await fleet.client.sessions()}
    # rows may have been kept in other parts, each with its own head
    assert 0.9 * stored["plain"] < stored["moved"] < 1.1 * stored["plain"]
