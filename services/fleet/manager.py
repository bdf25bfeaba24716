"""The controller's logic: who belongs to the fleet, who is drained, who is missing. Without Ray, on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from asyncio import Task
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import replace
from typing import Any, Protocol

from ...errors import ConfigError, InternalError, KvsluiceError
from ..config import ServeConfig
from ..gateway.membership import MembershipTable, View
from ..telemetry import where
from .reconcile import Drain, Start, Target, plan
from .replica import FIRST_PAUSE_S, Replica
from .report import Report
from .sizes import Sizes
from .status import fleet_status
from .wanted import WantedFleet, WantedGroup, parse_cluster, wanted_fleet

log = logging.getLogger("kvsluice.fleet")

TICK_S = 1.0
MOST_PAUSE_S = 300.0
AGAIN_S = 1.0  # before somebody who could not be ended is tried once more


class Runtime(Protocol):
    """Starts and ends the fleet's processes."""

    async def start(self, worker_id: str, group: WantedGroup, fleet: WantedFleet) -> None:
        """Have a process come up, when and where its node has room for it."""
        ...

    async def stop(self, worker_id: str, grace_s: float) -> None:
        """End a process for good and free its place; a gateway lets running requests finish for `grace_s`."""
        ...

    async def restart(self, worker_id: str) -> None:
        """End a process that another one follows under the same name. Nothing where that is under way already."""
        ...

    async def place(self, worker_id: str) -> str | None:
        """Why a process has no place on a node yet, in words; None where it has one."""
        ...


