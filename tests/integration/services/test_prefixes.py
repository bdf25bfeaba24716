"""Shared beginnings of prompts through the whole service: what is said, counted, and who runs what."""

from __future__ import annotations

import pytest

from kvsluice.errors import ConfigError
from kvsluice.kvstore.memory import MemoryStore
from kvsluice.services.config import load_config
from kvsluice.services.gateway.admission import AdmissionPolicy, Ask
from kvsluice.services.gateway.fair_queue import Place

CHUNK = 16
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


def prompt(length: int, seed: int = 0) -> list[int]:
    return [2 + (7 * i * (seed + 3) + i * i + seed) % 90 for i in range(length)]


def asks(question: int) -> list[int]:
    return prompt(5 * CHUNK + 3) + prompt(20, 1 + question)


async def test_usage_says_how_much_of_a_prompt_did_not_run(make_real_fleet) -> None:
    fleet = await make_real_fleet(chunk_tokens=CHUNK)
    alone = await make_real_fleet(chunk_tokens=CHUNK, prefix_cache_bytes=0)
    first = await fleet.client.generate(asks(0), **GREEDY)
    again = await fleet.client.generate(asks(1), **GREEDY)
    wanted = await alone.client.generate(asks(1), **GREEDY)
    assert [done.usage.cached_tokens for done in (first, again, wanted)] == [0, 5 * CHUNK, 0]
    assert again.token_ids == wanted.token_ids
    assert again.usage.prompt_tokens == wanted.usage.prompt_tokens == len(asks(1))
    # the whole cache is sent; that of times and numbers in the frames' heads some are a byte longer says nothing
    assert again.recipe.handoff_bytes == pytest.approx(wanted.recipe.handoff_bytes, abs=64)
    await fleet.until_idle()
    fleet.prefill.prefixes.tree.check_integrity()


async def test_hits_and_bytes_are_counted_by_gateway_and_worker(make_real_fleet, until) -> None:
    fleet = await make_real_fleet(chunk_tokens=CHUNK)
    for question in range(3):
        await fleet.client.generate(asks(question), **GREEDY)
    await fleet.until_idle()
    tree = fleet.prefill.prefixes.tree
    await until(lambda: any(info.prefix_used_bytes == tree.used_bytes for _, info in fleet.gateway.pool.accounts()))
    gateway, worker = fleet.gateway.metrics.render().decode(), fleet.metrics.render().decode()

    def value(text: str, name: str) -> float:
        lines = [line for line in text.splitlines() if line.startswith(f"kvsluice_{name}{{")]
        assert len(lines) == 1, (name, lines)
        return float(lines[0].split()[-1])

    queries, hits = 3 * len(asks(0)), 2 * 5 * CHUNK
    assert value(gateway, "prefix_cache_queries_total") == value(worker, "worker_prefix_cache_queries_total") == queries
    assert value(gateway, "prefix_cache_hits_total") == value(worker, "worker_prefix_cache_hits_total") == hits
    assert value(gateway, "session_cached_tokens_total") == 0
    assert (
        value(gateway, "prefix_cache_used_bytes") == value(worker, "worker_prefix_cache_used_bytes") == tree.used_bytes
    )
    assert tree.used_bytes > 0
    for text, name in ((gateway, "prefix_cache_capacity_bytes"), (worker, "worker_prefix_cache_capacity_bytes")):
        assert value(text, name) == tree.capacity_bytes == 1 << 30


async def test_where_nothing_is_shared_nothing_is_looked_up(make_real_fleet) -> None:
    fleet = await make_real_fleet(chunk_tokens=CHUNK, prefix_cache_bytes=0)
    await fleet.client.generate(asks(0), **GREEDY)
    text = fleet.gateway.metrics.render().decode()
    assert 'kvsluice_prefix_cache_queries_total{model_name="tiny"} 0.0' in text


async def test_prompts_over_one_beginning_go_to_the_worker_that_has_run_it(make_fleet, until) -> None:
    fleet = await make_fleet()
    fleet.script.prefix_chunk = CHUNK
    for number in (1, 2):
        await fleet.add_worker(f"prefill-{number}", "prefill")
    links = fleet.gateway.pool._prefills

    async def say(**pending: int) -> None:
        """Have workers report these queues, the others none, and wait until the gateway has heard it of all."""
        fleet.script.pending = {name.replace("_", "-"): tokens for name, tokens in pending.items()}
        heard = fleet.script.pending.get
        await until(lambda: all(link.info.pending_tokens == heard(link.member.worker_id, 0) for link in links()))

    await until(lambda: [link.info.prefix_chunk_tokens for link in links()] == [CHUNK] * 3)
    await say(prefill_0=1000)  # busier than the others: not taken for a prompt that none knows
    await fleet.client.generate(asks(0), max_tokens=2)
    await say(prefill_1=40)  # a queue shorter than what a hit there saves
    await fleet.client.generate(asks(1), max_tokens=2)
    await fleet.client.generate(prompt(60, 9), max_tokens=2)
    await say(prefill_1=200)
    await fleet.client.generate(asks(2), max_tokens=2)
    assert fleet.script.prefilled_by == ["prefill-1", "prefill-1", "prefill-0", "prefill-0"]


