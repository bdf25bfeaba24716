"""A part that takes another's place keeps trying, and one that cannot start at first says why and stays."""

from __future__ import annotations

import asyncio
import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from kvsluice.errors import BrokenCheckpoint, ConfigError
from kvsluice.services import actors, lifecycle
from kvsluice.services.config import load_config
from kvsluice.services.fleet.report import Report
from kvsluice.services.security import with_fleet_tokens


class Broken(actors.Host):
    error: Exception

    def _start(self) -> str:
        raise self.error


@pytest.fixture
def start(monkeypatch):
    """start(error, earlier, away): the status of a host that fails by `error`, and whether its process would have
    ended; its controller is not there the first `away` times."""

    def run(error: Exception, earlier: Report | None = None, away: int = 0) -> tuple[dict[str, str], bool]:
        ended, told = threading.Event(), threading.Event()
        missing = iter([True] * away)

        def find(*name: str) -> Any:
            if next(missing, False):
                raise ValueError("there is no such actor")
            return controller

        async def take(report: Report) -> bool:
            assert report.error and report.error_type
            told.set()
            return True

        controller = SimpleNamespace(
            predecessor=SimpleNamespace(remote=lambda worker_id: earlier), report=SimpleNamespace(remote=take)
        )
        fake = SimpleNamespace(
            get_actor=find,
            get=lambda value: value,
            util=SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1"),
        )
        monkeypatch.setattr(actors, "ray", fake)
        monkeypatch.setattr(actors, "configure_logging", lambda *settings: None)
        monkeypatch.setattr(actors, "forget_source_tree", lambda: None)
        monkeypatch.setattr(lifecycle, "RETRY_PAUSE_S", 0.0)
        monkeypatch.setattr(actors, "CONTROLLER_PAUSE_S", 0.0)
        monkeypatch.setattr(os, "_exit", lambda status: ended.set() if status == 1 else None)
        config = with_fleet_tokens(load_config({"model": "tiny"}))
        spec = actors.HostSpec("decode-0", "kvsluice")
        host = type("One", (Broken,), {"error": error})(config.to_json(), spec)
        assert told.wait(20.0)
        reporting = [task for task in asyncio.all_tasks(host._loop._loop) if "_keep_reporting" in repr(task)]
        host._loop._loop.call_soon_threadsafe(reporting[0].cancel)
        host._loop.stop()
        return host.status(), ended.wait(5.0 if earlier else 0.1)

    return run


@pytest.mark.parametrize("away", [0, 3])
@pytest.mark.parametrize("error", [BrokenCheckpoint("no weights"), OSError("secret")])
def test_a_restarted_part_that_cannot_start_makes_room_for_the_next(start, error, away):
    """Also where the controller was lost with it: an actor that raises while it is made would be gone for good."""
    earlier = Report("decode-0", "first", ("decode",), "127.0.0.1:1", "127.0.0.1", 1, "tiny", 1, "0")
    status, ended = start(error, earlier, away)
    assert ended
    assert status["error_type"] in ("BrokenCheckpoint", "InternalError")
    assert "secret" not in status["message"]


def test_a_part_that_never_served_stays_to_say_why(start):
    status, ended = start(BrokenCheckpoint("no weights"))
    assert not ended
    assert (status["error_type"], status["message"]) == ("BrokenCheckpoint", "no weights")


class Port:
    """Is taken the first `busy` times."""

    def __init__(self, busy: int) -> None:
        self.busy = busy
        self.tries = 0

    async def bind(self) -> int:
        self.tries += 1
        if self.tries <= self.busy:
            raise ConfigError("port: is in use")
        return 80


async def test_a_port_that_is_still_held_is_tried_again():
    port = Port(3)
    assert await lifecycle.persist(port.bind, ConfigError, 10.0, pause_s=0.001) == 80
    assert port.tries == 4


async def test_trying_again_has_an_end():
    once, often = Port(1), Port(10**9)
    with pytest.raises(ConfigError):
        await lifecycle.persist(once.bind, ConfigError, 0.0)
    assert once.tries == 1
    with pytest.raises(ConfigError):
        await asyncio.wait_for(lifecycle.persist(often.bind, ConfigError, 0.02, pause_s=0.005), 10.0)
    assert often.tries > 1
