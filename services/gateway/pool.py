"""The workers as a gateway sees them: membership in, links kept, a pair of workers out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from asyncio import CancelledError, Event, Task
from dataclasses import dataclass

from ...errors import KvsluiceError, WorkerLost
from ..config import ServeConfig
from .links import DecodeLink, PrefillLink, WorkerModel
from .membership import Member, Membership
from .routing import pick_decode, pick_prefill

log = logging.getLogger("kvsluice.gateway")

WATCH_S = 30.0


@dataclass(frozen=True)
class Route:
    """The workers of one attempt at a request; both serve the same model."""

    prefill: PrefillLink
    decode: DecodeLink
    model: WorkerModel


class WorkerPool:
    """Keeps a link to every member and picks workers for requests."""

    def __init__(self, membership: Membership, config: ServeConfig) -> None:
        self._membership = membership
        self._config = config
        self._links: dict[tuple[str, str], PrefillLink | DecodeLink] = {}
        self._task: Task[None] | None = None
        self._changed = Event()
        self.model: WorkerModel | None = None  # of the workers picked last; kept while none is there

    def start(self) -> None:
        self._task = asyncio.create_task(self._follow(), name="membership")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(CancelledError):
                await self._task
        await asyncio.gather(*(link.stop() for link in self._links.values()))
        self._links.clear()

    @property
    def ready(self) -> bool:
        """Whether a prefill and a decode worker of the same model are up."""
        return self._pick() is not None

    @property
    def cache_usage(self) -> float:
        """Share of the decode workers' cache that is reserved."""
        loads = [link.load() for link in self._decodes()]
        capacity = sum(load.capacity_bytes for load in loads)
        return 1 - sum(load.free_bytes for load in loads) / capacity if capacity else 0.0

    @property
    def changed(self) -> Event:
        """Set once, when the next worker comes or goes."""
        return self._changed

    async def route(self) -> Route:
        """Pick workers, waiting for them for a bounded time. Raises `WorkerLost`."""
        try:
            async with asyncio.timeout(self._config.worker_wait_s):
                while (route := self._pick()) is None:
                    await self._changed.wait()
                self.model = route.model
                return route
        except TimeoutError:
            missing = "prefill worker" if self._decodes() else "decode worker"
            if self._config.role == "both":
                missing = "worker"
            raise WorkerLost(f"no {missing} is there; none came within the time allowed") from None

    def _decodes(self) -> list[DecodeLink]:
        return [link for link in self._links.values() if isinstance(link, DecodeLink) and link.up]

    def _pick(self) -> Route | None:
        prefills = [link for link in self._links.values() if isinstance(link, PrefillLink) and link.up]
        served = {link.model.fingerprint for link in prefills if link.model}
        decodes = {
            link.member.worker_id: link
            for link in self._decodes()
            if link.model is not None and link.model.fingerprint in served
        }
        decode_id = pick_decode([link.load() for link in decodes.values()])
        if decode_id is None:
            return None
        decode = decodes[decode_id]
        assert decode.model is not None
        matching = {
            link.member.worker_id: link
            for link in prefills
            if link.model is not None and link.model.fingerprint == decode.model.fingerprint
        }
        prefill_id = pick_prefill([link.load() for link in matching.values()])
        return None if prefill_id is None else Route(matching[prefill_id], decode, decode.model)

    def _notify(self) -> None:
        changed, self._changed = self._changed, Event()
        changed.set()

    async def _follow(self) -> None:
        generation = 0
        while True:
            try:
                view = await self._membership.watch(generation, WATCH_S)
            except KvsluiceError as exc:
                # the fleet as last known goes on working; whoever runs the service decides what a lost controller means
                log.error("membership is lost: %s", exc.message)
                return
            if view.generation != generation:
                generation = view.generation
                await self._reconcile(view.members)

    async def _reconcile(self, members: tuple[Member, ...]) -> None:
        wanted: dict[tuple[str, str], Member] = {
            (m.worker_id, m.role): m for m in members if m.role in ("prefill", "decode")
        }
        for key, link in list(self._links.items()):
            if wanted.get(key) != link.member:
                del self._links[key]
                await link.stop()
        for key, member in wanted.items():
            if key not in self._links:
                self._links[key] = self._connect(member)

    def _connect(self, member: Member) -> PrefillLink | DecodeLink:
        kind: type[PrefillLink] | type[DecodeLink] = PrefillLink if member.role == "prefill" else DecodeLink
        link = kind(member, self._config.max_frame_bytes, self._notify)
        link.start()
        return link
