"""What a gateway remembers of the prompts that a prefill worker has run."""

from __future__ import annotations

from kvsluice.services.gateway.affinity import CHUNK_TOKENS, InputPrefixes, PromptPrefixes, RunPrefixes

CHUNK = 4


def prompt(*ids: int, tenant: str = "t", recipe: str = "exact") -> PromptPrefixes:
    return PromptPrefixes.of_ids(tenant, recipe, ids)


def test_the_longest_beginning_counts_in_whole_chunks() -> None:
    run = RunPrefixes()
    run.remember(prompt(*range(10)), CHUNK)
    for ids, found in (
        (range(10), 8),
        (range(30), 8),
        ([*range(7), 99, 8, 9], 4),
        ([99, *range(1, 10)], 0),
        (range(8), 8),
        (range(3), 0),
        ([*range(4), *range(8, 12)], 4),
    ):
        assert run.found(prompt(*ids), CHUNK) == found, list(ids)


def test_a_chunk_counts_behind_those_before_it_alone() -> None:
    run = RunPrefixes()
    run.remember(prompt(1, 1, 1, 1, 2, 2, 2, 2), CHUNK)
    assert run.found(prompt(2, 2, 2, 2), CHUNK) == 0


def test_tenants_and_recipes_are_kept_apart() -> None:
    run = RunPrefixes()
    run.remember(prompt(*range(8)), CHUNK)
    assert run.found(prompt(*range(8), tenant="other"), CHUNK) == 0
    assert run.found(prompt(*range(8), recipe="fast"), CHUNK) == 0
    # the parts of a name cannot be moved from one to the other
    run.remember(prompt(*range(8), tenant="ab", recipe="c"), CHUNK)
    assert run.found(prompt(*range(8), tenant="a", recipe="bc"), CHUNK) == 0


def test_a_worker_that_shares_nothing_is_remembered_for_nothing() -> None:
    run = RunPrefixes()
    run.remember(prompt(*range(8)), 0)
    assert run.found(prompt(*range(8)), 0) == run.found(prompt(*range(8)), CHUNK) == 0


def test_no_more_is_remembered_than_asked_for_and_short_beginnings_stay_longest() -> None:
    run = RunPrefixes(most=5)
    run.remember(prompt(*range(12)), CHUNK)
    run.remember(prompt(*range(100, 112)), CHUNK)
    assert run.found(prompt(*range(100, 112)), CHUNK) == 12
    assert run.found(prompt(*range(12)), CHUNK) == 8, "its end has been forgotten"
    run.remember(prompt(*range(200, 300)), CHUNK)
    assert run.found(prompt(*range(12)), CHUNK) == 0
    assert run.found(prompt(*range(200, 300)), CHUNK) == 20
    run.clear()
    assert run.found(prompt(*range(200, 300)), CHUNK) == 0


def test_what_a_worker_turns_out_not_to_have_is_forgotten():
    run = RunPrefixes()
    run.remember(prompt(*range(12)), CHUNK)
    run.remember(prompt(*range(12)), CHUNK, CHUNK)  # it had the first chunk alone
    assert run.found(prompt(*range(12)), CHUNK) == CHUNK
    run.remember(prompt(*range(12)), CHUNK, CHUNK)  # as was expected: it may have the rest now
    assert run.found(prompt(*range(12)), CHUNK) == 12


def test_a_text_is_known_by_its_beginning_before_it_is_tokenized():
    document, seen = "a long document, " * 300, InputPrefixes()

    def asked(question: str, tenant: str = "t") -> PromptPrefixes:
        return PromptPrefixes.of_text(tenant, "exact", document + question)

    assert asked("Why?").num_tokens == -(-len(document + "Why?") // 4)
    seen.remember(asked("Why?"), None)
    assert seen.found(asked("Why?")) == 0, "the workers share nothing"
    seen.remember(asked("Why?"), 0.0)
    assert seen.found(asked("How?")) == len(document) // 4 // CHUNK_TOKENS * CHUNK_TOKENS > 0
    assert seen.found(asked("How?", tenant="other")) == 0
    seen.remember(asked("How?"), 0.5)  # less than was thought
    assert 0 < seen.found(asked("When?")) <= asked("When?").num_tokens / 2
