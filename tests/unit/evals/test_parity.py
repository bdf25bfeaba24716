"""The comparison with transformers: it must not call different what is equal, nor equal what is different."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvsluice.client import Choice, Completion, DurabilityReport, RecipeReport, Timing, TokenLogprob, Usage
from kvsluice.evals import parity

PROMPT = [5, 9, 11, 40]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def reference(model) -> parity.Reference:
    return parity.generate_reference(model, PROMPT)


def completion(tokens: list[int], logprobs: list[float], finish_reason: str = "length") -> Completion:
    listed = tuple(TokenLogprob(token, "", logprob) for token, logprob in zip(tokens, logprobs, strict=True))
    choice = Choice(0, "", tuple(tokens), listed, finish_reason, "")
    report = RecipeReport("exact", "exact", "", "", 0, 0, 0, 0)
    kept = DurabilityReport("none", False, 0, 0, 0, 0, 0.0)
    return Completion("r", (choice,), Usage(4, len(tokens), 0), report, Timing(0, 0, 0, 0), kept)


def test_the_same_tokens_are_equal(model, reference):
    done = completion(reference.tokens, reference.logprobs)
    result = parity.compare(model, "p", PROMPT, reference, done)
    assert result.equal
    assert (result.num_near_ties, result.num_tokens) == (0, parity.NUM_NEW_TOKENS)


def test_another_token_is_found_where_it_stands(model, reference):
    tokens = list(reference.tokens)
    tokens[3] = (tokens[3] + 1) % 64
    logprobs, _ = parity.forced_gaps(model, PROMPT, tokens)
    result = parity.compare(model, "p", PROMPT, reference, completion(tokens, logprobs))
    assert result.first_difference == 3
    assert not result.equal


def test_a_near_tie_counts_as_equal_and_is_counted(model, reference):
    with torch.no_grad():
        twin = (reference.tokens[0] + 1) % 64
        kept = model.lm_head.weight.clone()
        model.lm_head.weight[twin] = model.lm_head.weight[reference.tokens[0]] * (1 - 1e-6)
    own = parity.generate_reference(model, PROMPT)
    other = [twin if own.tokens[0] != twin else reference.tokens[0]]
    # whatever follows the twin is the reference's own choice
    tokens = other + parity.generate_reference(model, PROMPT + other, parity.NUM_NEW_TOKENS - 1).tokens
    logprobs, _ = parity.forced_gaps(model, PROMPT, tokens)
    result = parity.compare(model, "p", PROMPT, own, completion(tokens, logprobs))
    with torch.no_grad():
        model.lm_head.weight.copy_(kept)
    assert result.equal
    assert result.num_near_ties >= 1


def test_an_answer_cut_short_is_different(model, reference):
    done = completion(reference.tokens[:5], reference.logprobs[:5])
    assert parity.compare(model, "p", PROMPT, reference, done).first_difference == 5


def test_an_answer_that_ends_too_early_is_different(model, reference):
    done = completion(reference.tokens[:5], reference.logprobs[:5], "stop")
    assert parity.END_TOKEN not in reference.tokens
    assert parity.compare(model, "p", PROMPT, reference, done).first_difference == 5


def test_the_token_that_ends_an_answer_need_not_be_sent(model, reference):
    ended = replace(reference, tokens=[*reference.tokens[:4], parity.END_TOKEN])
    done = completion(reference.tokens[:4], reference.logprobs[:4], "stop")
    assert parity.compare(model, "p", PROMPT, ended, done).equal


def test_wrong_log_probabilities_are_no_equality(model, reference):
    done = completion(reference.tokens, [value - 0.01 for value in reference.logprobs])
    result = parity.compare(model, "p", PROMPT, reference, done)
    assert result.first_difference is None
    assert not result.equal


@pytest.mark.parametrize("num_sent", [0, 23])
def test_an_answer_without_its_log_probabilities_is_no_equality(model, reference, num_sent: int):
    done = completion(reference.tokens, reference.logprobs)
    choice = replace(done.choices[0], logprobs=done.choices[0].logprobs[:num_sent])
    result = parity.compare(model, "p", PROMPT, reference, replace(done, choices=(choice,)))
    assert result.first_difference is None
    assert not result.equal


def test_log_probabilities_that_are_no_numbers_are_no_equality(model, reference):
    for index in (0, 5):
        logprobs = [float("nan") if i == index else value for i, value in enumerate(reference.logprobs)]
        assert not parity.compare(model, "p", PROMPT, reference, completion(reference.tokens, logprobs)).equal


def test_an_answer_without_tokens_is_different(model, reference):
    assert parity.compare(model, "p", PROMPT, reference, completion([], [])).first_difference == 0
