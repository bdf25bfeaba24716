"""The chart's Redis: started as its pod does, it takes the store's user with its password, and nobody else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import redis

from kvsluice.errors import ConfigError
from kvsluice.kvstore.config import StoreConfig
from kvsluice.kvstore.opening import open_store
from kvsluice.tests.faults.rig.redis_server import free_port

from .conftest import ROOT, render

pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="there is no redis-server")


@pytest.fixture
def port(tmp_path: Path):
    """A server made of the rendered files, at paths of this machine."""
    files = render({"redis": {"maxMemory": "64mb"}}).one("ConfigMap", "-redis")["data"]
    port, places = free_port(), {"/etc/redis-config": "config", "/etc/redis-password": "password",
                                 "/run/redis": "run", "/data": "data"}  # fmt: skip
    for place in places.values():
        (tmp_path / place).mkdir()
    (tmp_path / "password" / "password").write_text("a password that nobody guesses\n")
    for name, text in files.items():
        for path, place in places.items():
            text = re.sub(rf"(?<![\w/]){path}\b", str(tmp_path / place), text)
        text = text.replace("port 6379", f"port {port}").replace("bind * -::*", "bind 127.0.0.1")
        (tmp_path / "config" / name).write_text(text)
    command = ["sh", str(tmp_path / "config" / "start.sh")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env={"PATH": os.environ["PATH"]}) as server:
        try:
            _wait(port, server)
            yield port
        finally:
            server.terminate()


def _wait(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        assert server.poll() is None, "the server has ended"
        try:
            with redis.Redis(port=port) as client:
                client.ping()
        except redis.AuthenticationError:
            return  # it answers, and asks who is there
        except redis.ConnectionError:
            time.sleep(0.05)
    raise AssertionError("the server does not answer")


async def test_the_store_opens_with_the_password_and_with_no_other(port, tmp_path):
    url = f"redis://kvsluice@127.0.0.1:{port}"
    store = await open_store(StoreConfig(url=url, password_file=str(tmp_path / "password" / "password")))
    await store.close()
    (tmp_path / "wrong").write_text("another password that is wrong")
    with pytest.raises(ConfigError, match="password"):
        await open_store(StoreConfig(url=url, password_file=str(tmp_path / "wrong")))


def test_the_user_has_the_commands_of_the_documentation():
    """docs/store.md lists them; those of a cluster of Redis are of no use to a single server."""
    documented = re.search(r"ACL SETUSER kvsluice on >PASSWORD (.*)", (ROOT / "docs" / "store.md").read_text())
    assert documented is not None
    script = render().one("ConfigMap", "-redis")["data"]["start.sh"]
    given = re.search(r"user kvsluice on #\$hash (.*)", script)
    assert given is not None
    assert set(documented[1].split()) - set(given[1].split()) == {"+cluster|slots", "+asking"}
    assert set(given[1].split()) <= set(documented[1].split())
