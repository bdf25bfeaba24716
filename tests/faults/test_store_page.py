"""docs/store.md: what it says to type is taken, and what it says of servers is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from kvsluice.evals.pages import block
from kvsluice.kvstore.config import StoreConfig, Topology
from kvsluice.kvstore.identity import FrameIdent, frame_key, head_key, manifest_key
from kvsluice.kvstore.opening import open_store
from kvsluice.kvstore.redis import RedisStore
from kvsluice.kvstore.store import Head, HeadWrite, Store
from kvsluice.services.config import ServeConfig, load_config
from kvsluice.services.framing import TARGET_PAYLOAD_BYTES
from kvsluice.tests.faults.rig.redis_server import HOST, STORE_ACL, RedisServer, running

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "store.md").read_text()
IDENT = FrameIdent(request_id="r", epoch=1, tenant="t", model_fingerprint="m", recipe_fingerprint="c")
KEY, OTHER = frame_key(IDENT, 0), frame_key(IDENT, 1)
PASSWORD = "page-canary"


def fenced(language: str) -> list[str]:
    """Blocks of code in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


async def use(store: Store) -> None:
    """All that a decode worker does with a store."""
    await store.put(KEY, b"v", 60)
    await store.put(KEY, b"v", 60)
    assert await store.get(KEY) == b"v" and await store.exists(KEY) and await store.renew(KEY, 90)
    head = Head(1, manifest_key(IDENT))
    assert await store.compare_and_set_head(head_key(IDENT), None, head, 60) is HeadWrite.WRITTEN
    assert await store.read_head(head_key(IDENT)) == head
    assert await store.scan("kvsluice:frame:") == [KEY]
    assert await store.delete(KEY)


async def test_the_user_of_the_page_may_do_all_that_is_needed(tmp_path):
    (line,) = [line for line in block(PAGE, "acl", "docs/store.md").splitlines() if line.startswith("ACL SETUSER ")]
    assert line == f"ACL SETUSER kvsluice on >PASSWORD {STORE_ACL}"
    assert not re.search(r"eval|script|config|keys|flush|@(?!all)", STORE_ACL.replace("resetkeys", ""))
    secret = tmp_path / "secret"
    secret.write_text(PASSWORD)
    with running(RedisServer(tmp_path / "redis")) as server:
        server.run(*line.replace("PASSWORD", PASSWORD).split())
        store = await open_store(StoreConfig(url=f"redis://kvsluice@{HOST}:{server.port}", password_file=str(secret)))
        try:
            await use(store)
        finally:
            await store.close()


def settings_of(command: str) -> ServeConfig:
    """The configuration that a line of the page asks for."""
    words = shlex.split(command, comments=True)
    assert words[:2] == ["kvsluice", "serve"]
    flags: dict[str, Any] = {}
    for flag, value in zip(words[2::2], words[3::2], strict=True):
        flags[flag.removeprefix("--").replace("-", "_")] = value
    return load_config(flags)


def test_every_command_line_of_the_page_is_taken():
    lines = [line for text in fenced("sh") for line in text.replace("\\\n", "").splitlines()]
    found = [settings_of(line).store for line in lines]
    assert len(found) == 5 and None not in found
    kinds = [one.address.topology for one in found]
    assert kinds == [Topology.SINGLE, Topology.SINGLE, Topology.CLUSTER, Topology.SENTINEL, Topology.SINGLE]
    assert [one.address.db for one in found][:2] == [0, 3]
    assert found[3].address.service == "main"
    assert (found[4].address.tls, found[4].address.username) == (True, "kvsluice")


def test_every_setting_and_key_that_the_page_names_is_there():
    named = {name.replace("-", "_") for name in re.findall(r"--(store-[a-z-]+)", PAGE)}
    fields = {name for name in ServeConfig.model_fields if name.startswith("store_")}
    assert named == fields
    kinds = re.findall(r"^kvsluice:([a-z]+):", PAGE, re.MULTILINE)
    assert kinds == ["head", "manifest", "continuation", "frame", "session", "record", "image", "probe"]


async def test_a_server_with_the_settings_of_the_page_is_taken(tmp_path):
    (text,) = fenced("conf")
    settings = dict(line.split(maxsplit=1) for line in text.splitlines())
    with running(RedisServer(tmp_path, settings=settings)) as server:
        assert server.info("maxmemory_policy") == settings["maxmemory-policy"]
        store = await open_store(StoreConfig(url=f"redis://{HOST}:{server.port}"))
        try:
            await use(store)
        finally:
            await store.close()


@pytest.mark.parametrize(
    ("settings", "survives"),
    [
        ({}, (False, False)),
        ({"save": "60 1000"}, (True, False)),
        ({"appendonly": "yes", "appendfsync": "everysec", "no-appendfsync-on-rewrite": "yes"}, (True, True)),
    ],
    ids=["none", "rdb", "aof"],
)
async def test_what_a_killed_server_loses(tmp_path, settings, survives):
    with running(RedisServer(tmp_path, settings=settings)) as server:
        config = StoreConfig(url=f"redis://{HOST}:{server.port}")
        store = await open_store(config)
        await store.put(KEY, b"before a snapshot", 600)
        if "save" in settings:
            server.run("SAVE")
        await store.put(OTHER, b"after it", 600)
        await store.close()
        server.restart(empty=False)
        again = await open_store(config)
        assert (await again.exists(KEY), await again.exists(OTHER)) == survives
        await again.close()


async def test_a_frame_of_a_prompt_takes_little_more_than_its_bytes(tmp_path):
    """A header beyond 1 MiB would cost a quarter of a MiB."""
    with running(RedisServer(tmp_path)) as server:
        if not server.info("mem_allocator").startswith("jemalloc"):
            pytest.skip("another allocator gives other sizes")
        store = await open_store(StoreConfig(url=f"redis://{HOST}:{server.port}"))
        assert isinstance(store, RedisStore)
        await store.put(KEY, bytes(TARGET_PAYLOAD_BYTES + 2000), 60)
        await store.close()
        assert server.run("MEMORY", "USAGE", KEY) <= 1.02 * (TARGET_PAYLOAD_BYTES + 2000)
