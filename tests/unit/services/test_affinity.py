"""What a gateway remembers of the prompts that a prefill worker has run."""

from __future__ import annotations

import pytest

from kvsluice.services.gateway.affinity import BYTES_PER_TOKEN, MAX_HASHED, Found, PromptPrefixes, RunPrefixes
from kvsluice.services.gateway.waits import CACHED_SHARE

CHUNK = 4


def prompt(*ids: int, tenant: str = "t", recipe: str = "exact") -> PromptPrefixes:
    return PromptPrefixes(tenant, recipe, ids)


def found(run: RunPrefixes, prefixes: PromptPrefixes, chunk_tokens: int) -> int:
    return run.found(prefixes, chunk_tokens).tokens


def test_the_longest_beginning_counts_in_whole_chunks() -> None:
    run = RunPrefixes()
    run.remember(prompt(*range(10)), CHUNK)
    for ids, wanted in (
        (range(10), 8),
        (range(30), 8),
        ([*range(7), 99, 8, 9], 4),
        ([99, *range(1, 10)], 0),
        (range(8), 8),
        (range(3), 0),
        ([*range(4), *range(8, 12)], 4),
    ):
        assert found(run, prompt(*ids), CHUNK) == wanted, list(ids)


def test_a_chunk_counts_behind_those_before_it_alone() -> None:
    run = RunPrefixes()
    run.remember(prompt(1, 1, 1, 1, 2, 2, 2, 2), CHUNK)
    assert found(run, prompt(2, 2, 2, 2), CHUNK) == 0


def test_tenants_and_recipes_are_kept_apart() -> None:
    run = RunPrefixes()
    run.remember(prompt(*range(8)), CHUNK)
    assert found(run, prompt(*range(8), tenant="other"), CHUNK) == 0
    assert found(run, prompt(*range(8), recipe="fast"), CHUNK) == 0
    # the parts of a name cannot be moved from one to the other
    run.remember(prompt(*range(8), tenant="ab", recipe="c"), CHUNK)
    assert found(run, prompt(*range(8), tenant="a", recipe="bc"), CHUNK) == 0


def test_a_worker_that_shares_nothing_is_remembered_for_nothing() -> None:
    run = RunPrefixes()
    run.remember(prompt(*range(8)), 0)
    assert found(run, prompt(*range(8)), 0) == found(run, prompt(*range(8)), CHUNK) == 0


def test_no_more_is_remembered_than_asked_for_and_short_beginnings_stay_longest() -> None:
    run = RunPrefixes(most=5)
    run.remember(prompt(*range(12)), CHUNK)
    run.remember(prompt(*range(100, 112)), CHUNK)
    assert found(run, prompt(*range(100, 112)), CHUNK) == 12
    assert found(run, prompt(*range(12)), CHUNK) == 8, "its end has been forgotten"
    run.remember(prompt(*range(200, 300)), CHUNK)
    assert found(run, prompt(*range(12)), CHUNK) == 0
    assert found(run, prompt(*range(200, 300)), CHUNK) == 20
    run.clear()
    assert found(run, prompt(*range(200, 300)), CHUNK) == 0


def test_what_a_worker_turns_out_not_to_have_is_forgotten():
    run, whole = RunPrefixes(), prompt(*range(12))
    run.remember(whole, CHUNK)
    run.remember(whole, CHUNK, 1.0, CHUNK, expected_tokens=12)  # it had the first chunk alone
    assert found(run, whole, CHUNK) == CHUNK
    run.remember(whole, CHUNK, 1.0, CHUNK, expected_tokens=CHUNK)  # as was expected: it may have the rest now
    assert found(run, whole, CHUNK) == 12


def test_less_than_a_chunk_too_much_is_no_mistake():
    """The last rows of a prompt that is known run all the same, and a text's tokens are not of one length."""
    run, whole = RunPrefixes(), prompt(*range(12))
    run.remember(whole, CHUNK)
    for cached in (8, 9, 11):
        run.remember(whole, CHUNK, 1.0, cached, expected_tokens=12 if cached > 8 else 11)
        assert found(run, whole, CHUNK) == 12


def test_prompts_that_run_at_once_do_not_make_each_other_forgotten():
    """The second one was given to the worker before the first one's beginning was known."""
    run, whole = RunPrefixes(), prompt(*range(12))
    for _ in range(2):
        run.remember(whole, CHUNK, 1.0, 0, expected_tokens=0)
        assert found(run, whole, CHUNK) == 12


def test_what_is_found_saves_what_its_layers_take():
    run, whole = RunPrefixes(), prompt(*range(12))
    run.remember(whole, CHUNK, 0.25)
    assert run.found(whole, CHUNK) == Found(12, 0.25)
    assert run.found(whole, CHUNK).saved_tokens == pytest.approx(12 * 0.25 * (1 - CACHED_SHARE))
    assert Found().saved_tokens == 0.0


def test_a_text_is_known_by_its_beginning_before_it_is_tokenized():
    document, run = "a long document, " * 30, RunPrefixes()

    def asked(*parts: str, tenant: str = "t") -> PromptPrefixes:
        return PromptPrefixes.of_text(tenant, "exact", parts)

    assert asked(document).num_tokens == -(-len(document) // BYTES_PER_TOKEN) and not asked(document).is_tokenized
    run.remember(asked(document + "Why?"), CHUNK)
    known = found(run, asked(document + "How?"), CHUNK)
    assert known == len(document) // BYTES_PER_TOKEN // CHUNK * CHUNK > 0
    assert found(run, asked(document + "How?", tenant="other"), CHUNK) == 0
    assert found(run, asked("", document + "How?"), CHUNK) == 0, "a chat is made into another text"
    assert found(run, asked("user", document), CHUNK) == found(run, asked("use", "r" + document), CHUNK) == 0
    odd = "\ud800" + "é" * 40  # half a character, and characters of several bytes
    run.remember(asked(odd), CHUNK)
    assert found(run, asked(odd), CHUNK) == asked(odd).num_tokens // CHUNK * CHUNK


def test_of_a_very_long_prompt_the_beginning_counts():
    run, ids = RunPrefixes(MAX_HASHED), [1] * (MAX_HASHED + 10_000)
    long = PromptPrefixes("t", "exact", ids)
    run.remember(long, 512)
    assert run.found(long, 512).tokens == MAX_HASHED
    assert long.num_tokens == len(ids)
