"""Caches of ended turns of sessions that stay on their worker, for a next turn. Belongs to the engine's thread.

    a turn ends ──> kept, while nobody needs the room ──> the next turn goes on with the very cache
                        └──> dropped, the one used longest ago first: the store has the session

What is kept is a copy of what the store holds, and is used only where it is that very state: of the same tenant, model,
recipe and prompt, written by the epoch that owned the sequence until now, with the rows that the store knows, and of
tokens that the turn goes on behind. Anything else is dropped, and the turn restored from the store. Whoever is let in,
or comes back to the device, has its room before any of this does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from ...compression.interfaces import ReadCounter, SequenceCache
from .pages import PagePool, Region
from .sequence import ChoiceRun, EmittedChoice, RequestRun


@dataclass(frozen=True)
class KeptSession:
    """What an ended turn has left.

    Attributes:
        request_id: of the turn, and of the next ones.
        epoch: of the attempt that ran it.
        prompt_ids: what was prefilled.
        token_ids: behind the prompt, of the rows that the cache holds.
        stored_end: position up to which rows were told, to be stored.
        most_bytes: of the device, that the turn had reserved.
    """

    cache: SequenceCache
    request_id: str
    epoch: int
    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    stored_end: int
    most_bytes: int

    @classmethod
    def of(cls, run: RequestRun, state: ChoiceRun) -> KeptSession | None:
        """What a choice that has ended leaves; None where a fault may have touched it."""
        num_rows = state.num_rows
        if state.guarded.error is not None or num_rows > len(state.token_ids):
            return None
        request = run.request
        return cls(
            state.cache,
            request.request_id,
            request.epoch,
            run.prompt_ids,
            state.token_ids[:num_rows],
            state.stored_end,
            run.demand.total_bytes,
        )

    @property
    def num_rows(self) -> int:
        """Behind the prompt, that the cache holds."""
        return self.cache.end - len(self.prompt_ids)

    def goes_on(self, wanted: SessionTurn, most_bytes: int) -> bool:
        """Whether a turn goes on from this very state. Rows behind what it goes on with are forgotten then, where they
        can be; the last of its tokens is sampled from, and has no row yet.

        Args:
            most_bytes: of the device, that the turn has reserved.
        """
        if (self.epoch, self.stored_end) != (wanted.last_epoch, wanted.stored_end):
            return False
        if self.most_bytes > most_bytes:
            return False  # there may be room in it for an answer that is longer than the turn has reserved
        if tuple(self.prompt_ids) != tuple(wanted.prompt_ids):
            return False
        known = wanted.emitted.token_ids[:-1]
        common = next(
            (i for i, (one, other) in enumerate(zip(self.token_ids, known, strict=False)) if one != other),
            min(len(self.token_ids), len(known)),
        )
        end = len(self.prompt_ids) + common
        if end < self.stored_end or not self.cache.truncate(end):
            return False
        self.cache.counter = ReadCounter()
        return True


@dataclass(frozen=True)
class SessionTurn:
    """What a turn goes on with, as the store knows it.

    Attributes:
        last_epoch: who owned the sequence until now.
        prompt_ids: what was prefilled.
        stored_end: position up to which rows are stored.
        emitted: what goes before the turn's answer, and its answer as far as it was told.
    """

    last_epoch: int
    prompt_ids: Sequence[int]
    stored_end: int
    emitted: EmittedChoice


class KeptSessions:
    """What is kept, by the name of its sequence, which holds tenant, model and recipe; those used longest ago first.

    Args:
        capacity_bytes: of both memories together; 0 = nothing is kept.
        pool, host: the ledgers of the device and of host memory.

    Attributes:
        hits, misses: turns that went on with what was kept, and later turns that did not.
    """

    def __init__(self, capacity_bytes: int, pool: PagePool, host: PagePool | None) -> None:
        self.capacity_bytes = capacity_bytes
        self.hits = self.misses = 0
        self._pool, self._host = pool, host
        self._kept: OrderedDict[str, KeptSession] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def device_bytes(self) -> int:
        """Reserved on the device for what is kept; any thread may ask."""
        return _kept_bytes(self._pool)

    @property
    def host_bytes(self) -> int:
        """The same in host memory."""
        return 0 if self._host is None else _kept_bytes(self._host)

    def keep(self, key: str, kept: KeptSession | None) -> None:
        """Keep what a turn has left, whose own reservations are freed by now, if there is room for it."""
        self.drop(key)
        if kept is None:
            return
        on_device, on_host = kept.cache.nbytes(), kept.cache.host_nbytes()
        while self._kept and self.device_bytes + self.host_bytes + on_device + on_host > self.capacity_bytes:
            self.drop(next(iter(self._kept)))
        if on_device + on_host > self.capacity_bytes:
            return
        region = Region(key, kept=True)
        if not self._pool.reserve({region: on_device}):
            return
        if self._host is not None and on_host and not self._host.reserve({region: on_host}):
            self._pool.release(region)
            return
        self._kept[key] = kept

    def take(self, key: str, wanted: SessionTurn, most_bytes: int) -> KeptSession | None:
        """Hand what is kept of a session to its next turn, whose own reservations cover it from now on; None where that
        turn is to be restored. Nothing of the session is kept afterwards.

        Args:
            most_bytes: of the device, that the turn has reserved.
        """
        kept = self._kept.get(key)
        self.drop(key)
        if kept is None or not kept.goes_on(wanted, most_bytes):
            self.misses += 1
            return None
        self.hits += 1
        return kept

    def drop(self, key: str) -> None:
        """Forget a session, if it is kept."""
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._pool.release(Region(key, kept=True))
            if self._host is not None and kept.cache.host_nbytes():
                self._host.release(Region(key, kept=True))

    def make_room(self, request_id: str, device_bytes: int, host_bytes: int = 0) -> None:
        """Drop what keeps a request from having so many bytes; its own session's cache goes last."""
        while True:
            lacks_device = device_bytes > self._pool.free_bytes
            lacks_host = self._host is not None and host_bytes > self._host.free_bytes
            keys = sorted(self._kept, key=lambda key: self._kept[key].request_id == request_id)
            of_use = (key for key in keys if lacks_device or (lacks_host and self._kept[key].cache.host_nbytes()))
            victim = next(of_use, None)
            if victim is None:
                return
            self.drop(victim)

    def check_integrity(self) -> None:
        """Assert that what is kept is what is reserved for it."""
        assert self.device_bytes + self.host_bytes <= self.capacity_bytes, "no more is kept than may be"
        for pool, held in (
            (self._pool, {name: kept.cache.nbytes() for name, kept in self._kept.items()}),
            (self._host, {name: kept.cache.host_nbytes() for name, kept in self._kept.items()}),
        ):
            if pool is not None:
                reserved = {region.request_id: size for region, size in pool.regions(kept=True).items()}
                assert reserved == {name: size for name, size in held.items() if size}, "what is kept is reserved"


def _kept_bytes(pool: PagePool) -> int:
    return sum(pool.regions(kept=True).values())
