"""Both engines together: every recipe end to end, batches, long answers, fallbacks."""

from __future__ import annotations

import json

import pytest
import torch

from kvsluice.compression.recipe import get_recipe, recipe_names, resolve
from kvsluice.errors import InvalidRequest
from kvsluice.models.forward import forward_tokens
from kvsluice.services.decode.engine import EmittedChoice
from kvsluice.services.decode.sequence import MOST_ALONE

LONG = 1200  # no recipe falls back at this length


def small_sluice():
    """`sluice` with numbers that make a short prompt sparse: 32 rows attended to of some hundreds."""
    sluice = get_recipe("sluice")
    retrieval = sluice.retrieval.to_dict() | {"budget_tokens": 32}
    window = sluice.window.to_dict() | {"local": 16, "seal_block": 16}
    return get_recipe("sluice", json.dumps({"retrieval": retrieval, "window": window}))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_runs_end_to_end(pipeline, prompt, sampling, name: str) -> None:
    p = pipeline()
    answer = p.generate(prompt(LONG), name, sampling.drawn(70, n=2))
    assert answer.resolved.fallback_reason is None
    assert answer.resolved.recipe.name == name
    assert [len(choice) for choice in answer.token_ids] == [70, 70]
    assert answer.finish_reasons == ("length", "length")
    stats = answer.stats
    assert stats.steps == 2 * 69
    assert stats.bf16_bytes == 2 * 2 * 4 * 2 * 16 * LONG
    fp32_bytes = 2 * stats.bf16_bytes
    if name == "exact":
        assert fp32_bytes <= stats.payload_bytes < 1.01 * fp32_bytes
    else:
        assert stats.payload_bytes < 0.75 * fp32_bytes
        assert stats.bytes_read < stats.steps * fp32_bytes


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_runs_in_bf16(make_model, pipeline, prompt, sampling, name: str) -> None:
    model = make_model(dtype=torch.bfloat16)
    answer = pipeline(model).generate(prompt(LONG), name, sampling.drawn(40, n=2))
    assert answer.resolved.recipe.name == name
    assert [len(choice) for choice in answer.token_ids] == [40, 40]
    if name == "exact":
        assert answer.stats.bf16_bytes <= answer.stats.payload_bytes < 1.01 * answer.stats.bf16_bytes


@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "exact"])
def test_a_prompt_too_short_for_a_recipe_runs_exact_and_says_so(pipeline, prompt, sampling, name: str) -> None:
    p, ids = pipeline(), prompt(9)
    answer = p.generate(ids, name, sampling.drawn(10))
    assert answer.resolved.requested == name
    assert answer.resolved.recipe.name == "exact"
    assert "9 tokens" in answer.resolved.fallback_reason
    assert answer.token_ids == p.generate(ids, "exact", sampling.drawn(10)).token_ids


