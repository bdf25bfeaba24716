"""The store of a decode worker: requests that are kept in it, and such as are gone on with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from ...errors import FrameMismatch, KvsluiceError, SequenceLost
from ...kvstore.cached import CachedStore
from ...kvstore.identity import FrameIdent
from ...kvstore.sequences import SequenceWriter
from ...kvstore.store import Store
from ..staging import HostCopies
from ..telemetry import Recorder
from .keeper import Keeper
from .receiver import Target
from .restore import Restoring, restore
from .snapshot import TierSnapshot

STOP_WAIT_S = 5.0
MAX_TASKS = 256  # beyond which what is of no use any more is left to expire


class KeptRequests:
    """Makes and ends keepers, and restores. Belongs to an event loop.

    Args:
        store: its owner is this object.
        ttl_s: how long what is kept lives unless it is renewed.
        copies: how rows come from the device to the host.
    """

    def __init__(self, store: Store, ttl_s: float, copies: HostCopies, recorder: Recorder) -> None:
        self.ttl_s = ttl_s
        self._store, self._copies, self._recorder = store, copies, recorder
        self._tasks: set[asyncio.Task[Any]] = set()

    def keeper(
        self, ident: FrameIdent, lengthen: Callable[[int, float], None], fenced: Callable[[KvsluiceError], None]
    ) -> Keeper:
        """Keeps a request; see `Keeper`."""
        writer = SequenceWriter(self._store, ident, self.ttl_s)
        return Keeper(writer, ident, self.ttl_s, self._copies, lengthen, fenced, self._recorder)

    async def restore(self, wanted: Restoring, target: Target, keeper: Keeper | None) -> None:
        """Go on with a request that was kept, and go on keeping it.

        Raises:
            SequenceLost, StoreUnavailable, Fenced: see `restore`.
        """
        restored = await restore(self._store, wanted, target)
        if keeper is not None:
            await keeper.take_over(restored)
        try:
            await target.commit(restored.found.manifest.prompt_ids, restored.emitted)
        except FrameMismatch as exc:
            raise SequenceLost(f"what was stored of the sequence cannot be used: {exc.message}") from exc
        if keeper is not None:
            keeper.started()
        rows = sum(kept.num_rows for choice in restored.emitted for kept in choice.kept)
        self._recorder.record(
            "decode.restored", request_id=wanted.ident.request_id, epoch=wanted.ident.epoch, rows=rows
        )

    def end(self, keeper: Keeper, delete: bool) -> None:
        """Write no more of a request, and delete what was written if nobody needs it. Where the store is so slow that
        many requests wait to be deleted already, it expires."""
        self.start(keeper.close(delete and len(self._tasks) < MAX_TASKS))

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something beside; it is waited for at the end."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def with_cache(self, tiers: TierSnapshot) -> TierSnapshot:
        """The snapshot with what the store holds in this process's memory, if it does."""
        store = self._store
        if not isinstance(store, CachedStore):
            return tiers
        return replace(
            tiers,
            store_cache_used_bytes=store.used_bytes,
            store_cache_hits=store.hits,
            store_cache_misses=store.misses,
        )

    async def stop(self) -> None:
        """Wait a while for what is under way, and let go of the store."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=STOP_WAIT_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._store.close()
