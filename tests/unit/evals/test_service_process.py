"""Starting the service as a process: failures are told, and nothing is left running."""

from __future__ import annotations

import io
import socket

import pytest
from rich.console import Console

from kvsluice.evals import demo, service_process
from kvsluice.evals.service_process import ServiceFailed, is_ready, running_service


def test_a_service_that_cannot_start_tells_why():
    with pytest.raises(ServiceFailed, match="no-such-flag"), running_service("--no-such-flag"):
        pass


def test_nothing_is_ready_where_nothing_listens():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # taken and not listened on, so that nobody else can
        assert not is_ready(f"127.0.0.1:{held.getsockname()[1]}", timeout_s=0.5)


def test_a_service_that_is_never_ready_is_stopped(monkeypatch):
    monkeypatch.setattr(service_process, "is_ready", lambda address: False)
    started = []
    original = service_process.subprocess.Popen

    def remember(*args, **kwargs):
        started.append(original(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(service_process.subprocess, "Popen", remember)
    with (
        pytest.raises(ServiceFailed, match="not ready after 0 s"),
        running_service(start_timeout_s=0.0),
    ):
        pass
    (process,) = started
    assert process.poll() is not None


def test_the_demo_ends_plainly_when_its_service_does_not_start(monkeypatch):
    def broken(*arguments):
        raise ServiceFailed("the service ended with status 1:\n[no room]")

    monkeypatch.setattr(demo, "running_service", broken)
    console = Console(file=io.StringIO(), width=100)
    assert demo.run_demo(console=console) == 1
    assert "[no room]" in console.file.getvalue()