@pytest.fixture
def asked(monkeypatch) -> list[Ask]:
    """What admission is asked for."""
    seen: list[Ask] = []
    place = AdmissionPolicy._place

    def noting(self: AdmissionPolicy, ask: Ask) -> Place:
        seen.append(ask)
        return place(self, ask)

    monkeypatch.setattr(AdmissionPolicy, "_place", noting)
    return seen


async def test_admission_counts_what_need_not_run(make_real_fleet, asked) -> None:
    """By ids, and by text that is not tokenized yet; from the first token on, whatever becomes of the answer."""
    fleet = await make_real_fleet(chunk_tokens=CHUNK)
    text = "A document, of which much is asked. " * 8
    for prompts in ((asks(0), asks(1), prompt(90, 7)), (text + "Why?", text + "How?", "Another one. " * 20)):
        del asked[:]
        stream = fleet.client.stream(prompts[0], temperature=0, max_tokens=400, ignore_eos=True)
        await anext(aiter(stream))  # the first answer goes on
        for one in prompts[1:]:
            await fleet.client.generate(one, **GREEDY)
        stream.cancel()
        saved = [ask.saved_tokens for ask in asked]
        assert saved[0] == saved[2] == 0 < 0.5 * asked[1].prompt_tokens < saved[1] < asked[1].prompt_tokens
    await fleet.until_idle()


async def test_what_is_found_is_worth_what_its_layers_take(make_real_fleet) -> None:
    """Where nearly all layers run for each question, a hit takes nearly as long as a miss, and counts so."""
    fleet = await make_real_fleet(chunk_tokens=CHUNK)
    propagation = {"kind": "tsp", "layer": 0, "rate": 0.95, "window": 8}
    shallow = {"recipe": "exact", "slots": {"propagation": propagation}}
    (link,) = fleet.gateway.pool._prefills()
    costs = []
    end = link._throughput.end
    link._throughput.end = lambda cost: (costs.append(cost), end(cost))[1]
    for given in ({}, shallow):
        for question in (0, 1):
            await fleet.client.generate(asks(question), **GREEDY, **given)
    (_, hit, _, shallow_hit), whole = costs, len(asks(0))
    assert hit < 0.35 * whole
    assert 0.7 * whole < shallow_hit < whole


async def test_who_leaves_pays_for_what_ran(make_real_fleet, monkeypatch) -> None:
    fleet, used = await make_real_fleet(chunk_tokens=CHUNK), []
    end = AdmissionPolicy.end

    def noting(self: AdmissionPolicy, place: Place, num_choices: int, used_tokens: float | None = None) -> list[Place]:
        used.append(used_tokens)
        return end(self, place, num_choices, used_tokens)

    monkeypatch.setattr(AdmissionPolicy, "end", noting)
    for question in (0, 1):
        await fleet.client.generate(asks(question), **GREEDY)
    stream = fleet.client.stream(asks(2), temperature=0, max_tokens=400, ignore_eos=True)
    await anext(aiter(stream))
    stream.cancel()
    await fleet.until_idle()
    miss, hit, left = used
    assert miss == len(asks(0)) + 6
    assert hit < 0.4 * miss and left < hit + 30, "a document that was found is not paid for by leaving"


async def test_turns_of_a_session_are_not_taken_for_prompts_that_are_known(make_real_fleet, asked) -> None:
    fleet = await make_real_fleet(chunk_tokens=CHUNK, store=MemoryStore(1 << 26))
    text = "A document, of which much is asked. " * 8
    await fleet.client.generate(text, **GREEDY)
    for _ in range(2):
        await fleet.client.generate(text, session_id="s", **GREEDY)
    assert [ask.saved_tokens for ask in asked] == [0.0, 0.0, 0.0]


async def test_a_worker_that_was_lost_is_not_remembered(make_fleet, until) -> None:
    fleet = await make_fleet()
    fleet.script.prefix_chunk = CHUNK
    (link,) = fleet.gateway.pool._prefills()
    await until(lambda: link.info.prefix_chunk_tokens == CHUNK)
    await fleet.client.generate(asks(0), max_tokens=2)
    assert link._has_run._shares
    await fleet.kill_worker("prefill-0")
    await until(lambda: not link.up)
    assert not link._has_run._shares, "whoever listens there next has run nothing"


def test_a_model_over_several_processes_shares_nothing() -> None:
    config = load_config({"tensor_parallel_size": 2})
    assert config.prefix_bytes("cuda") == config.prefix_bytes("cpu") == 0
    assert (
        load_config({"decode_tensor_parallel_size": 2, "prefix_cache_bytes": 1 << 20}).prefix_bytes("cuda") == 1 << 20
    )
    for settings in ({"tensor_parallel_size": 2}, {"prefill_tensor_parallel_size": 4}):
        with pytest.raises(ConfigError, match=r"prefix_cache_bytes: got 1048576, and \d processes .* allowed: 0, or"):
            load_config(settings | {"prefix_cache_bytes": 1 << 20})
    assert load_config({"tensor_parallel_size": 2, "prefix_cache_bytes": 0}).prefix_bytes("cpu") == 0


def test_by_default_only_a_cpu_shares() -> None:
    config = load_config()
    assert (config.prefix_bytes("cpu"), config.prefix_bytes("cuda")) == (1 << 30, 0)
    for wrong in (-1, 1000, (64 << 40) + 1):
        with pytest.raises(ConfigError, match="prefix_cache_bytes"):
            load_config({"prefix_cache_bytes": wrong})
