"""Every store that the contract holds to account."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest

from kvsluice.kvstore.memory import MemoryStore
from kvsluice.kvstore.store import Store


@dataclass
class StoreRig:
    """A store with about 64 KiB of room, and a way to let its time pass."""

    store: Store
    advance: Callable[[float], None]


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def memory_rig() -> StoreRig:
    clock = Clock()
    return StoreRig(MemoryStore(capacity_bytes=64 * 1024, clock=clock), clock.advance)


RIGS = {"memory": memory_rig}


@pytest.fixture(params=sorted(RIGS))
async def rig(request) -> AsyncIterator[StoreRig]:
    rig = RIGS[request.param]()
    yield rig
    rig.store.check_integrity()
    await rig.store.close()
    rig.store.check_integrity()


@pytest.fixture
def store(rig: StoreRig) -> Store:
    return rig.store
