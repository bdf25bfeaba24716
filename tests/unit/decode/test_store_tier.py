"""A store that has failed is left alone for a while, after which whoever waits for it is seen to."""

from __future__ import annotations

import asyncio

import pytest
import torch

from kvsluice.errors import StoreUnavailable
from kvsluice.kvstore.identity import FrameIdent
from kvsluice.kvstore.memory import MemoryStore
from kvsluice.services.decode.host_pages import Extent
from kvsluice.services.decode.offload import ImageId
from kvsluice.services.decode.overflow import OverflowPolicy
from kvsluice.services.decode.store_tier import StoreImages
from kvsluice.services.telemetry import NullRecorder

IMAGE = ImageId("a", 1, 1)
IDENT = FrameIdent(request_id="a", epoch=1, tenant="", model_fingerprint="m", recipe_fingerprint="r")
PAUSES = OverflowPolicy(1 << 20, retry_s=0.0, loss_pause_s=0.0)


class Thread:
    """Stands for the engine's: runs at once what is posted."""

    def __init__(self, told: list[str]) -> None:
        self.told, self.woken = told, asyncio.Event()

    def post(self, command) -> None:
        command()

    async def call(self, command):
        return command()

    def wake(self) -> None:
        self.told.append("woken")
        self.woken.set()


class Broken(MemoryStore):
    async def put(self, key, value, ttl_s):
        raise StoreUnavailable("no room")


@pytest.mark.parametrize("fault", ["write", "read"])
async def test_the_engine_looks_again_once_a_store_that_failed_is_used_again(fault: str) -> None:
    told: list[str] = []
    thread, store = Thread(told), Broken(1 << 20) if fault == "write" else MemoryStore(1 << 20)
    soon = asyncio.get_running_loop().call_soon
    images = StoreImages(store, 60.0, lambda image: IDENT, thread, soon, NullRecorder(), PAUSES)
    ended = asyncio.Event()

    def done(error) -> None:
        told.append("moved" if error is None else "failed")
        ended.set()

    images.write(IMAGE, Extent([torch.arange(100, dtype=torch.uint8)]), done)
    await ended.wait()
    if fault == "read":
        assert told == ["moved"], "nobody is woken for that"
        for key in list(store._values):
            await store.delete(key)
        images.read(IMAGE, lambda begin, data: None, done)
    await thread.woken.wait()
    assert told[-2:] == ["failed", "woken"]
    await images.close()
