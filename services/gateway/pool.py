"""The workers as a gateway sees them: membership in, links kept, a pair of workers out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from asyncio import CancelledError, Event, Task
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeVar

from ...errors import KvsluiceError, WorkerLost
from ...protos import worker_pb2 as wpb
from ..config import ServeConfig
from ..security import FleetSecurity
from ..telemetry import where
from .affinity import PromptPrefixes
from .links import DecodeLink, LinkSettings, PrefillLink, WorkerModel
from .membership import Member, Membership
from .routing import pick_decode, pick_prefill
from .waits import Backlog, mean_speed

log = logging.getLogger("kvsluice.gateway")

WATCH_S = 30.0
RETRY_S = 1.0
NO_BLAME: Mapping[Member, int] = MappingProxyType({})


@dataclass(frozen=True)
class Route:
    """The workers of one attempt at a request; both serve the same model. None = no prefill is needed."""

    prefill: PrefillLink | None
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
        self.generation = 0  # of the membership that routes go by
        self.on_prefilled: Callable[[], None] = lambda: None  # called when fewer prompts may wait than before
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

    def accounts(self) -> list[tuple[str, wpb.WorkerInfo]]:
        """Role and latest account of itself of every worker that is up; one that has both roles comes twice."""
        return [(link.member.role, link.info) for link in self._links.values() if link.up]

    @property
    def max_num_seqs(self) -> int:
        """Choices that the decode workers that take requests run together, as far as that is known."""
        return sum(link.member.max_num_seqs for link in self._decodes())

    @property
    def uses(self) -> Mapping[str, int]:
        """Attempts under way, by worker."""
        uses: Counter[str] = Counter()
        for link in self._links.values():
            uses[link.member.worker_id] += len(link.users)
        return uses

    @property
    def wait_s(self) -> dict[str, float]:
        """How long a request would wait for each worker, as far as that is known; the longer of its roles' waits."""
        waits: dict[str, float] = {}
        for link in self._links.values():
            worker_id = link.member.worker_id
            waits[worker_id] = max(waits.get(worker_id, 0.0), link.wait_s)
        return waits

    def backlog(self) -> Backlog:
        """The prompts that prefill workers have not run."""
        links = self._prefills()
        prompts = [tokens for link in links for tokens in link.prompts()]
        return Backlog(prompts, max(1, len(links)), mean_speed(link.speed for link in links))

    def saved_tokens(self, prefixes: PromptPrefixes) -> float:
        """What a prompt should cost less than one of which no worker knows anything."""
        return max((link.found(prefixes).saved_tokens for link in self._prefills()), default=0.0)

    @property
    def changed(self) -> Event:
        """Set once, when the next worker comes or goes."""
        return self._changed

    @property
    def has_decode(self) -> bool:
        """Whether a decode worker is up."""
        return bool(self._decodes())

    @property
    def has_store(self) -> bool:
        """Whether there is a decode worker that can keep requests."""
        return any(link.info.has_store for link in self._decodes())

    async def route(
        self,
        model_fingerprint: str | None = None,
        prefill: bool = True,
        store: bool = False,
        blame: Mapping[Member, int] = NO_BLAME,
        near: str | None = None,
        prefixes: PromptPrefixes | None = None,
    ) -> Route:
        """Pick workers, waiting for them for a bounded time.

        Args:
            model_fingerprint: that they have to serve; None = any.
            prefill: a prefill worker is needed.
            store: a decode worker that has one is taken as long as there is any.
            blame: how often workers failed the request; those that did more often than others are taken only where
                there are no others.
            near: the decode worker that is taken where it has room.
            prefixes: how the prompt begins; a prefill worker that has run that is taken as long as it saves time.

        Raises:
            WorkerLost: none came in time.
        """
        try:
            async with asyncio.timeout(self._config.worker_wait_s):
                while (route := self._pick(model_fingerprint, prefill, store, blame, near, prefixes)) is None:
                    await self._changed.wait()
                self.model = route.model
                return route
        except TimeoutError:
            missing = "prefill worker" if self._decodes() else "decode worker"
            if self._config.role == "both":
                missing = "worker"
            raise WorkerLost(f"no {missing} is there; none came within the time allowed") from None

    def _prefills(self) -> list[PrefillLink]:
        """Those that take requests."""
        return [one for one in self._links.values() if isinstance(one, PrefillLink) and one.up and not one.draining]

    def _decodes(self) -> list[DecodeLink]:
        """Those that take requests."""
        return [one for one in self._links.values() if isinstance(one, DecodeLink) and one.up and not one.draining]

    def _pick(
        self,
        model_fingerprint: str | None = None,
        prefill: bool = True,
        store: bool = False,
        blame: Mapping[Member, int] = NO_BLAME,
        near: str | None = None,
        prefixes: PromptPrefixes | None = None,
    ) -> Route | None:
        prefills = [link for link in self._prefills() if link.model]
        decodes = [link for link in self._decodes() if link.model]
        served = {link.model.fingerprint for link in decodes if link.model}
        if prefill:
            served &= {link.model.fingerprint for link in prefills if link.model}
        if model_fingerprint is not None:
            served &= {model_fingerprint}
        if store:
            keeping = [one for one in decodes if one.info.has_store and one.model and one.model.fingerprint in served]
            decodes = keeping or decodes
        decode = _picked(decodes, served, blame, lambda links: pick_decode([one.load() for one in links], near))
        if decode is None or decode.model is None:
            return None
        if not prefill:
            return Route(None, decode, decode.model)
        same = {decode.model.fingerprint}
        chosen = _picked(prefills, same, blame, lambda links: pick_prefill([link.load(prefixes) for link in links]))
        return None if chosen is None else Route(chosen, decode, decode.model)

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
                try:
                    await self._reconcile(view.members)
                except Exception as exc:  # what is left to do of it is done with the next look
                    log.error("the fleet's change was not taken in whole: %s", where(exc))
                    await asyncio.sleep(RETRY_S)
                else:
                    self.generation = generation = view.generation

    async def _reconcile(self, members: tuple[Member, ...]) -> None:
        served = ("", self._config.model_name)
        wanted: dict[tuple[str, str], Member] = {
            (m.worker_id, m.role): replace(m, draining=False)
            for m in members
            if m.role in ("prefill", "decode") and m.model in served
        }
        draining = {(m.worker_id, m.role) for m in members if m.draining}
        for key, member in wanted.items():
            link = self._links.get(key)
            if link is not None and link.member == member and link.draining != (key in draining):
                link.draining = key in draining
                self._notify()
        for key, link in list(self._links.items()):
            if wanted.get(key) != link.member:
                del self._links[key]
                await link.stop()
        for key, member in wanted.items():
            if key not in self._links:
                self._links[key] = self._connect(member)
                self._links[key].draining = key in draining

    def _connect(self, member: Member) -> PrefillLink | DecodeLink:
        kind: type[PrefillLink] | type[DecodeLink] = PrefillLink if member.role == "prefill" else DecodeLink
        config = self._config
        settings = LinkSettings(config.max_frame_bytes, config.worker_lease_s, FleetSecurity.of(config))
        link = kind(member, settings, self._notify)
        if isinstance(link, PrefillLink):
            link.on_prefilled = lambda: self.on_prefilled()
        link.start()
        return link


AnyLink = TypeVar("AnyLink", PrefillLink, DecodeLink)


def _picked(
    links: Sequence[AnyLink], served: Set[str], blame: Mapping[Member, int], pick: Callable[[list[AnyLink]], str | None]
) -> AnyLink | None:
    """The link that is picked among those to workers of the models that have the least blame.

    Args:
        pick: the id of the chosen worker.
    """
    fitting = [link for link in links if link.model is not None and link.model.fingerprint in served]
    least = min((blame.get(link.member, 0) for link in fitting), default=0)
    fitting = [link for link in fitting if blame.get(link.member, 0) == least]
    worker_id = pick(fitting)
    return next((link for link in fitting if link.member.worker_id == worker_id), None)
