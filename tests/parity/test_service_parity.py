"""The running service against transformers: the same tokens, one request at a time and eight at once.

`make acceptance` does the same with a prompt of 8K tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvsluice import Client
from kvsluice.evals import parity
from kvsluice.evals.demo_prompt import demo_questions
from kvsluice.evals.reference_model import load_long_context
from kvsluice.models.checkpoint import DEFAULT_MODEL
from kvsluice.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def client(service) -> Iterator[Client]:
    with Client(service.address) as client:
        yield client


@pytest.fixture(scope="module")
def model() -> Any:
    return load_long_context()


@pytest.fixture(scope="module")
def prompts() -> dict[str, list[int]]:
    return parity.parity_prompts(load_tokenizer(DEFAULT_MODEL))


@pytest.fixture(scope="module")
def references(model, prompts) -> dict[str, parity.Reference]:
    return {name: parity.generate_reference(model, ids) for name, ids in prompts.items()}


@pytest.mark.parametrize("how", [parity.compare_singly, parity.compare_together])
def test_greedy_tokens_are_those_of_transformers(how, client, model, prompts, references, record_property):
    comparisons = how(model, client, prompts, references)
    assert len(comparisons) >= 8
    near_ties = sum(comparison.num_near_ties for comparison in comparisons)
    record_property("near_ties", near_ties)
    print(f"near ties: {near_ties}")
    assert [comparison for comparison in comparisons if not comparison.equal] == []


@pytest.mark.parametrize(("recipe", "limit"), [("sluice", 1 / 4), ("fastkv", 1 / 8)])
def test_what_is_shipped_stays_under_its_share_of_bf16(client, recipe, limit):
    question = demo_questions(load_tokenizer(DEFAULT_MODEL).encode)[0]
    report = client.generate(question.prompt_ids, recipe=recipe, temperature=0.0, max_tokens=4).recipe
    assert (report.effective, report.fallback_reason) == (recipe, "")
    # 30 layers, 3 heads of 64, keys and values, 2 bytes
    assert report.handoff_bf16_bytes == len(question.prompt_ids) * 30 * 3 * 64 * 2 * 2
    assert 0 < report.handoff_bytes <= limit * report.handoff_bf16_bytes
