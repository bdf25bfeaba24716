"""Fixtures for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if not os.path.exists("/dev/nvidiactl"):
    # without a GPU Triton's kernels are run by its interpreter; it reads this when it is first imported, by whomever
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    # processes side by side are what uses the cores; torch reads this when it is first imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# what is started once for many files: tests that use it run in one process, or each process would start its own
SHARED = ("service", "shared_fleet")

if TYPE_CHECKING:
    from kvsluice.evals.service_process import ServiceProcess


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes run the tests, those of a file stay together, as do those of a shared fixture."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        group = next((name for name in SHARED if name in fixtures), str(item.path))
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def service() -> Iterator[ServiceProcess]:
    """One running service for the whole session: one prefill and one decode worker in processes of their own,
    serving the default model. Tests that kill or drain something start their own with `running_service`."""
    # imported here: tests of kernels and engines also run on GPU machines without gRPC's health package
    from kvsluice.evals.service_process import running_service

    with running_service("--prefill-workers", "1", "--decode-workers", "1") as service:
        yield service