class Manager:
    """Keeps the membership, and brings what there is to what is wanted.

    Args:
        runtime: of the fleet's processes.
        keep: takes what a later manager goes on from, whenever that changes.
        kept: what an earlier one kept; the membership is hidden until its processes have had time to report.
        now: monotonic seconds.
        wall_ns: a clock that goes on between managers, for generations.
    """

    def __init__(
        self,
        runtime: Runtime,
        keep: Callable[[str], Awaitable[None]],
        kept: str | None = None,
        now: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._runtime, self._keep, self._now = runtime, keep, now
        self.table = MembershipTable(wall_ns() // 1000, hidden=kept is not None)
        self.replicas: dict[str, Replica] = {}
        self.fleet: WantedFleet | None = None
        self.sizes = Sizes()
        self._cluster_json = ""
        self._numbers: dict[str, int] = {}
        self._token = secrets.token_hex(32)
        self._stopping = False
        self._changed = asyncio.Event()
        self._looking = asyncio.Lock()
        self._tasks: set[Task[None]] = set()
        self._adopting_until_s = -1.0
        if kept is not None:
            self._adopt(json.loads(kept))

    async def apply(self, cluster_json: str) -> None:
        """Want another fleet from now on. Raises `ConfigError` where there can be no such fleet."""
        fleet = wanted_fleet(parse_cluster(cluster_json))
        if self._stopping:
            raise ConfigError("name: this fleet is being taken down; allowed: once it is gone")
        self.fleet, self._cluster_json = fleet, cluster_json
        self.sizes.apply(fleet)
        for replica in self.replicas.values():
            replica.retry_at_s = 0.0
        await self._save()
        await self.step()

    async def report(self, report: Report) -> bool:
        """Take a process's account of itself. Returns whether it belongs to the fleet; otherwise it has to end."""
        replica = self.replicas.get(report.worker_id)
        if replica is None or report.incarnation in replica.past:
            return False
        if report.error:
            await self._failed(replica, report)
            return True
        if replica.report is not None and replica.report.incarnation != report.incarnation:
            replica.past.add(replica.report.incarnation)
            replica.restarts += 1
        before, replica.report, replica.seen_s = replica.report, report, self._now()
        if replica.ending:
            return True
        if replica.state in ("starting", "lost", "failed"):
            replica.become("serving", self._now())
            replica.pause_s, replica.error = FIRST_PAUSE_S, ""
        if before is None or before.members(False) != report.members(False) or not self._is_member(replica):
            for member in report.members(replica.state == "draining"):
                await self.table.register(member)
            self._changed.set()
        if replica.state == "draining" or report.sight is not None:
            self._changed.set()
        return True

    def predecessor(self, worker_id: str) -> Report | None:
        """What the process before it last told under this name."""
        replica = self.replicas.get(worker_id)
        return None if replica is None else replica.report

    async def watch(self, after: int, timeout_s: float) -> View:
        return await self.table.watch(after, timeout_s)

    async def drain(self, worker_ids: Iterable[str], groups: Iterable[str], grace_s: float | None = None) -> list[str]:
        """Take workers away once they have nothing more to do, or the time is over.

        Args:
            worker_ids: others take their place, as the groups' sizes stay.
            groups: that have no workers until another fleet is applied.

        Returns:
            Those that are drained. Raises `ConfigError` where there is no such worker or group.
        """
        async with self._looking:  # whom a look starts can be ended once that is done
            return await self._drain_all(set(worker_ids), groups, grace_s)

    async def _drain_all(self, chosen: set[str], groups: Iterable[str], grace_s: float | None) -> list[str]:
        assert self.fleet is not None
        for worker_id in sorted(chosen - self.replicas.keys()):
            raise ConfigError(f"worker: there is no {worker_id}; allowed: {_listed(self.replicas)}")
        for name in groups:
            if self.fleet.group(name) is None:
                raise ConfigError(f"group: there is no {name}; allowed: {_listed(g.name for g in self.fleet.groups)}")
            self.sizes.empty(name)
            chosen |= {one.worker_id for one in self.replicas.values() if one.group == name}
        for worker_id in sorted(chosen):
            await self._drain(self.replicas[worker_id], grace_s)
        await self._save()
        self._changed.set()
        return sorted(chosen)

    async def shutdown(self, grace_s: float) -> None:
        """Let running requests finish for the time, then end everything.

        Raises:
            InternalError: somebody cannot be ended; calling this again goes on.
        """
        self._stopping = True
        async with self._looking:  # whom the last look starts is there by then, and can be ended
            self.sizes.empty_all()
            await self._save()
            gateways = [one for one in self.replicas.values() if one.is_gateway]
            await asyncio.gather(*(self._stop(one, grace_s) for one in gateways))
            for last in (False, False, True):
                await asyncio.gather(*(self._stop(one, 0.0) for one in list(self.replicas.values())))
                if not self.replicas:
                    return
                if not last:
                    await asyncio.sleep(AGAIN_S)
        raise InternalError(f"not ended: {_listed(self.replicas)}; allowed: `kvsluice down` once more")

    async def run(self) -> None:
        """Look after the fleet until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._changed.wait()
            self._changed.clear()
            try:
                await self.step()
            except KvsluiceError as exc:
                log.error("the fleet is not as wanted: %s", exc.message)
            except Exception as exc:  # whatever it is, the next look may do better
                log.error("looking after the fleet failed: %s", where(exc))

    async def step(self) -> None:
        """One look at everything; two at once would start everybody twice."""
        async with self._looking:
            await self._step()

    async def _step(self) -> None:
        if self.fleet is None or self._stopping:
            return
        now = self._now()
        if now < self._adopting_until_s and any(one.report is None for one in self.replicas.values()):
            return
        await self.table.show()
        for replica in list(self.replicas.values()):
            await self._look_after(replica, now)
        if self.sizes.decide(self.fleet, self.replicas.values(), now):
            await self._save()
        for step in plan(self._targets(), [one.existing() for one in self.replicas.values()]):
            if isinstance(step, Start):
                await self._start(step.group)
            elif isinstance(step, Drain):
                await self._drain(self.replicas[step.worker_id], None)

    def status(self) -> dict[str, Any]:
        """Everything that `kvsluice status` shows."""
        return fleet_status(self.fleet, self.sizes, self.replicas.values(), self.table, self._now())

    def _targets(self) -> list[Target]:
        assert self.fleet is not None
        return [
            Target(
                group.name, group.model, group.version, self.sizes.count(group), group.max_surge, group.max_unavailable
            )
            for group in self.fleet.groups
        ]

    async def _look_after(self, replica: Replica, now: float) -> None:
        assert self.fleet is not None
        if replica.state == "draining":
            if not replica.ending and (now >= replica.drain_until_s or self._is_done(replica, now)):
                self._spawn(self._stop(replica, 0.0))
        elif replica.state == "serving":
            if now - replica.seen_s > self.fleet.lease_s:
                log.error("%s gives no sign of life and is started again", replica.worker_id)
                replica.become("lost", now)
                await self.table.remove(replica.worker_id)
                await self._runtime.restart(replica.worker_id)
        elif replica.state == "failed":
            if now >= replica.retry_at_s:
                replica.become("starting", now)
                await self._runtime.restart(replica.worker_id)
        else:
            replica.waits_for = await self._runtime.place(replica.worker_id)
            if replica.waits_for is not None:
                replica.placed_s = now
            elif now - max(replica.since_s, replica.placed_s) > replica.start_timeout_s:
                log.error("%s did not come up in time; another one is started", replica.worker_id)
                self._spawn(self._stop(replica, 0.0))

    def _is_done(self, replica: Replica, now: float) -> bool:
        """Whether a draining process has nothing more to do, and gets nothing more."""
        assert self.fleet is not None
        report = replica.report
        if replica.is_gateway or report is None or replica.was != "serving":
            return True
        if now - replica.seen_s > self.fleet.lease_s:
            return True
        gateways = [one for one in self.replicas.values() if one.is_gateway and one.state != "starting"]
        for one in gateways:
            sight = one.report.sight if one.report is not None else None
            if one.state not in ("serving", "draining") or sight is None or one.model != replica.model:
                continue  # it is gone, and its requests with it
            if sight.generation < replica.drain_generation or sight.uses.get(replica.worker_id, 0):
                return False
        return report.load.idle and replica.seen_s > replica.since_s

    async def _failed(self, replica: Replica, report: Report) -> None:
        replica.error, replica.error_type, replica.seen_s = report.error, report.error_type, self._now()
        if replica.state not in ("failed", "draining"):
            replica.become("failed", self._now())
            replica.retry_at_s = self._now() + replica.pause_s
            replica.pause_s = min(MOST_PAUSE_S, 2 * replica.pause_s)
            await self.table.remove(replica.worker_id)

    def _is_member(self, replica: Replica) -> bool:
        return any(member.worker_id == replica.worker_id for member in self.table.view().members)

    async def _start(self, name: str) -> None:
        assert self.fleet is not None
        group = self.fleet.group(name)
        assert group is not None, "only wanted groups grow"
        number = self._numbers[name] = self._numbers.get(name, -1) + 1
        replica = Replica.of(group, f"{name}-{number}", number, self._now())
        self.replicas[replica.worker_id] = replica
        await self._save()  # before it is there: what is started is never forgotten
        group = replace(group, config_json=self._with_token(group.config_json))
        await self._runtime.start(replica.worker_id, group, self.fleet)

    def _with_token(self, config_json: str) -> str:
        """A process's configuration, with what the fleet's processes know each other by where no file holds that."""
        config = ServeConfig.from_json(config_json)
        if config.fleet_tokens or config.fleet_token_file is not None:
            return config_json
        return config.model_copy(update={"fleet_tokens": (self._token,)}).to_json()

    async def _drain(self, replica: Replica, grace_s: float | None) -> None:
        assert self.fleet is not None
        grace_s = self.fleet.drain_s if grace_s is None else grace_s
        until_s = self._now() + grace_s
        if replica.state == "draining":
            replica.drain_until_s = min(replica.drain_until_s, until_s)
            return
        replica.was, replica.drain_until_s = replica.state, until_s
        replica.become("draining", self._now())
        await self.table.drain(replica.worker_id)
        replica.drain_generation = self.table.generation
        await self._save()
        if replica.is_gateway:
            # it knows best when its requests have ended
            self._spawn(self._stop(replica, grace_s))

    async def _stop(self, replica: Replica, grace_s: float) -> None:
        """End it for good; until it has, it counts as one that is on its way out."""
        if replica.ending:
            await replica.gone.wait()
            return
        replica.ending = True
        replica.become("draining", self._now())
        if not replica.is_gateway:
            await self.table.remove(replica.worker_id)
        try:
            await self._runtime.stop(replica.worker_id, grace_s)
        except KvsluiceError as exc:
            log.error("%s is not ended yet: %s", replica.worker_id, exc.message)
            replica.ending = False  # the next look tries again
            replica.gone.set()
            replica.gone = asyncio.Event()
            return
        await self.table.remove(replica.worker_id)
        self.replicas.pop(replica.worker_id, None)
        replica.gone.set()
        await self._save()
        self._changed.set()

    def _spawn(self, job: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _save(self) -> None:
        await self._keep(
            json.dumps(
                {
                    "cluster": self._cluster_json,
                    "sizes": self.sizes.saved(),
                    "numbers": self._numbers,
                    "token": self._token,
                    "replicas": [one.saved() for one in self.replicas.values()],
                }
            )
        )

    def _adopt(self, saved: dict[str, Any]) -> None:
        now = self._now()
        self._cluster_json, self._numbers, self._token = saved["cluster"], saved["numbers"], saved["token"]
        self.fleet = wanted_fleet(parse_cluster(self._cluster_json))
        self.sizes.restore(self.fleet, saved["sizes"])
        self.replicas = {one["worker_id"]: Replica.restored(one, now) for one in saved["replicas"]}
        for one in self.replicas.values():
            one.drain_until_s = now + self.fleet.drain_s
        self._adopting_until_s = now + self.fleet.lease_s


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
