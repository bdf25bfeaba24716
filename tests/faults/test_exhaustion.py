"""What a machine has runs out under a running service: descriptors, and the disk that its log lies on.

The tests share one service.
"""

from __future__ import annotations

import os
import resource
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from kvsluice.client import Client
from kvsluice.evals.service_process import is_ready, running_service
from kvsluice.tests.faults.rig.disk import SmallDisk, small_disk
from kvsluice.tests.faults.rig.fleet import Victim
from kvsluice.tests.faults.rig.processes import wait_until

OPTIONS = {"max_tokens": 8, "ignore_eos": True, "temperature": 0.0}
WORKER = "ray::CombinedWorker"
SPARE = 4  # descriptors that are left


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    with small_disk(tmp_path_factory.mktemp("disk")) as disk:
        yield disk


@pytest.fixture(scope="module")
def victim(disk: SmallDisk) -> Iterator[Victim]:
    """One whose log lies on the small disk."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(tempfile, "tempdir", str(disk.folder))
        service = running_service("--model", "smollm2-135m", "--role", "both", "--log-level", "info")
        process = stack.enter_context(service)
        patch.undo()
        yield Victim(process)


@pytest.fixture
def client(victim: Victim) -> Iterator[Client]:
    with Client(victim.address, timeout_s=90.0) as client:
        yield client


@pytest.fixture
def wanted(client: Client) -> tuple[int, ...]:
    """What the service says while nothing is short."""
    return tuple(client.generate("Once upon a time", **OPTIONS).token_ids)


def test_descriptors_that_run_out_keep_new_clients_waiting_and_nobody_else(victim, client, wanted) -> None:
    gateway = victim.find("ray::Gateway").pid
    host, _, port = victim.address.rpartition(":")
    before = resource.prlimit(gateway, resource.RLIMIT_NOFILE)
    in_use = len(os.listdir(f"/proc/{gateway}/fd"))
    with ExitStack() as stack:
        resource.prlimit(gateway, resource.RLIMIT_NOFILE, (in_use + SPARE, before[1]))
        for _ in range(8 * SPARE):
            stack.enter_context(socket.create_connection((host, int(port))))
        wait_until(lambda: len(os.listdir(f"/proc/{gateway}/fd")) >= in_use + SPARE, "none is left")
        assert not is_ready(victim.address), "nobody new is served"
        assert tuple(client.generate("Once upon a time", **OPTIONS).token_ids) == wanted
    wait_until(lambda: is_ready(victim.address), "those who have waited are served once there are some again")
    resource.prlimit(gateway, resource.RLIMIT_NOFILE, before)
    with Client(victim.address, timeout_s=90.0) as late:
        assert tuple(late.generate("Once upon a time", **OPTIONS).token_ids) == wanted
    assert victim.find("ray::Gateway").pid == gateway, "it has lived through it"


def test_a_full_disk_of_logs_stops_nobody(victim, client, wanted, disk) -> None:
    disk.fill()
    assert tuple(client.generate("Once upon a time", **OPTIONS).token_ids) == wanted
    before = victim.find(WORKER)
    victim.kill(WORKER)  # what the service says of it has no place
    assert tuple(client.generate("Once upon a time", **OPTIONS).token_ids) == wanted
    assert victim.find(WORKER) != before
    disk.clear()
    victim.kill(WORKER)
    victim.wait_said("died; a new one is started")
    assert tuple(client.generate("Once upon a time", **OPTIONS).token_ids) == wanted
