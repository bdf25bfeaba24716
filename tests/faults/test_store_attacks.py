"""The store is broken while kept streams run and a worker dies: no other token, no hang, all well afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvsluice.client import Client
from kvsluice.tests.faults.attacks import answers, attack
from kvsluice.tests.faults.rig.redis_server import RedisServer, running


@pytest.fixture(scope="module")
def client(shared_fleet):
    with Client(shared_fleet.address, timeout_s=120.0) as client:
        yield client


@pytest.fixture(scope="module")
def wanted(shared_fleet, client):
    shared_fleet.await_whole()
    return answers(client)


@pytest.mark.parametrize("kind", ["restart store", "freeze store", "flush store", "fill store", "corrupt"])
def test_streams_go_on_whatever_befalls_the_store(fleet, client, wanted, kind):
    assert attack(fleet, client, kind, 1.5, wanted) == []


def test_a_service_with_a_wrong_password_does_not_start(tmp_path):
    (tmp_path / "password").write_text("wrong")
    with running(RedisServer(tmp_path / "redis", password="right")) as server:
        command = [
            sys.executable,
            "-P",
            "-m",
            "kvsluice.services.cli",
            "serve",
            "--port",
            "0",
            "--http-port",
            "0",
            "--random-weights",
        ]
        command += ["--store-url", f"redis://127.0.0.1:{server.port}", "--store-password-file", tmp_path / "password"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("kvsluice: store_password_file: the server refuses user or password")
