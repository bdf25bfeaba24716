"""Fixtures for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if not os.path.exists("/dev/nvidiactl"):
    # without a GPU Triton's kernels are run by its interpreter; it reads this when it is first imported, by whomever
    os.environ["TRITON_INTERPRET"] = "1"

if TYPE_CHECKING:
    from kvsluice.evals.service_process import ServiceProcess


@pytest.fixture(scope="session")
def service() -> Iterator[ServiceProcess]:
    """One running service for the whole session: one prefill and one decode worker in processes of their own,
    serving the default model. Tests that kill or drain something start their own with `running_service`."""
    # imported here: tests of kernels and engines also run on GPU machines without gRPC's health package
    from kvsluice.evals.service_process import running_service

    with running_service("--prefill-workers", "1", "--decode-workers", "1") as service:
        yield service
