"""What follows a failed attempt, and how much may be tried again; no transport, a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsluice.errors import (
    CorruptFrame,
    DeadlineExceeded,
    Fenced,
    FrameMismatch,
    InternalError,
    InvalidRequest,
    OutOfMemory,
    Overloaded,
    SequenceLost,
    StoreUnavailable,
    WorkerLost,
)
from kvsluice.services.gateway.failover import MOST_WAIT_S, Failover, RetryBudget, Start
from kvsluice.services.gateway.membership import Member

LOST = (SequenceLost("x"), StoreUnavailable("x"), CorruptFrame("x"), Fenced("x"))
FINAL = (InternalError("x"), InvalidRequest("f", "x", "y"), FrameMismatch("x"), DeadlineExceeded("x"))
MEMBER = Member("decode-0", "decode", "h:1", "first")


def failover(keeps: bool = True, most: int = 100, burst: int = 100) -> Failover:
    return Failover(most, RetryBudget(burst, lambda: 0.0), keeps)


def test_before_the_first_token_an_attempt_begins_anew():
    plan = failover()
    for error in (WorkerLost("x"), OutOfMemory("x"), *LOST):
        plan.next(error, False, {MEMBER})
        assert plan.start is Start.FRESH
    with pytest.raises(Overloaded):
        plan.next(Overloaded("full"), False, set())


def test_a_worker_that_does_not_find_what_was_kept_is_not_to_blame():
    plan = failover()
    other = Member("decode-1", "decode", "h:2", "first")
    plan.next(WorkerLost("x"), True, {MEMBER})
    for error in (SequenceLost("x"), Fenced("x")):
        plan.next(error, True, {other})
    assert plan.blame == {MEMBER: 1}
    plan.next(StoreUnavailable("x"), True, {MEMBER, other})
    assert plan.blame == {MEMBER: 2, other: 1}, "who failed more often is not taken before who failed less"


def test_behind_the_first_token_it_goes_on_from_the_store_and_else_by_replay():
    plan = failover()
    plan.next(WorkerLost("x"), True, set())
    assert (plan.start, plan.migrations) == (Start.RESTORE, 1)
    assert plan.next(SequenceLost("x"), True, set()) == 0
    assert (plan.start, plan.migrations) == (Start.REPLAY, 1)
    plan.next(WorkerLost("x"), True, set())
    assert (plan.start, plan.migrations) == (Start.RESTORE, 2), "a replayed attempt is kept as well"
    plan.next(Overloaded("full"), True, set())
    assert (plan.start, plan.migrations) == (Start.RESTORE, 3), "it waits for room"
    plan.next(OutOfMemory("x"), True, set())
    assert (plan.start, plan.migrations) == (Start.RESTORE, 4)
    plan = failover(keeps=False)
    plan.next(WorkerLost("x"), True, set())
    assert plan.start is Start.REPLAY


@pytest.mark.parametrize("error", FINAL, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("has_begun", [False, True])
def test_what_others_would_repeat_ends_the_request(error, has_begun):
    plan = failover()
    with pytest.raises(type(error)):
        plan.next(error, has_begun, set())
    assert plan.migrations == 0


@given(
    st.lists(st.sampled_from([WorkerLost("x"), OutOfMemory("x"), Overloaded("x"), *LOST]), max_size=40),
    st.integers(0, 5),
)
def test_attempts_are_bounded_whatever_comes(errors, most):
    plan = failover(most=most)
    attempts = 1
    try:
        for error in errors:
            assert plan.next(error, True, set()) <= MOST_WAIT_S
            attempts += 1
    except (WorkerLost, OutOfMemory, Overloaded, SequenceLost, StoreUnavailable, CorruptFrame, Fenced):
        pass
    assert plan.migrations <= most
    assert attempts <= 2 * most + 1, "each migration has two ways at most"


def test_the_budget_fills_again_over_a_minute():
    now = [0.0]
    budget = RetryBudget(6, lambda: now[0])
    assert [budget.take() for _ in range(7)] == [True] * 6 + [False]
    now[0] = 9.9
    assert not budget.take()
    now[0] = 10.1
    assert budget.take()
    assert not budget.take()
    now[0] = 1000.0
    assert sum(budget.take() for _ in range(20)) == 6