FAMILIES = {
    "llama": {},
    "mistral": {"model_type": "mistral", "sliding_window": 48},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_equals_the_dense_pass(make_model, pipeline, prompt, sampling, family: str) -> None:
    ids, model = prompt(150), make_model(**FAMILIES[family])
    got = pipeline(model).generate(ids, "exact", sampling.greedy(30)).token_ids[0]
    sequence = list(ids)
    for _ in range(30):
        sequence.append(int(forward_tokens(model, torch.tensor(sequence))[-1].argmax()))
    assert got == sequence[150:]


def test_a_batch_of_mixed_recipes_gives_what_each_gives_alone(pipeline, prompt, sampling) -> None:
    recipes = ("exact", "fastkv", "shadowkv", small_sluice())
    requests = [(prompt(450 + 150 * i, i), recipes[i % 4], sampling.drawn(40, seed=i)) for i in range(8)]
    together = pipeline(max_num_seqs=5).generate_many(requests)
    for request, answer in zip(requests, together, strict=True):
        assert answer.token_ids == pipeline().generate(*request).token_ids


def test_choices_equal_separate_runs(pipeline, prompt, sampling) -> None:
    ids, p = prompt(500), pipeline()
    answer = p.generate(ids, small_sluice(), sampling.drawn(40, n=3, seed=9))
    assert len({tuple(choice) for choice in answer.token_ids}) == 3
    assert p.generate(ids, small_sluice(), sampling.drawn(40, n=1, seed=9)).token_ids[0] == answer.token_ids[0]
    assert p.generate(ids, small_sluice(), sampling.drawn(40, n=3, seed=9)).token_ids == answer.token_ids


def test_dynamic_rope_goes_by_each_prompts_own_length(make_model, pipeline, prompt, sampling) -> None:
    model = make_model(max_position_embeddings=64, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    requests = [(prompt(length, length), "exact", sampling.drawn(20, seed=length)) for length in (40, 60, 100, 170)]
    together = pipeline(model).generate_many(requests)
    for request, answer in zip(requests, together, strict=True):
        assert answer.token_ids == pipeline(model).generate(*request).token_ids


@pytest.mark.parametrize("recipe", ["fastkv", small_sluice()], ids=["fastkv", "sluice"])
def test_a_long_answer_equals_its_replay_at_any_point(bench, encode, prompt, sampling, recipe) -> None:
    encoded = encode(prompt(500), sampling.drawn(130, repetition_penalty=1.1), recipe)
    assert encoded.recipe.name != "exact"
    b = bench()
    b.start("x", encoded)
    b.run()
    wanted = [*encoded.first[0].token_ids, *b.tokens("x")]
    assert len(wanted) == 130
    # around the seal of a block, in the middle of one, and near the end
    for replayed in (15, 17, 64, 129):
        again = bench()
        again.start("x", encoded, [EmittedChoice(tuple(wanted[:replayed]))])
        again.run()
        assert wanted[:replayed] + again.tokens("x") == wanted
        if replayed <= MOST_ALONE:
            assert again.ended("x").bytes_read == b.ended("x").bytes_read
        else:
            assert again.ended("x").bytes_read < b.ended("x").bytes_read, "rows of a block share what they read"


def test_sealing_keeps_long_answers_small(bench, encode, prompt, sampling) -> None:
    b, encoded = bench(), encode(prompt(500), sampling.drawn(400), small_sluice())
    b.start("x", encoded)
    sizes = []
    while b.engine.has_work:
        b.step()
        if "x" in b.engine._runs and b.engine._runs["x"].choices:
            sizes.append(sum(run.cache.own_nbytes() for run in b.engine._runs["x"].choices.values()))
    bf16_row = 4 * 2 * 2 * 16 * 2  # what a row takes before it is sealed
    assert sizes[-1] - sizes[99] < 0.4 * 300 * bf16_row


def test_the_effective_recipe_is_the_resolved_one(pipeline, prompt, sampling) -> None:
    p = pipeline()
    recipe = resolve(get_recipe("fastkv"), p.shape, 500, {"fastkv_layer": 2}).recipe
    answer = p.generate(prompt(500), recipe, sampling.drawn(4))
    assert answer.resolved.recipe.propagation.layer == 2
    assert answer.stats.kept_rows == (50, 50, 50, 50)


def test_an_answer_of_one_token_never_reaches_decode(pipeline, prompt, sampling) -> None:
    answer = pipeline().generate(prompt(50), "exact", sampling.drawn(1))
    assert [len(choice) for choice in answer.token_ids] == [1]
    assert answer.stats.steps == 0


def test_an_error_of_one_request_is_raised_and_leaves_nothing(pipeline, prompt, sampling) -> None:
    p = pipeline(capacity_bytes=1 << 20)
    with pytest.raises(InvalidRequest, match="bytes"):
        p.generate(prompt(4000), "exact", sampling.drawn(4))
    with pytest.raises(InvalidRequest, match="prompt"):
        p.generate([], "exact", sampling.drawn(4))


def test_requests_that_wait_for_memory_get_it_in_turn(pipeline, prompt, sampling) -> None:
    one = pipeline(capacity_bytes=200_000)
    requests = [(prompt(60, i), "exact", sampling.drawn(10, seed=i)) for i in range(8)]
    answers = one.generate_many(requests)
    assert one.decode.scheduler.pool.high_water_bytes <= 200_000
    assert [a.token_ids for a in answers] == [pipeline().generate(*request).token_ids for request in requests]
