"""Services of their own for tests that kill their parts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvsluice.evals.service_process import running_service
from kvsluice.tests.faults.points import POINTS
from kvsluice.tests.faults.rig.fleet import Fleet, Victim, running_fleet


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    with running_service("--model", "smollm2-135m", "--grace-s", "20", "--log-level", "info") as service:
        yield Victim(service)


@pytest.fixture(scope="session")
def shared_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("fleet"), POINTS) as fleet:
        yield fleet


@pytest.fixture
def fleet(shared_fleet: Fleet) -> Fleet:
    """One service for all tests that break its workers and its store, each of which finds it whole."""
    shared_fleet.await_whole()
    return shared_fleet
