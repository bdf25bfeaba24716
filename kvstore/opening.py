"""Opens the store that a configuration names. The client library of a store is imported when one is opened."""

from __future__ import annotations

from .config import StoreConfig, Topology
from .memory import MemoryStore
from .store import Store


async def open_store(config: StoreConfig) -> Store:
    """A store that is ready: it has been reached, has taken a value, given it back and deleted it.

    Raises:
        ConfigError: the configuration, or a server's settings, do not do; names the field.
        StoreUnavailable: the store cannot be reached or takes no writes now.
    """
    address = config.address
    if address.topology is Topology.MEMORY:
        return MemoryStore(address.capacity_bytes)
    from .redis import open_redis_store

    return await open_redis_store(config)
